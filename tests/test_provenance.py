"""Separated files say what made them."""

import os

import numpy as np
import pytest
import soundfile
import torch

from trackformer_sb.inference.provenance import (
    model_digest,
    provenance,
    up_to_date,
)


def write(path, comment="made so", **options):
    with soundfile.SoundFile(path, "w", 8000, 1, **options) as file:
        file.comment = comment
        file.write(np.zeros(9, "float32"))


def at(path, second):
    os.utime(path, (0, second))


@pytest.fixture
def files(tmp_path):
    song = tmp_path / "song.wav"
    results = [tmp_path / name for name in ("a.wav", "b.flac", "c.png")]
    write(song, "another")
    write(results[0])
    write(results[1])
    results[2].touch()
    at(song, 1000)
    for path in results:
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


@pytest.mark.parametrize("damage", ["empty", "foreign", "no comment"])
def test_damaged_results_are_not_up_to_date(files, damage):
    song, results = files
    if damage == "no comment":
        soundfile.write(results[1], np.zeros(9), 8000)
    else:
        results[1].write_bytes(b"" if damage == "empty" else b"x" * 999)
    at(results[1], 2000)
    assert not up_to_date(song, results, "made so")


def test_the_comment_depends_on_layers_weights_and_options():
    layer = torch.nn.Linear(2, 2)
    first = provenance({"masknet": layer}, overlap=0.25)
    assert first == provenance({"masknet": layer}, overlap=0.25)
    assert first != provenance({"masknet": layer}, overlap=0.5)
    assert first != provenance({"other": layer}, overlap=0.25)
    with torch.no_grad():
        layer.bias[1] += 1e-3
    assert first != provenance({"masknet": layer}, overlap=0.25)
    digest = model_digest({"a": torch.nn.ReLU()})
    assert digest != model_digest({"a": torch.nn.Sigmoid()})
    half = {"masknet": torch.nn.Linear(2, 2).bfloat16()}
    assert model_digest(half) == model_digest(half)
