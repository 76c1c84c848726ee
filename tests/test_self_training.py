"""Self-training: stems mixed anew, and separators adapted to songs."""

import csv

import numpy as np
import pytest
import soundfile
import torch
from recipe_runs import RATE, ROOT, load_recipe
from separators import named

from trackformer_sb.cli import main
from trackformer_sb.inference.separator import Separator
from trackformer_sb.training import adapt
from trackformer_sb.training.self_training import (
    mixed_anew,
    stems_and_agreement,
)

CLASSES = ["drums", "bass", "vocals", "other"]


def test_passes_agree_on_what_follows_from_the_song_alone():
    time = torch.arange(RATE) / RATE
    song = torch.stack([torch.sin(440 * time), torch.sin(900 * time)])

    def teacher(songs):
        return torch.stack([0.7 * songs, torch.randn_like(songs)], 1)

    stems, agreement = stems_and_agreement(teacher, song.expand(3, 2, 2, -1))
    assert stems.shape == (3, 2, 2, 2, RATE)
    torch.testing.assert_close(stems[0, 1, 0], 0.7 * song)
    assert agreement.shape == (3, 2, 2)
    assert agreement[..., 0].min() > 30
    assert agreement[..., 1].max() < 0


def test_sure_stems_of_two_songs_are_mixed_at_one_level():
    rng = np.random.default_rng(0)
    # a stem tells its song by its sign and its class by its size
    stems = torch.tensor([1.0, 2.0, 4.0]) * torch.tensor([[1.0], [-1.0]])
    stems = stems.expand(50, 2, 3)[..., None, None].expand(-1, -1, -1, 2, 10)
    sure = torch.tensor([[9.0, 0.0, 0.0], [9.0, 9.0, 0.0]]).expand(50, 2, 3)
    mixed = mixed_anew(stems, sure, 5.0, rng)
    assert mixed.shape == (50, 3, 2, 10)
    both, second, neither = mixed[:, :, 0, 0].T
    assert 10 < (both > 0).sum() < 40
    assert (second < 0).all()
    assert (neither == 0).all()
    # 6 dB of level to either side
    ratio = (second / both).abs()
    assert 0.5 < ratio.min() < 1.5
    assert 3 < ratio.max() < 8.1
    level = mixed.sum(1).square().mean((1, 2)).sqrt()
    torch.testing.assert_close(level, torch.full((50,), 0.1))


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """Six songs of noise, and one with stems."""
    folder, rng = tmp_path_factory.mktemp("music"), np.random.default_rng(0)
    paths = [f"songs/{number}.wav" for number in range(6)]
    paths += [f"stems/song/{name}.wav" for name in ("drums", "vocals")]
    for path in paths:
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        sig = rng.normal(0, 0.1, (RATE * 4, 2)).astype(np.float32)
        soundfile.write(path, sig, RATE)
    return folder


@pytest.fixture
def model(tmp_path):
    return (
        named(CLASSES, steady_share=0.3).bfloat16().export(tmp_path / "model")
    )


def rows_of(run):
    with open(run / "curve.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_separator_teaches_itself(songs, model, tmp_path):
    out = tmp_path / "run"
    keys = {
        "data_folder": songs / "stems",
        "dataset": "stems",
        "mixtures_folder": songs / "songs",
        "output_folder": out,
        "pretrained_separator": model,
        "sample_rate": RATE,
        "segment_seconds": 0.5,
        "n_fft": 512,
        "hop_length": 256,
        "MaskNet": "{channels: [8, 8, 8]}",
        "d_model": 16,
        "num_layers": 1,
        "epoch_items": 16,
        "number_of_epochs": 1,
        # some of named items alone
        "batch_size": 2,
        "log_steps": 8,
        "device": "cpu",
    }
    yaml = ROOT / "hparams" / "separator_self.yaml"
    words = [f"--{key}={value}" for key, value in keys.items()]
    load_recipe("train").main([str(yaml), *words])
    log = (out / "train_log.txt").read_text()
    assert "train named" in log
    assert "train mixit" in log
    assert "train teacher" in log
    start = Separator.from_pretrained(model).state_dict()
    after = Separator.from_pretrained(out / "separator").state_dict()
    assert any(not torch.equal(after[key], start[key]) for key in start)


def run_adapt(songs, model, out, *more):
    words = ("--minutes", "0.05", "--out", out, "--device", "cpu", *more)
    words = ["adapt", songs / "songs", "--model", model, *words]
    return main([str(word) for word in words])


def test_adapt_shows_what_it_gains(songs, model, tmp_path, monkeypatch, capsys):
    settings = {**adapt.SETTINGS, "epoch_items": 8}
    monkeypatch.setattr(adapt, "SETTINGS", settings)
    out = tmp_path / "adapted"
    # nobody is sure of noise
    assert run_adapt(songs, model, out) == 2
    assert "is the separator sure of two stems" in capsys.readouterr().err
    monkeypatch.setattr(adapt, "SURE_DB", 0.0)
    assert run_adapt(songs, model, out) == 0
    text = capsys.readouterr().out
    assert "agreement with the first model" in text
    # songs and minutes at once, then decibels
    assert "\n4 songs to adapt to, 2 held out, 0.05 minutes\n" in f"\n{text}"
    for line in ("epoch: 0 - ", "epoch: 1, step: 2, items: 8 - "):
        assert f"{line}valid remixed_drums: " in text
    first, *_, last = rows_of(out / "run")
    gained = float(last["remixed_mean"]) - float(first["remixed_mean"])
    kept = gained >= adapt.GAIN_DB
    assert (": the adapted separator" in text) == kept
    table = [line.split() for line in text.splitlines()]
    before = f"{float(first['remixed_mean']):.2f}"
    assert ["mean", before, f"{float(last['remixed_mean']):.2f}"] in table
    separator = Separator.from_pretrained(out / "separator")
    assert list(separator.groups) == CLASSES
    # songs that are measured are not trained on
    trained = {path.name for path in (out / "songs").iterdir()}
    assert len(trained) == 4
    # its time is over
    epochs = len(rows_of(out / "run"))
    assert run_adapt(songs, model, out) == 0
    table = text[text.index("SI-SNR") :]
    text = capsys.readouterr().out
    assert "4 songs to adapt to, 2 held out, 0 minutes" in text
    assert text.endswith(table)
    assert len(rows_of(out / "run")) == epochs
    # now it is not
    more = 60 * float(last["hours"]) + 0.05
    assert run_adapt(songs, model, out, "--minutes", more) == 0
    assert len(rows_of(out / "run")) > epochs


def test_adapt_keeps_no_worse_separator(songs, model, tmp_path, monkeypatch):
    worse = {"lr": 10.0, "ema_decay": 0.0, "epoch_items": 8}
    monkeypatch.setattr(adapt, "SETTINGS", worse)
    out = tmp_path / "adapted"
    assert run_adapt(songs, model, out, "--stems", songs / "stems") == 0
    first, *_, last = rows_of(out / "run")
    assert float(last["stems_mean"]) < float(first["stems_mean"])
    start = Separator.from_pretrained(model).state_dict()
    for key, value in (
        Separator.from_pretrained(out / "separator").state_dict().items()
    ):
        torch.testing.assert_close(value, start[key], msg=key)


def test_adapt_names_what_it_lacks(songs, model, tmp_path, capsys):
    (tmp_path / "few").mkdir()
    few = tmp_path / "few" / "a.wav"
    few.write_bytes((songs / "songs" / "0.wav").read_bytes())
    words = ["adapt", few.parent, "--model", model, "--out", tmp_path / "out"]
    assert main([str(word) for word in words]) == 2
    assert "expected 4 songs of 3 s or more, got 1" in capsys.readouterr().err
    assert run_adapt(songs, model, songs / "songs" / "adapted") == 2
    assert "expected a folder outside of" in capsys.readouterr().err
    # nothing that is there is written over
    (tmp_path / "songs").mkdir()
    (tmp_path / "songs" / "mine.txt").write_text("kept")
    assert run_adapt(songs, model, tmp_path) == 2
    assert "expected an empty folder, or none" in capsys.readouterr().err
    assert (tmp_path / "songs" / "mine.txt").read_text() == "kept"
    out = tmp_path / "other"
    out.mkdir()
    (out / "adapt.json").write_text('{"folder": "other"}')
    assert run_adapt(songs, model, out) == 2
    assert "is of another adaptation" in capsys.readouterr().err
    # the folder stays free for the right path
    out = tmp_path / "new"
    assert run_adapt(songs, model, out, "--stems", songs / "stem") == 2
    assert f"{songs / 'stem'} is not a folder" in capsys.readouterr().err
    assert not out.exists()
    alone = tmp_path / "stems" / "song" / "drums.wav"
    alone.parent.mkdir(parents=True)
    alone.write_bytes((songs / "stems" / "song" / "drums.wav").read_bytes())
    assert run_adapt(songs, model, out, "--stems", tmp_path / "stems") == 2
    assert "songs in which two classes sound" in capsys.readouterr().err
