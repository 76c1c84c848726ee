"""Separated files say what made them."""

import os

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from separators import performer

from trackformer_sb.inference.provenance import (
    file_digest,
    model_digest,
    provenance,
    up_to_date,
)


def write(path, comment="made so", **options):
    if path.suffix == ".png":
        text = PngInfo()
        text.add_text("Comment", comment)
        Image.effect_noise((9, 9), 50).save(path, pnginfo=text)
        return
    with soundfile.SoundFile(path, "w", 8000, 1, **options) as file:
        file.comment = comment
        file.write(np.zeros(900, "float32"))


def at(path, second):
    os.utime(path, (0, second))


@pytest.fixture
def files(tmp_path):
    song = tmp_path / "song.wav"
    results = [tmp_path / name for name in ("a.wav", "b.flac", "c.png")]
    write(song, "another")
    at(song, 1000)
    for path in results:
        write(path)
        at(path, 1000)
    return song, results


def test_up_to_date(files):
    song, results = files
    assert up_to_date(song, results, "made so")
    assert not up_to_date(song, results, "made otherwise")
    at(results[2], 999)
    assert not up_to_date(song, results, "made so")
    results[2].unlink()
    assert not up_to_date(song, results, "made so")
    results[2].mkdir()
    assert not up_to_date(song, results, "made so")


DAMAGES = ("empty", "foreign", "other", "no comment", "cut")


@pytest.mark.parametrize(
    ("number", "damage"),
    # a cut wav file is a shorter one
    [(n, x) for n in range(3) for x in DAMAGES if (n, x) != (0, "cut")],
)
def test_damaged_results_are_not_up_to_date(files, damage, number):
    song, results = files
    path = results[number]
    if damage == "other":
        write(path, "made otherwise")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "no comment" and path.suffix == ".png":
        Image.new("1", (2, 2)).save(path)
    elif damage == "no comment":
        soundfile.write(path, np.zeros(9), 8000)
    else:
        path.write_bytes(b"" if damage == "empty" else b"x" * 999)
    at(path, 2000)
    assert not up_to_date(song, results, "made so")


def test_the_comment_depends_on_file_model_and_options(files):
    song, results = files
    layer = torch.nn.Linear(2, 2)
    first = provenance(song, {"masknet": layer}, overlap=0.25)
    assert first == provenance(song, {"masknet": layer}, overlap=0.25)
    assert first != provenance(song, {"masknet": layer}, overlap=0.5)
    assert first != provenance(song, {"other": layer}, overlap=0.25)
    assert first != provenance(results[0], {"masknet": layer}, overlap=0.25)
    with torch.no_grad():
        layer.bias[1] += 1e-3
    assert first != provenance(song, {"masknet": layer}, overlap=0.25)
    half = {"masknet": torch.nn.Linear(2, 2).bfloat16()}
    assert model_digest(half) == model_digest(half)


@pytest.mark.parametrize(
    "setting",
    [
        {"spec_norm": "minmax"},
        {"mask_activation": "sigmoid"},
        {"attention": "softmax"},
        {"nhead": 4},
    ],
)
def test_the_digest_depends_on_settings_that_are_no_weights(setting):
    digests = set()
    for more in ({}, setting):
        torch.manual_seed(0)
        separator = performer(**more)
        digests.add(model_digest(dict(separator.named_children())))
    assert len(digests) == 2


def test_damaged_pictures_are_not_up_to_date(files):
    """Whatever is wrong with them, the file is separated again."""
    song, results = files
    content = results[2].read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x55
        results[2].write_bytes(changed)
        at(results[2], 2000)
        up_to_date(song, results, "made so")  # does not raise


def test_the_digest_depends_on_settings_that_are_not_shown():
    class Scale(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

    assert model_digest({"a": Scale(1.0)}) != model_digest({"a": Scale(2.0)})
    separator = Scale(1.0)
    digest = model_digest({"a": separator})
    assert digest == model_digest({"a": separator.eval()})


@pytest.mark.parametrize("place", [0, 2**20, 3 * 2**20 - 1])
def test_the_digest_of_a_file_is_of_its_size_and_ends(tmp_path, place):
    path = tmp_path / "song"
    content = bytearray(3 * 2**20)
    path.write_bytes(content)
    first = file_digest(path)
    content[place] = 1
    path.write_bytes(content)
    assert (file_digest(path) == first) == (place == 2**20)
    path.write_bytes(content[:-1])
    assert file_digest(path) != first
