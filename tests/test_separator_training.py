"""Training of named stems: results, resume, ranks, an end on demand."""

import csv
import shutil

import numpy as np
import pytest
import soundfile
import torch
from recipe_runs import (
    RATE,
    ROOT,
    interrupted,
    load_recipe,
    torchrun,
    unused_keys,
)
from separators import named

from trackformer_sb.cli import main
from trackformer_sb.inference.separator import Separator
from trackformer_sb.inference.streaming import StreamingSeparator
from trackformer_sb.training import named as training
from trackformer_sb.training.named import (
    RETIRED,
    NamedSeparation,
    use_slots,
)

STEMS = ["drums", "bass", "vocals", "other"]
recipe = load_recipe("train")


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Three songs with stems and voices, three without."""
    folder = tmp_path_factory.mktemp("music")
    rng = np.random.default_rng(0)
    names = ("drums", "bass", "other", "vocals")
    for song in range(3):
        for name in names[:3] if song else names:
            path = folder / "stems" / f"song{song}" / f"{name}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            sig = rng.normal(0, 0.1, (RATE * 4, 2)).astype(np.float32)
            soundfile.write(path, sig, RATE)
        (folder / "songs").mkdir(exist_ok=True)
        soundfile.write(folder / "songs" / f"{song}.wav", sig, RATE)
    return folder


def command(music, out, yaml_name="separator.yaml", **more):
    keys = {
        "data_folder": music / "stems",
        "mixtures_folder": music / "songs",
        "mixture_share": 0.5,
        "valid_folders": f"[{music / 'stems'}]",
        "valid_windows": 1,
        "output_folder": out,
        "sample_rate": RATE,
        "segment_seconds": 0.3,
        "epoch_items": 8,
        "number_of_epochs": 2,
        "num_workers": 0,
        "batch_size": 2,
        "n_fft": 512,
        "hop_length": 256,
        "MaskNet": "{channels: [8, 8, 8]}",
        "d_model": 16,
        "num_layers": 1,
        "device": "cpu",
        **more,
    }
    return [
        str(ROOT / "hparams" / yaml_name),
        *(f"--{key}={value}" for key, value in keys.items()),
    ]


def curve(out):
    with open(out / "curve.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def weights(out):
    return Separator.from_pretrained(out / "separator").state_dict()


@pytest.mark.parametrize(
    "yaml_name",
    ["separator.yaml", "separator_live.yaml", "separator_self.yaml"],
)
def test_every_key_is_used(yaml_name):
    assert unused_keys(yaml_name, "trackformer_sb/training/named.py") == []


def test_a_run_leaves_its_curve_and_separator(music, tmp_path):
    recipe.main(command(music, tmp_path, log_steps=4))
    rows = curve(tmp_path)
    assert [row["items"] for row in rows] == ["8.0", "16.0"]
    assert {"stems_drums", "stems_mean"} <= rows[0].keys()
    log = (tmp_path / "train_log.txt").read_text()
    assert "train named" in log
    assert "train mixit" in log
    assert "train probe" in log
    separator = Separator.from_pretrained(tmp_path / "separator")
    stems = separator.separate(torch.randn(2, RATE))
    assert list(stems) == STEMS


def test_export_of_a_run_is_what_it_left(music, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    recipe.main(command(music, run, number_of_epochs=1))
    assert main(["export", str(run), str(again)]) == 0
    for name in ("config.json", "hyperparams.yaml", "model.safetensors"):
        left = (run / "separator" / name).read_bytes()
        assert (again / name).read_bytes() == left
    assert "| epoch | 1 |" in (again / "README.md").read_text()


def test_resumed_run_equals_uninterrupted_one(music, tmp_path, monkeypatch):
    every = {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 1}
    recipe.main(command(music, tmp_path / "whole", **every))
    cut = command(music, tmp_path / "cut", **every)
    interrupted(recipe.main, NamedSeparation, cut, monkeypatch, stop_at=6)
    with pytest.raises(ValueError, match=r"weight_decay was 0\.01, now 0\.1"):
        recipe.main([*cut, "--weight_decay=0.1"])
    # what makes no difference here
    more = ["--finish_minutes=10000", "--num_workers=1"]
    recipe.main([*cut, *more, "--allow_changes=True"])
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for key in whole:
        torch.testing.assert_close(again[key], whole[key], msg=key)
    assert len(curve(tmp_path / "cut")) == 2


def test_a_run_goes_on_with_moved_music_and_no_other(music, tmp_path):
    out, moved = tmp_path / "run", tmp_path / "moved"
    recipe.main(command(music, out, number_of_epochs=1))
    shutil.copytree(music, moved)
    recipe.main(command(moved, out))
    assert len(curve(out)) == 2
    (moved / "songs" / "2.wav").rename(moved / "songs" / "3.wav")
    message = r"other songs: 1 are gone, 2\.wav; expected the same music"
    with pytest.raises(ValueError, match=message):
        recipe.main(command(moved, out, number_of_epochs=3))


def test_learning_rate_falls_and_the_run_ends(music, tmp_path, monkeypatch):
    clock = iter(range(100_000))
    monkeypatch.setattr(training.time, "monotonic", lambda: 10.0 * next(clock))
    rates = []
    after = NamedSeparation.on_fit_batch_end

    def note(brain, *args):
        rates.append(brain.optimizer.param_groups[0]["lr"])
        after(brain, *args)

    monkeypatch.setattr(NamedSeparation, "on_fit_batch_end", note)
    options = {"finish_minutes": 1, "number_of_epochs": 1000, "warmup_steps": 1}
    recipe.main(command(music, tmp_path, **options))
    assert 2 < len(rates) < 10
    assert rates == sorted(rates, reverse=True)
    assert (tmp_path / "separator" / "model.safetensors").is_file()


def test_a_retired_slot_is_silent_and_comes_back():
    separator = named(STEMS, steady_share=0.3)
    masknet, mix_w = separator.masknet, separator.encoder(torch.randn(1, RATE))
    active = torch.tensor([[True, True], [True, False]] * 2)
    use_slots([masknet], active)
    masks = masknet(mix_w)
    assert (masks[[3, 7]] == 0).all()
    torch.testing.assert_close(masks.sum(0), torch.ones_like(masks[0]))
    use_slots([masknet], torch.ones(4, 2, dtype=torch.bool))
    assert (masknet(mix_w)[[3, 7]] > 0).all()


def test_slots_adapt_in_training_and_after_a_resume(music, tmp_path):
    separator = named(STEMS, steady_share=0.3)
    with torch.no_grad():
        separator.masknet.bin_bias[1::2] = -20  # hardly used
    start = separator.export(tmp_path / "pretrained")
    keys = {"pretrained_separator": start, "adapt_slots": 2, "lr": 1e-9}
    out = tmp_path / "run"
    recipe.main(command(music, out, **keys, number_of_epochs=1))
    bias = Separator.from_pretrained(out / "separator").masknet.bin_bias
    retired = bias[:, 0, 0] < RETIRED / 2
    assert retired.tolist() == [False, True] * 4
    # what is left of each class is busy, and another one is there
    recipe.main(command(music, out, **keys, number_of_epochs=2))
    for name in STEMS:
        _, *counts = [row[f"slots_{name}"] for row in curve(out)]
        assert counts == ["1.0", "2.0"]


def unlabelled(music, **more):
    songs = {"data_folder": music / "songs", "dataset": "mixtures"}
    return songs | {"mixtures_folder": "null", "number_of_epochs": 1, **more}


def test_unlabelled_music_alone_trains(music, tmp_path):
    songs = unlabelled(music, log_steps=4, absent="{'*': [vocals]}")
    recipe.main(command(music, tmp_path, **songs))
    assert curve(tmp_path)
    assert "train absent" in (tmp_path / "train_log.txt").read_text()


@pytest.fixture
def pretrained(tmp_path):
    """A separator as a training by `command` would leave it."""
    return (
        named(STEMS, steady_share=0.3)
        .bfloat16()
        .export(tmp_path / "pretrained")
    )


def test_a_training_starts_with_a_separator(music, tmp_path, pretrained):
    still = {"pretrained_separator": pretrained, "lr": 1e-9}
    out = tmp_path / "run"
    recipe.main(command(music, out, **unlabelled(music, **still)))
    start = Separator.from_pretrained(pretrained).state_dict()
    for key, value in weights(out).items():
        torch.testing.assert_close(value, start[key], msg=key)
    # a run that goes on needs it no more
    shutil.rmtree(pretrained)
    options = still | {"lr": 1e-2, "number_of_epochs": 2}
    options["allow_changes"] = True
    recipe.main(command(music, out, **unlabelled(music, **options)))
    # what it started from is measured as well
    assert [row["epoch"] for row in curve(out)] == ["0", "1", "2"]
    again = weights(out)
    assert any(not torch.equal(again[key], start[key]) for key in start)


def test_a_separator_that_does_not_fit_is_refused(music, tmp_path, pretrained):
    other = {"d_model": 32, "hop_length": 128, "classes": "[vocals, other]"}
    words = command(
        music, tmp_path / "run", pretrained_separator=pretrained, **other
    )
    with pytest.raises(ValueError, match="pretrained_separator: ") as error:
        recipe.main(words)
    for difference in (
        "classes is ['drums', 'bass', 'vocals', 'other'], this training has "
        "['vocals', 'other']; ",
        "hop_length is 256, this training has 128; ",
        "d_model is 16, this training has 32",
    ):
        assert difference in str(error.value)


def test_a_live_separator_learns_from_a_teacher(music, tmp_path, pretrained):
    run, other = tmp_path / "run", tmp_path / "other"
    named(["vocals", "other"]).export(other)

    def live(teacher):
        options = {"epoch_items": 4, "log_steps": 2, "teacher": teacher}
        options = unlabelled(music, **options)
        return command(music, run, "separator_live.yaml", **options)

    message = r"teacher: expected .*'bass', .* are \(\['vocals', 'other'\], 80"
    with pytest.raises(ValueError, match=message):
        recipe.main(live(other))
    recipe.main(live(pretrained))
    assert "train teacher" in (run / "train_log.txt").read_text()
    (row,) = curve(run)
    assert row["step"] == "2.0"
    streaming = StreamingSeparator(str(run / "separator"))
    assert streaming.names == STEMS


@pytest.mark.slow
def test_two_ranks_train_and_measure(music, tmp_path, pretrained):
    options = {"epoch_items": 16, "number_of_epochs": 1, "log_steps": 2}
    options["pretrained_separator"] = pretrained
    words = command(music, tmp_path, "separator_self.yaml", **options)
    words.append("--distributed_backend=gloo")
    torchrun(ROOT / "recipes" / "train.py", *words)
    first, row = curve(tmp_path)
    assert first.keys() == row.keys() and first["stems_mean"]
    assert row["items"] == "16.0"
    assert row["step"] == "4.0"
    assert (tmp_path / "train_log.txt").read_text().count("train named") == 2
