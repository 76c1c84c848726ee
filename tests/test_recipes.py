"""The training recipe with every yaml, as a user runs it."""

import contextlib
import io
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import time
import types

import ddp_step
import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
import yaml
from recipe_runs import (
    RATE,
    ROOT,
    Killed,
    apart,
    interrupted,
    load_recipe,
    read_results,
    source_of,
    tiny,
    torchrun,
    unused_keys,
    without_pictures,
    write_songs,
)
from speechbrain.dataio.sampler import DistributedSamplerWrapper
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

from trackformer_sb import cli
from trackformer_sb.data.manifest import read_songs
from trackformer_sb.inference.separator import Separator
from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder
from trackformer_sb.objectives.metrics import mixture_si_snr
from trackformer_sb.training import experiment as experiments
from trackformer_sb.training.costs import of_all_ranks
from trackformer_sb.training.dataio import prepare_data
from trackformer_sb.training.experiment import load_experiment

SEPARATION_YAMLS = (
    "performer_mixit.yaml",
    "performer_mixit_mae.yaml",
    "demo.yaml",
    "convtasnet_mixit.yaml",
    "asteroid_convtasnet_mixit.yaml",
)

recipe = load_recipe("train")


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    return write_songs(tmp_path_factory.mktemp("songs"))


@pytest.fixture(scope="module")
def trained(songs, tmp_path_factory):
    """The results of a training, with its pictures; to be read only."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with apart():
        recipe.main(tiny("performer_mixit.yaml", songs, out))
    return out


@pytest.fixture
def begun(trained, tmp_path):
    """A copy of that training, to go on from."""
    return shutil.copytree(trained, tmp_path / "begun")


@pytest.fixture
def quick(monkeypatch):
    """Runs without what takes most of them."""
    without_pictures(monkeypatch, recipe.Separation)


@pytest.mark.parametrize("yaml_name", SEPARATION_YAMLS)
def test_yaml_trains_and_leaves_all_results(
    yaml_name, songs, trained, tmp_path, quick
):
    if "asteroid" in yaml_name:
        pytest.importorskip("asteroid")
    out = trained
    if yaml_name != "performer_mixit.yaml":
        out = tmp_path / "run"
        recipe.main(tiny(yaml_name, songs, out))
    for name in ("train_log.txt", "hyperparams.yaml"):
        assert (out / name).stat().st_size > 0, name
    assert len(list((out / "save").glob("CKPT*"))) == 1
    assert list((out / "tensorboard").glob("events*"))
    rows, average, metrics = read_results(out)
    assert average["id"] == "avg"
    assert list(average) == ["id", *recipe.COLUMNS]
    for name in recipe.COLUMNS:
        values = [float(row[name]) for row in rows]
        assert np.isfinite(values).all(), name
        assert float(average[name]) == pytest.approx(np.mean(values))
        assert metrics[name] == pytest.approx(np.mean(values))
    for name in ("epoch_seconds", "total_seconds", "peak_memory_mb"):
        assert metrics[name] > 0, name
    separator = Separator.from_pretrained(out / "separator")
    mix = torch.randn(2, 2400)
    est_source = separator(mix)
    assert est_source.shape == (2, 3, 2400)
    torch.testing.assert_close(est_source.sum(1), mix, atol=1e-4, rtol=1e-4)


def test_pictures_and_packages_of_a_training(trained):
    for name in ("training_curves", "test_item"):
        assert (trained / "figures" / f"{name}.png").stat().st_size > 10_000
    assert (trained / "env.log").stat().st_size > 0


def test_paper_values():
    text = (ROOT / "hparams" / "performer_mixit.yaml").read_text("utf-8")
    paper = {
        "sample_rate": "44100",
        "segment_seconds": "3.0",
        "n_fft": "1024",
        "hop_length": "256",
        "num_layers": "12",
        "n_features": "256",
        "num_spks": "8",
        "batch_size": "4",
        "number_of_epochs": "100",
        "early_stop_epochs": "10",
        "lr": "0.0001",
        "weight_decay": "0.01",
        "dropout": "0.1",
        "lambda_diversity": "0.1",
        "lambda_sparsity": "0.1",
    }
    for key, value in paper.items():
        assert re.search(rf"^{key}: {value}(\s|$)", text, re.M), key


@pytest.mark.parametrize("yaml_name", SEPARATION_YAMLS)
def test_every_key_is_used(yaml_name):
    assert unused_keys(yaml_name, "recipes/train.py") == []
    source = source_of("recipes/train.py")
    for key in ("lambda_diversity", "lambda_sparsity"):
        assert f"hparams.{key}" in source


def test_songs_without_stems_leave_stem_columns_empty(tmp_path, quick):
    songs = write_songs(tmp_path / "music", stems=False)
    out = tmp_path / "run"
    recipe.main(tiny("performer_mixit.yaml", songs, out, dataset="mixtures"))
    rows, average, metrics = read_results(out)
    for row in (*rows, average):
        assert row["si_snri"] == row["sdr"] == row["si_snr"] == ""
        assert np.isfinite(float(row["mixture_si_snr"]))
    assert metrics["si_snri"] is None


def test_training_on_one_folder_and_testing_on_another(songs, tmp_path, quick):
    music = write_songs(tmp_path / "music", stems=False)
    out = tmp_path / "run"
    recipe.main(
        tiny(
            "performer_mixit.yaml",
            music,
            out,
            dataset="mixtures",
            test_folder=songs,
        )
    )
    _, average, _ = read_results(out)
    assert np.isfinite(float(average["si_snri"]))
    train = (out / "manifests" / "train.jsonl").read_text("utf-8")
    assert str(songs) not in train


def test_training_lowers_the_loss(songs, tmp_path, quick):
    out = tmp_path / "run"
    recipe.main(
        tiny(
            "performer_mixit.yaml",
            songs,
            out,
            number_of_epochs=8,
            lr=0.01,
            dropout=0.0,
        )
    )
    metrics = read_results(out)[2]
    history = metrics["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 1.0
    series = [row["train_mixture_si_snr"] for row in history]
    assert series[-1] > series[0] + 1.0
    assert metrics["train_mixture_si_snr"] in series
    assert "train mixture_si_snr: " in (out / "train_log.txt").read_text()
    # the schedule reached its end
    assert history[-1]["lr"] == pytest.approx(1e-5)


def test_pairs_in_training_are_measured_as_those_of_the_test():
    est_source, mixtures = torch.randn(3, 4, 1000), torch.randn(3, 2, 1000)
    mixtures[1, 1] = 0.0  # alone, the other one is no separation
    brain = types.SimpleNamespace(rows=[])
    recipe.Separation.measure_training(brain, est_source, mixtures)
    expected = mixture_si_snr(est_source, mixtures)[[0, 2]].tolist()
    found = [row["mixture_si_snr"] for row in brain.rows]
    assert found == pytest.approx(expected, abs=1e-3)


def weights(out):
    return Separator.from_pretrained(out / "separator").masknet.state_dict()


@pytest.mark.parametrize(("batches_per_step", "stop_at"), [(1, 8), (2, 5)])
def test_resumed_run_equals_uninterrupted_one(
    batches_per_step, stop_at, songs, tmp_path, monkeypatch, quick
):
    def command(out, **more):
        return tiny(
            "performer_mixit.yaml",
            songs,
            out,
            number_of_epochs=2,
            dropout=0.3,
            redraw_interval=3,
            grad_accumulation_factor=batches_per_step,
            **more,
        )

    recipe.main(command(tmp_path / "whole"))
    # 3 songs of 4 segments in batches of 2: 6 batches an epoch
    keys = {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 1}
    cut = command(tmp_path / "cut", **keys)
    interrupted(
        recipe.main, recipe.Separation, cut, monkeypatch, stop_at=stop_at
    )
    recipe.main(cut)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for key in whole:
        torch.testing.assert_close(cut[key], whole[key], msg=key)
    assert len(read_results(tmp_path / "cut")[2]["history"]) == 2


def test_resumed_epoch_counts_its_time_from_the_start(
    songs, tmp_path, monkeypatch, quick
):
    wait = recipe.Separation.on_fit_batch_start

    def slow(brain, *args):
        time.sleep(0.1)
        wait(brain, *args)

    monkeypatch.setattr(recipe.Separation, "on_fit_batch_start", slow)
    keys = {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 1}
    argv = tiny("performer_mixit.yaml", songs, tmp_path, **keys)
    interrupted(recipe.main, recipe.Separation, argv, monkeypatch, stop_at=6)
    recipe.main(argv)
    metrics = read_results(tmp_path)[2]
    assert metrics["steps"] == 6
    # the sixth step was not saved, and is taken twice
    assert metrics["epoch_seconds"] >= 0.6
    assert metrics["waiting_for_data_seconds"] >= 0.6


def test_kill_in_a_validation_costs_nothing(
    songs, tmp_path, monkeypatch, quick
):
    end = recipe.Separation.end_epoch
    argv = tiny(
        "performer_mixit.yaml",
        songs,
        tmp_path,
        number_of_epochs=2,
        ckpt_interval_minutes=0,
        ckpt_interval_steps=6,
    )
    for last in (1, 2):

        def end_epoch(brain, valid_loss, seconds, epoch, last=last):
            if epoch == last:
                raise Killed
            end(brain, valid_loss, seconds, epoch)

        with monkeypatch.context() as context, pytest.raises(Killed):
            context.setattr(recipe.Separation, "end_epoch", end_epoch)
            recipe.main(argv)
    recipe.main(argv)
    metrics = read_results(tmp_path)[2]
    assert [x["epoch"] for x in metrics["history"]] == [1, 2]
    assert metrics["steps"] == 12


def test_fewer_epochs_do_not_end_a_training_by_themselves(
    songs, tmp_path, monkeypatch, quick
):
    """What was not judged in the warm-up of many epochs is no failure."""
    argv = tiny("performer_mixit_mae.yaml", songs, tmp_path)
    argv += ["--pretrained_encoder=null", "--early_stop_epochs=2"]
    longer = [*argv, "--number_of_epochs=40"]
    # 6 steps an epoch, and 4 epochs of warm-up
    interrupted(recipe.main, recipe.Separation, longer, monkeypatch, stop_at=20)
    recipe.main([*argv, "--number_of_epochs=5", "--allow_changes=True"])
    assert len(read_results(tmp_path)[2]["history"]) >= 4


def test_another_number_of_processes_is_said(songs, begun, quick):
    (path,) = (begun / "save").glob("CKPT*/brain.ckpt")
    text = path.read_text()
    assert "processes: 1\n" in text
    path.write_text(text.replace("processes: 1\n", "processes: 4\n"))
    more = {"number_of_epochs": 2, "allow_changes": True}
    recipe.main(tiny("performer_mixit.yaml", songs, begun, **more))
    log = (begun / "log.txt").read_text("utf-8")
    assert "begun on 4 processes, now 1: the learning rate follows" in log


def test_longer_patience_goes_on(songs, tmp_path, quick):
    keys = {"number_of_epochs": 3, "allow_changes": True}
    for patience, epochs in ((0, 1), (9, 3)):
        argv = tiny(
            "performer_mixit.yaml",
            songs,
            tmp_path,
            early_stop_epochs=patience,
            **keys,
        )
        recipe.main(argv)
        assert len(read_results(tmp_path)[2]["history"]) == epochs


def test_curves_go_on_after_a_resume(songs, tmp_path, quick):
    for epochs in (1, 3):
        more = {"number_of_epochs": epochs, "allow_changes": True}
        argv = tiny("performer_mixit.yaml", songs, tmp_path, **more)
        recipe.main(argv)
    steps = {"loss/valid": [], "loss/train": [], "lr": []}
    for path in sorted((tmp_path / "tensorboard").glob("events*")):
        events = EventAccumulator(str(path))
        events.Reload()
        for name, found in steps.items():
            found += [event.step for event in events.Scalars(name)]
    assert all(sorted(found) == [1, 2, 3] for found in steps.values()), steps


# --- numbers that are not finite ---------------------------------------------


def test_step_with_gradients_that_are_not_finite_is_skipped(
    songs, tmp_path, monkeypatch, quick
):
    objectives = recipe.Separation.compute_objectives

    def compute_objectives(brain, predictions, batch, stage):
        loss = objectives(brain, predictions, batch, stage)
        bad = stage == sb.Stage.TRAIN and brain.optimizer_step == 2
        return loss * torch.nan if bad else loss

    monkeypatch.setattr(
        recipe.Separation, "compute_objectives", compute_objectives
    )
    recipe.main(tiny("performer_mixit.yaml", songs, tmp_path))
    log = (tmp_path / "log.txt").read_text("utf-8")
    assert "step 3: skipped, its gradients are not finite" in log
    assert log.count("skipped, its") == 1
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    assert np.isfinite(read_results(tmp_path)[2]["si_snri"])


@pytest.mark.parametrize("selection_metric", ["si_snri", "loss"])
def test_weights_that_are_not_finite_are_not_kept(
    selection_metric, songs, tmp_path, monkeypatch, quick
):
    end = recipe.Separation.on_fit_batch_end

    def on_fit_batch_end(brain, *args):
        end(brain, *args)
        if brain.optimizer_step == 12:
            brain.hparams.MaskNet.head.bias.data.fill_(torch.nan)

    monkeypatch.setattr(recipe.Separation, "on_fit_batch_end", on_fit_batch_end)
    argv = tiny(
        "performer_mixit.yaml",
        songs,
        tmp_path,
        number_of_epochs=3,
        loss="{objective: mse}",  # above zero
        selection_metric=selection_metric,
    )
    message = r"epoch 2: the losses of (\d+) of \1 validation items are not fin"
    with pytest.raises(ValueError, match=message):
        recipe.main(argv)
    (checkpoint,) = (tmp_path / "save").glob("CKPT*")
    state = torch.load(checkpoint / "masknet.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in state.values())


def test_redraw_is_the_same_for_equal_seed_and_step(songs, tmp_path, quick):
    for name, interval in (("a", 5), ("b", 5), ("c", 0)):
        recipe.main(
            tiny(
                "performer_mixit.yaml",
                songs,
                tmp_path / name,
                redraw_interval=interval,
            )
        )
    key = "encoder.layers.0.attention.projection"
    a, b, c = (weights(tmp_path / name)[key] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    "more",
    (
        {"precision": "bf16"},
        {"MaskNet": "{checkpointing: True}"},
        {"grad_accumulation_factor": 2, "max_grad_norm": "inf"},
        {"loss": "{objective: mse, assign_by: si_snr}"},
        {"lambda_mask_count": 0.1},
        {"pairs": "{single_stem_share: 0.5, silent_share: 0.5, gain_db: 6}"},
    ),
)
def test_options_train_to_finite_figures(more, songs, tmp_path, quick):
    out = tmp_path / "run"
    recipe.main(tiny("performer_mixit.yaml", songs, out, **more))
    assert torch.get_float32_matmul_precision() == "high"
    _, _, metrics = read_results(out)
    assert np.isfinite(metrics["history"][0]["train_loss"])
    assert all(torch.isfinite(w).all() for w in weights(out).values())


def test_interrupted_run_says_how_to_go_on(monkeypatch, capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        experiments.run(main)
    assert stopped.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_file_that_fails_in_training_is_named_once(tmp_path, caplog, quick):
    songs = write_songs(tmp_path / "songs", num_songs=12)
    broken = songs / "song 3" / "tone.wav"
    sig, _ = soundfile.read(broken)
    sig[len(sig) // 2 :] = np.nan
    soundfile.write(broken, sig, RATE, "FLOAT")
    out = tmp_path / "run"
    recipe.main(tiny("performer_mixit.yaml", songs, out, number_of_epochs=2))
    metrics = read_results(out)[2]
    assert metrics["unreadable_segments"] >= 2
    log = (out / "log.txt").read_text("utf-8")
    named = [
        line for line in log.splitlines() if "segments are skipped" in line
    ]
    assert len(named) == 1
    assert "song 3" in named[0] and "tone.wav" in named[0]


def test_silent_song_is_named(tmp_path, quick):
    songs = write_songs(tmp_path / "songs", num_songs=12)
    for path in (songs / "song 3").glob("*.wav"):
        sig, _ = soundfile.read(path)
        soundfile.write(path, np.zeros_like(sig), RATE)
    out = tmp_path / "run"
    recipe.main(
        tiny("performer_mixit.yaml", songs, out, number_of_epochs=2, seed=1)
    )
    train = (out / "manifests" / "train.jsonl").read_text("utf-8")
    assert "song_3" in train
    log = (out / "log.txt").read_text("utf-8")
    named = [line for line in log.splitlines() if "is silent" in line]
    assert len(named) == 1 and "song_3" in named[0]
    assert all(torch.isfinite(w).all() for w in weights(out).values())


def test_accumulation_beyond_an_epoch_is_refused(songs, tmp_path):
    argv = tiny("performer_mixit.yaml", songs, tmp_path / "run")
    with pytest.raises(
        ValueError, match="grad_accumulation_factor: 12 training"
    ):
        recipe.main([*argv, "--grad_accumulation_factor=16"])


def test_schedule_ends_where_training_does(songs, tmp_path, quick):
    out = tmp_path / "run"
    argv = tiny("performer_mixit.yaml", songs, out, number_of_epochs=2)
    recipe.main([*argv, "--grad_accumulation_factor=4"])
    assert read_results(out)[2]["history"][-1]["lr"] == pytest.approx(1e-5)


def test_more_outputs_than_can_be_grouped(songs, tmp_path, quick):
    out = tmp_path / "run"
    recipe.main([*tiny("performer_mixit.yaml", songs, out, num_spks=13)])
    _, average, metrics = read_results(out)
    assert average["si_snri_grouped"] == ""
    assert np.isfinite(metrics["si_snri"])


def test_debug_leaves_the_results_of_a_training(songs, begun, quick):
    out = begun
    argv = tiny("performer_mixit.yaml", songs, out, allow_changes=True)
    before = (out / "test_results.csv").read_bytes(), weights(out)
    log = (out / "train_log.txt").read_bytes()
    curves = sorted((out / "tensorboard").rglob("*"))
    recipe.main([*argv, "--debug"])
    assert (out / "test_results.csv").read_bytes() == before[0]
    assert (out / "train_log.txt").read_bytes() == log
    assert sorted((out / "tensorboard").rglob("*")) == curves
    assert (out / "debug" / "train_log.txt").read_bytes() not in (b"", log)
    for key, value in weights(out).items():
        assert torch.equal(value, before[1][key])
    assert (out / "debug" / "metrics.json").is_file()


def test_unreadable_test_item_has_an_empty_row(tmp_path, quick):
    music = write_songs(tmp_path / "music")
    stems = write_songs(tmp_path / "stems", num_songs=4, seconds=1.3)
    broken = stems / "song 2" / "tone.wav"
    sig, _ = soundfile.read(broken)
    soundfile.write(broken, np.full_like(sig, np.nan), RATE, "FLOAT")
    out = tmp_path / "run"
    recipe.main(tiny("performer_mixit.yaml", music, out, test_folder=stems))
    rows, average, metrics = read_results(out)
    lost = [row for row in rows if "song_2" in row["id"]]
    for row in lost:
        assert set(row.values()) == {row["id"], ""}
    assert np.isfinite(float(average["si_snri"]))
    # it was a partner as well, whose place another one can take
    assert metrics["unreadable_segments"] > len(lost) > 0
    for row in rows:
        if row not in lost:
            assert row["si_snri"] and row["mixture_si_snr"]


def test_a_test_song_without_a_partner_has_an_empty_row(tmp_path, quick):
    """Alone it would be separated by 120 dB."""
    music = write_songs(tmp_path / "music")
    stems = write_songs(tmp_path / "stems", num_songs=2, seconds=1.3)
    broken = stems / "song 1" / "tone.wav"
    sig, _ = soundfile.read(broken)
    soundfile.write(broken, np.full_like(sig, np.nan), RATE, "FLOAT")
    out = tmp_path / "run"
    recipe.main(tiny("performer_mixit.yaml", music, out, test_folder=stems))
    rows, _, metrics = read_results(out)
    assert {row["mixture_si_snr"] for row in rows} == {""}
    assert metrics["mixit_loss"] is metrics["mixture_si_snr"] is None


def test_ranks_count_unreadable_segments_together(monkeypatch):
    def gather(values, value):
        values[:] = [value, {"b.wav": 2}]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    brain = types.SimpleNamespace(distributed_launch=False)
    assert of_all_ranks(brain, {"a.wav": 1}) == [{"a.wav": 1}]
    brain.distributed_launch = True
    assert of_all_ranks(brain, {"a.wav": 1}) == [{"a.wav": 1}, {"b.wav": 2}]


def test_all_files_failing_stops(tmp_path, quick):
    songs = write_songs(tmp_path / "songs")
    for path in songs.rglob("*.wav"):
        sig, _ = soundfile.read(path)
        sig[::10] = np.nan
        soundfile.write(path, sig, RATE, "FLOAT")
    with pytest.raises(Exception, match=r"song \d"):
        recipe.main(tiny("performer_mixit.yaml", songs, tmp_path / "run"))


@pytest.mark.parametrize(
    ("more", "message"),
    (
        ({"data_folder": "/no/such/folder"}, "folder=/no/such/folder"),
        ({"dataset": "musik"}, "dataset.*demo.*stems.*mixtures.*musik"),
        ({"segment_seconds": 60}, "segment_seconds"),
        ({"learning_rate": 1}, "learning_rate.*hparams"),
        ({"batch_size": 1000}, "batch_size"),
        ({"selection_metric": "sisnri"}, "selection_metric.*si_snri.*sisnri"),
        ({"MaskNet": "{mask_activation: no}"}, "mask_activation.*softmax"),
        ({"MaskNet": "{depth: 1}"}, "PerformerMaskNet.*'depth'"),
        ({"music": "{max_stem: 1}"}, "Music.*'max_stem'"),
        ({"loss": "{objective: sdr}"}, "objective.*snr.*sdr"),
    ),
)
def test_bad_input_is_named(more, message, songs, tmp_path):
    argv = tiny("performer_mixit.yaml", songs, tmp_path / "run")
    argv += [f"--{key}={value}" for key, value in more.items()]
    with pytest.raises(Exception, match=f"(?s){message}"):
        recipe.main(argv)


def test_checkpoint_of_another_architecture(songs, begun):
    before = weights(begun)
    resolved = (begun / "hyperparams.yaml").read_text("utf-8")
    argv = tiny("performer_mixit.yaml", songs, begun, d_model=32)
    with pytest.raises(ValueError, match=r"other sizes.*output_folder"):
        recipe.main(argv)
    assert weights(begun).keys() == before.keys()
    # the refused run has not written over the first one's settings
    assert (begun / "hyperparams.yaml").read_text("utf-8") == resolved


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("lr=0.5", r"lr was .*, now 0\.5"),
        ("max_grad_norm=1", "max_grad_norm was 5.0, now 1.0"),
        ("pairs={gain_db: 3}", r"pairs\.gain_db was None, now 3"),
    ],
)
def test_other_settings_need_a_word(option, message, songs, begun, quick):
    argv = tiny("performer_mixit.yaml", songs, begun, lr="1e-4")
    with pytest.raises(ValueError, match=message):
        recipe.main([*argv, f"--{option}"])
    argv += ["--number_of_epochs=2", "--allow_changes=True"]
    recipe.main([*argv, f"--{option}"])
    assert len(read_results(begun)[2]["history"]) == 2


def test_test_only_needs_a_checkpoint(songs, tmp_path):
    out = tmp_path / "run"
    argv = [*tiny("performer_mixit.yaml", songs, out), "--test_only"]
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        recipe.main(argv)


def test_wrong_path_exits_with_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "train.py")]
    result = subprocess.run(
        [*command, "hparams/no_such.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "no hyperparameter file hparams/no_such.yaml" in result.stderr
    assert "Traceback" not in result.stderr


def test_ddp_step_equals_joined_batch(songs, tmp_path):
    torchrun(ROOT / "tests" / "ddp_step.py", tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    single = ddp_step.one_step(tmp_path / "single", ddp_step.mixtures())
    assert single["gradient"].keys() == ranks[0]["gradient"].keys()
    for part in ("weights", "gradient"):
        for key, value in single[part].items():
            assert torch.equal(ranks[0][part][key], ranks[1][part][key]), key
            torch.testing.assert_close(
                ranks[0][part][key], value, atol=1e-5, rtol=1e-4, msg=key
            )
    moved = [
        not torch.equal(single["weights"][key], single["before"][key])
        for key in single["gradient"]
    ]
    assert all(moved)


def test_a_step_builds_its_sources_once(tmp_path, monkeypatch):
    calls = []
    for module in (STFTEncoder, PerformerMaskNet, STFTDecoder):

        def spy(self, x, *args, forward=module.forward):
            calls.append((type(self).__name__, list(x.shape)))
            return forward(self, x, *args)

        monkeypatch.setattr(module, "forward", spy)
    ddp_step.one_step(tmp_path, ddp_step.mixtures())
    assert calls == [
        ("STFTEncoder", [4, 2000]),
        ("PerformerMaskNet", [4, 65, 63]),
        ("STFTDecoder", [3 * 4, 65, 63]),
    ]


def test_order_of_all_ranks_goes_by_the_seed(songs, tmp_path):
    def order(seed):
        out = tmp_path / f"run {seed}"
        argv = tiny("performer_mixit.yaml", songs, out, seed=seed)
        experiment = load_experiment(argv, recipe.Separation.selection_metrics)
        prepare_data(experiment.hparams)
        pathlib.Path(out).mkdir(exist_ok=True)
        options = recipe.Separation(experiment).train_options
        assert "shuffle" not in options
        # as SpeechBrain shares a sampler among ranks
        ranks = [
            DistributedSamplerWrapper(
                options["sampler"], num_replicas=2, rank=x, shuffle=False
            )
            for x in range(2)
        ]
        return list(map(list, ranks)), len(options["sampler"])

    (one, other), length = order(1)
    assert sorted({*one, *other}) == list(range(length))
    assert order(1)[0] == [one, other]
    assert order(2)[0] != [one, other]


@pytest.mark.slow
def test_torchrun_trains(songs, tmp_path):
    argv = tiny("performer_mixit.yaml", songs, tmp_path / "run")
    argv = [word for word in argv if word != "--noprogressbar=True"]
    torchrun(
        ROOT / "recipes" / "train.py",
        *argv,
        "--distributed_backend=gloo",
    )
    rows, average, _ = read_results(tmp_path / "run")
    assert rows and np.isfinite(float(average["si_snri"]))
    assert (tmp_path / "run" / "separator" / "config.json").is_file()


@pytest.mark.slow
def test_demo_from_song_to_report(tmp_path, monkeypatch):
    """What `make demo` runs, with two steps of a small model."""
    out, excerpt = tmp_path / "demo", tmp_path / "excerpt"

    def run(script, *words):
        with monkeypatch.context() as context:
            context.setattr(sys, "argv", [script, *map(str, words)])
            runpy.run_path(str(ROOT / script), run_name="__main__")

    song = str(ROOT / "examples" / "waterworks.ogg")
    words = ("--figure", "--out", str(excerpt))
    assert cli.main(["separate", song, *words]) == 0
    argv = [
        str(ROOT / "hparams" / "demo.yaml"),
        f"--output_folder={out}",
        "--optimizer_step_limit=2",
        "--device=cpu",
        # one segment of each song
        "--music={segment_hop_seconds: 24}",
        *("--num_layers=1", "--d_model=16", "--n_features=16"),
        *("--num_workers=0", "--noprogressbar"),
    ]
    recipe.main(argv)
    mix = out / "example" / "mix.wav"
    run("benchmarks/demo_example.py", out)
    words = ("--model", out / "separator", "--out", mix.parent)
    assert cli.main(["separate", *map(str, (mix, *words))]) == 0
    with contextlib.redirect_stdout(io.StringIO()) as report:
        run("benchmarks/demo_report.py", out, excerpt)
    named = report.getvalue().split()
    names = ("figure.png", "drums.wav", "bass.wav", "vocals.wav", "other.wav")
    for path in [
        *(excerpt / f"waterworks_{name}" for name in names),
        *(out / "figures").glob("*.png"),
    ]:
        assert path.is_file() and str(path) in named
    sig, rate = soundfile.read(mix)
    assert rate == 22050
    sources = [
        soundfile.read(path)[0] for path in mix.parent.glob("mix_source*.wav")
    ]
    assert len(sources) == 8
    error = np.square(sum(sources) - sig).sum() / np.square(sig).sum()
    assert 10 * np.log10(error + 1e-20) < -80
    songs = [
        {line["song"] for line in read_songs(out / "manifests", name)}
        for name in ("train", "test")
    ]
    assert songs[0].isdisjoint(songs[1])


@pytest.mark.slow
def test_compiled_training(songs, tmp_path, quick):
    out = tmp_path / "run"
    recipe.main([*tiny("performer_mixit.yaml", songs, out), "--compile"])
    keys = weights(out).keys()
    assert not any("_orig_mod" in key for key in keys)


def test_readme_and_yaml_headers_name_existing_files():
    text = (ROOT / "README.md").read_text("utf-8")
    text += "".join(
        (ROOT / "hparams" / name).read_text("utf-8")
        for name in SEPARATION_YAMLS
    )
    folders = "recipes|hparams|benchmarks"
    for name in set(re.findall(rf"\b(?:{folders})/\w+\.\w+", text)):
        assert (ROOT / name).is_file(), name


def test_run_is_listed_in_the_resolved_yaml(trained):
    text = (trained / "hyperparams.yaml").read_text("utf-8")
    plain = re.sub(r"!\w+:\S+|!ref|!apply:\S+|!new:\S+", "", text)
    assert yaml.safe_load(plain)["num_spks"] == 3
