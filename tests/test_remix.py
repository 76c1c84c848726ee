"""What may be asked of outputs, and what it means."""

import itertools
import math

import pytest

from trackformer_sb.inference.remix import (
    check_outputs,
    loudest_first,
    parse_outputs,
    parse_remix,
    remix_gains,
)


@pytest.mark.parametrize(
    "text, outputs",
    [
        ("0,2", {"source0": (0,), "source2": (2,)}),
        (" 3 ", {"source3": (3,)}),
        ("drums=0+3,rest=1+2", {"drums": (0, 3), "rest": (1, 2)}),
        ("a b", None),
        (
            "lead-voice_1.x = 2 + 0 , 1",
            {"lead-voice_1.x": (2, 0), "source1": (1,)},
        ),
        ("None", {}),
        ("", None),
        ("0,", None),
        ("-1", None),
        ("drums", None),
        ("drums=", None),
        ("=1", None),
        ("1+2", None),
        ("1=2=3", None),
        ("../up=1", None),
        ("a/b=1", None),
        (".hidden=1", None),
        ("remix=1", None),
        ("0,source0=1", None),
        ("Drums=0,drums=1", None),
        ("drums=1+1", None),
        ("0.5", None),
    ],
)
def test_parse_outputs(text, outputs):
    if outputs is None:
        with pytest.raises(ValueError, match=r"expected|occurs twice"):
            parse_outputs(text)
    else:
        assert parse_outputs(text) == outputs


@pytest.mark.parametrize(
    "text, gains",
    [
        ("0:-inf,3:+3", {0: -math.inf, 3: 3.0}),
        (" 12 : -1.5 ", {12: -1.5}),
        ("drums:-inf,0:1", {"drums": -math.inf, 0: 1.0}),
        ("0:inf", None),
        ("0:nan", None),
        ("0:", None),
        (":3", None),
        ("0", None),
        ("", None),
        ("0:1,", None),
        ("0:1,0:2", None),
        ("0:1,00:2", None),
    ],
)
def test_parse_remix(text, gains):
    if gains is None:
        with pytest.raises(ValueError, match=r"expected|occurs twice"):
            parse_remix(text)
    else:
        assert parse_remix(text) == gains


@pytest.mark.parametrize("text", ["2=0+1", "rest=1,02=0+1"])
def test_names_that_are_numbers(text):
    """A remix would take them for outputs."""
    with pytest.raises(ValueError, match="other than remix and numbers, got"):
        parse_outputs(text)


def test_check_outputs():
    assert check_outputs(None, 3) == {f"source{i}": (i,) for i in range(3)}
    assert check_outputs("rest=1+2", 3) == {"rest": (1, 2)}
    assert check_outputs({"rest": (1, 2)}, 3) == {"rest": (1, 2)}
    assert check_outputs({}, 3) == {}
    with pytest.raises(ValueError, match=r"rest: expected .* 0 to 1, got 2"):
        check_outputs("rest=1+2", 2)
    with pytest.raises(ValueError, match=r"rest: expected .* 0 to 1, got -1"):
        check_outputs({"rest": (-1,)}, 2)


def test_remix_gains():
    outputs = check_outputs("drums=0+3,rest=1+2", 4)
    gains = remix_gains("drums:20,1:-inf", outputs, 4)
    assert gains == pytest.approx([10.0, 0.0, 1.0, 10.0])
    assert remix_gains({}, outputs, 4) == [1.0] * 4
    # outputs by themselves have names as well
    assert remix_gains("source1:-20", check_outputs(None, 2), 2) == [1.0, 0.1]
    with pytest.raises(ValueError, match="one of drums, rest, got 'voice'"):
        remix_gains("voice:0", outputs, 4)
    with pytest.raises(ValueError, match="one of no groups, got 'voice'"):
        remix_gains("voice:0", {}, 4)
    with pytest.raises(ValueError, match="expected outputs from 0 to 3, got 4"):
        remix_gains("4:0", outputs, 4)
    with pytest.raises(ValueError, match="two gains for the output 3"):
        remix_gains("drums:1,3:1", outputs, 4)


def test_loudest_first():
    for energies in itertools.permutations([4.0, 3.0, 1.0, 0.0]):
        order = loudest_first(energies)
        assert [energies[i] for i in order] == [4.0, 3.0, 1.0, 0.0]
    assert loudest_first([0.0, 0.0, 1.0, 0.0]) == [2, 0, 1, 3]


@pytest.mark.parametrize(
    ("outputs", "match"),
    [
        ({"../drums": (0,)}, "expected names of letters"),
        ({"Drums": (0,), "drums": (1,)}, "occurs twice"),
        ({"drums": ()}, "drums: expected outputs, each once"),
        ({"drums": (1, 1)}, "drums: expected outputs, each once"),
    ],
)
def test_groups_of_a_dict_are_checked_as_those_of_a_text(outputs, match):
    with pytest.raises(ValueError, match=match):
        check_outputs(outputs, 4)
