"""Named stems: what counts, leakage, and the benchmark."""

import csv
import importlib
import pathlib
import sys

import pytest
import soundfile
import torch

from trackformer_sb.data.remix import STEM_CLASSES
from trackformer_sb.objectives.named import (
    leakage,
    named_si_snri,
    pair_by_class,
)

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def quality(monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("quality")


def tones(seconds=1.0, sample_rate=8000):
    """Class -> stereo stem: two tones far apart, one of them gated."""
    angle = torch.arange(int(seconds * sample_rate)) * 2 * torch.pi
    low, high = (
        torch.sin(angle * hertz / sample_rate) for hertz in (200, 3000)
    )
    high = high * (torch.arange(len(high)) % 4000 < 2000)
    return {"bass": low.expand(2, -1), "drums": high.expand(2, -1)}


# -- measures


def test_the_mixture_improves_by_0_and_true_stems_by_much():
    stems = torch.randn(4, 2000)
    mix = stems.sum(0)
    assert named_si_snri(mix.expand(4, -1), stems, mix).abs().max() < 1e-4
    assert named_si_snri(stems, stems, mix).min() > 80
    # by name: stems in another order are worse than the mixture
    assert named_si_snri(stems.flip(0), stems, mix).max() < 0
    silence = torch.zeros(3, 100)
    assert named_si_snri(silence, silence, silence[0]).isnan().all()
    assert leakage(silence, silence, silence[0]).isnan().all()


@pytest.mark.parametrize(
    "share, counts",
    [(0.0, False), (9e-4, False), (1.1e-3, True), (0.97, True), (0.99, False)],
)
def test_stems_count_that_sound_and_are_not_alone(share, counts):
    # orthogonal, so that shares of energy add up to one
    angle = torch.arange(1000) * 2 * torch.pi / 1000
    stems = torch.stack([torch.sin(3 * angle), torch.sin(5 * angle)])
    stems = stems * torch.tensor([[share], [1 - share]]).sqrt()
    improvement = named_si_snri(stems, stems, stems.sum(0))
    assert bool(improvement[0].isfinite()) == counts


def test_leakage_is_the_level_below_the_mixture():
    mix = torch.randn(1000)
    stems = torch.stack([mix, *torch.zeros(3, 1000)])
    gains = torch.tensor([1.0, 0.5, 1e-2, 0.0])
    below = leakage(gains[:, None] * mix, stems, mix)
    assert below[0].isnan()  # it sounds
    assert below[1:].tolist() == pytest.approx([6.0206, 40, 120], abs=1e-3)


def test_bass_goes_into_other_only_where_the_song_has_no_bass():
    slots = torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128]).view(8, 1, 1)
    slot_classes = [name for name in STEM_CLASSES for _ in range(2)]
    one = torch.ones(1, 1)
    names, est_stems, true = pair_by_class(
        slots, slot_classes, {"drums": one, "other": one}
    )
    assert names == ["drums", "other", "vocals"]
    assert est_stems.flatten().tolist() == [3, 192 + 12, 48]
    assert true.flatten().tolist() == [1, 1, 0]
    names, est_stems, _ = pair_by_class(slots, slot_classes, {"bass": one})
    assert names == list(STEM_CLASSES)
    assert est_stems.flatten().tolist() == [3, 12, 48, 192]


@pytest.fixture
def folder(tmp_path):
    """Two songs of stems: one with a mono stem and a licence, one short."""
    for song, seconds in (("a", 7.0), ("b", 3.5)):
        (tmp_path / song).mkdir()
        for name, sig in tones(seconds, 44100).items():
            sig = 0.3 * (sig if name == "bass" else sig[:1])
            path = tmp_path / song / f"{name}_1.wav"
            soundfile.write(path, sig.T.numpy(), 44100, subtype="FLOAT")
        (tmp_path / song / "LICENSE.txt").write_text("CC0")
        soundfile.write(tmp_path / song / "mix.wav", sig[0].numpy(), 44100)
    return tmp_path


# -- the benchmark


def test_benchmark_writes_its_tables(folder, tmp_path, monkeypatch, quality):
    monkeypatch.chdir(tmp_path)
    methods = ["mixture", "bands", "octaves", "static", "irm"]
    monkeypatch.setattr(
        sys,
        "argv",
        ["quality.py", *methods, "--data", str(folder), "--songs", "a", "b"],
    )
    quality.main()
    output = tmp_path / "benchmarks" / "results" / "quality" / "quality.md"
    assert "| irm | as they are |" in output.read_text("utf-8")
    with open(output.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["song"] for row in rows} == {"a", "b"}
    first = {
        (row["model"], row["class"]): row
        for row in rows
        if row["song"] == "a" and row["masks"] == "as they are"
    }
    assert int(first["irm", "drums"]["windows"]) == 2
    for key in ("si_snri", "song_si_snri"):
        assert float(first["mixture", "drums"][key]) == pytest.approx(
            0, abs=1e-3
        )
        assert float(first["irm", "drums"][key]) > 15
    assert float(first["irm", "drums"]["museval"]) > 15
    # a quarter of the mixture where there are no vocals
    below = float(first["mixture", "vocals"]["leakage"])
    assert below == pytest.approx(12.04, abs=0.01)
    assert float(first["bands", "chosen"]["grouped"]) > 10
    assert ("bands", "drums") not in first
