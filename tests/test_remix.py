"""What may be asked of outputs, and what it means."""

import math

import numpy as np
import pytest

from trackformer_sb.inference.remix import (
    check_outputs,
    mix_gains,
    pan_matrix,
)


@pytest.mark.parametrize(
    "text, outputs",
    [
        (None, {f"source{i}": (i,) for i in range(4)}),
        ("0,2", {"source0": (0,), "source2": (2,)}),
        (" 3 ", {"source3": (3,)}),
        ("drums=0+3,rest=1+2", {"drums": (0, 3), "rest": (1, 2)}),
        (
            "lead-voice_1.x = 2 + 0 , 1",
            {"lead-voice_1.x": (2, 0), "source1": (1,)},
        ),
        ("None", {}),
        ({"rest": (1, 2)}, {"rest": (1, 2)}),
    ],
)
def test_outputs(text, outputs):
    assert check_outputs(text, 4) == outputs


@pytest.mark.parametrize(
    "outputs, message",
    [
        *((x, "outputs as in") for x in ("", "a b", "-1", "drums=", "1+2")),
        *(({x: (0,)}, "names of letters") for x in ("../up", ".hidden", "a b")),
        # a remix has its own name, and would take numbers for outputs
        *((x, "other than remix and numbers") for x in ("remix=1", "2=0+1")),
        *((x, "occurs twice") for x in ("0,source0=1", "Drums=0,drums=1")),
        *((x, "each once, got") for x in ("drums=1+1", {"drums": ()})),
        *((x, "rest: expected outputs from 0 to 3") for x in ("rest=1+4",)),
    ],
)
def test_outputs_that_there_are_not(outputs, message):
    with pytest.raises(ValueError, match=message):
        check_outputs(outputs, 4)


def test_remix():
    outputs = check_outputs("drums=0+3,rest=1+2", 4)
    text = " drums : +20, 1:-inf, 2 @ -.5, rest@.25"
    names, gains, pans = mix_gains(outputs, text, 4)
    assert names == ["drums", "rest", "remix"]
    expected = [[1, 0, 0, 1], [0, 1, 1, 0], [10, 0, 1, 10]]
    assert gains.tolist() == expected
    assert pans.tolist() == [0, 0.25, 0.25, 0]  # the last word counts
    # those that it does not name stay
    assert mix_gains(outputs, {}, 4)[1][2].tolist() == [1.0] * 4
    # outputs by themselves have names as well, and need not be written
    gains = mix_gains(check_outputs(None, 2), {"source1": -math.inf}, 2)[1]
    assert gains.tolist() == [[1, 0], [0, 1], [1, 0]]
    names, gains, _ = mix_gains({}, None, 2)
    assert names == [] and gains.shape == (0, 2)
    # stems that are not written
    gains = mix_gains({}, "b:-inf", 2, {"a": (0,), "b": (1,)})[1]
    assert gains.tolist() == [[1, 0]]


@pytest.mark.parametrize(
    "remix, message",
    [
        *((x, "as in 0:-inf,3:") for x in ("", "0", "0:", ":3", "0:1,")),
        *((x, "as in 0:-inf,3:") for x in ("0:inf", "0:nan", "0:loud")),
        ("voice:0", "one of drums, got 'voice'"),
        ("4:0", "expected outputs from 0 to 3 or one of drums, got 4"),
        ("drums@1.5", "pan: expected -1 .left. to 1 .right., got .*1.5"),
    ],
)
def test_remixes_that_there_are_not(remix, message):
    with pytest.raises(ValueError, match=message):
        mix_gains({"drums": (0, 3)}, remix, 4)


@pytest.mark.parametrize("pan", np.linspace(-1, 1, 9))
def test_pans_keep_the_power(pan):
    (left,), (right,) = pan_matrix(pan, 1)
    assert left**2 + right**2 == pytest.approx(2)
    assert math.atan2(right, left) == pytest.approx((pan + 1) * math.pi / 4)
    # of stereo, that of what lies on one side alone
    power = np.square(pan_matrix(pan, 2)).sum(0)
    assert power.tolist() == pytest.approx([1, 1])
