"""The training recipe with every yaml, as a user runs it."""

import contextlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys

import ddp_step
import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from recipe_runs import (
    RATE,
    ROOT,
    Killed,
    apart,
    interrupted,
    load_recipe,
    read_results,
    tiny,
    torchrun,
    unused_keys,
    without_pictures,
    write_songs,
)
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

from trackformer_sb import cli
from trackformer_sb.data.manifest import read_songs
from trackformer_sb.inference.separator import Separator

SEPARATION_YAMLS = (
    "performer_mixit.yaml",
    "performer_mixit_mae.yaml",
    "demo.yaml",
    "convtasnet_mixit.yaml",
    "asteroid_convtasnet_mixit.yaml",
)
PRETRAINING_YAMLS = ("audio_mae.yaml", "audio_mae_blocks.yaml")

EVERY_STEP = {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 1}

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


def run(songs, out, **more):
    """Trains, and reads what it left."""
    recipe.main(tiny("performer_mixit.yaml", songs, out, **more))
    return read_results(out)


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
    else:
        # the others are quick
        for name in ("training_curves", "test_item"):
            path = out / "figures" / f"{name}.png"
            assert path.stat().st_size > 10_000
    for name in ("train_log.txt", "hyperparams.yaml", "log.txt"):
        assert (out / name).stat().st_size > 0, name
    assert len(list((out / "save").glob("CKPT*"))) == 1
    assert list((out / "tensorboard").glob("events*"))
    rows, average, metrics = read_results(out)
    assert average["id"] == "avg"
    assert list(average) == ["id", *recipe.COLUMNS]
    for name in recipe.COLUMNS:
        if name == "pesq":  # tones and noise are no vocals
            assert {row[name] for row in (*rows, average)} == {""}
            continue
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


@pytest.mark.parametrize("yaml_name", (*SEPARATION_YAMLS, *PRETRAINING_YAMLS))
def test_every_key_is_used(yaml_name):
    name = "pretrain" if yaml_name in PRETRAINING_YAMLS else "train"
    assert unused_keys(yaml_name, f"recipes/{name}.py") == []


def test_songs_without_stems_leave_stem_columns_empty(tmp_path, quick):
    songs = write_songs(tmp_path / "music", stems=False)
    rows, average, metrics = run(songs, tmp_path / "run", dataset="mixtures")
    for row in (*rows, average):
        assert row["si_snri"] == row["sdr"] == row["si_snr"] == ""
        assert row["si_sdr"] == ""
        assert np.isfinite(float(row["mixture_si_snr"]))
    assert metrics["si_snri"] is None


def test_test_songs_have_pesq_of_their_vocals(tmp_path, monkeypatch, quick):
    pytest.importorskip("pesq")
    songs, heard = write_songs(tmp_path / "songs"), []
    for path in songs.glob("*/tone.wav"):
        path.rename(path.with_name("lead_vocals.wav"))
        path.with_name("noise.wav").rename(path.with_name("vocals_2.wav"))
    monkeypatch.setattr(
        recipe.metrics, "pesq", lambda *args: heard.append(args) or 2.5
    )
    rows, average, metrics = run(songs, tmp_path / "run")
    assert [row["pesq"] for row in rows] == ["2.5"] * len(rows)
    assert float(average["pesq"]) == metrics["pesq"] == 2.5
    est_source, vocals, rate = heard[0]
    assert (len(est_source), vocals.ndim, rate) == (3, 1, RATE)


def test_training_lowers_the_loss(songs, tmp_path, quick):
    keys = {"number_of_epochs": 8, "lr": 0.01, "dropout": 0.0}
    metrics = run(songs, tmp_path, **keys)[2]
    history = metrics["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 1.0
    series = [row["train_mixture_si_snr"] for row in history]
    assert series[-1] > series[0] + 1.0
    assert metrics["train_mixture_si_snr"] in series
    text = (tmp_path / "train_log.txt").read_text()
    assert "train mixture_si_snr: " in text


def weights(out):
    return Separator.from_pretrained(out / "separator").masknet.state_dict()


@pytest.mark.parametrize(("batches_per_step", "stop_at"), [(1, 8), (2, 5)])
def test_resumed_run_equals_uninterrupted_one(
    batches_per_step, stop_at, songs, tmp_path, monkeypatch, quick
):
    # 3 songs of 4 segments in batches of 2: 6 batches an epoch
    keys = {"number_of_epochs": 2, "dropout": 0.3, "redraw_interval": 3}
    keys |= {"grad_accumulation_factor": batches_per_step, **EVERY_STEP}
    run(songs, tmp_path / "whole", **keys)
    cut = tiny("performer_mixit.yaml", songs, tmp_path / "cut", **keys)
    interrupted(
        recipe.main, recipe.Separation, cut, monkeypatch, stop_at=stop_at
    )
    recipe.main(cut)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for key in whole:
        torch.testing.assert_close(cut[key], whole[key], msg=key)
    history = read_results(tmp_path / "cut")[2]["history"]
    assert len(history) == 2
    # where the training ends the schedule does
    assert history[-1]["lr"] == pytest.approx(1e-5)


def test_kill_in_a_validation_costs_nothing(
    songs, tmp_path, monkeypatch, quick
):
    argv = tiny("performer_mixit.yaml", songs, tmp_path, **EVERY_STEP)

    def killed(*args):
        raise Killed

    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(recipe.Separation, "end_epoch", killed)
        recipe.main(argv)
    recipe.main(argv)
    metrics = read_results(tmp_path)[2]
    assert [x["epoch"] for x in metrics["history"]] == [1]
    assert metrics["steps"] == 6


def test_longer_patience_goes_on(songs, tmp_path, quick):
    keys = {"number_of_epochs": 3, "allow_changes": True}
    for patience, epochs in ((0, 1), (9, 3)):
        metrics = run(songs, tmp_path, early_stop_epochs=patience, **keys)[2]
        assert len(metrics["history"]) == epochs
    # and so do the curves
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
    metrics = run(songs, tmp_path)[2]
    log = (tmp_path / "log.txt").read_text("utf-8")
    assert "step 3: skipped, its gradients are not finite" in log
    assert log.count("skipped, its") == 1
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    assert np.isfinite(metrics["si_snri"])


def test_weights_that_are_not_finite_are_not_kept(
    songs, tmp_path, monkeypatch, quick
):
    end = recipe.Separation.on_fit_batch_end

    def on_fit_batch_end(brain, *args):
        end(brain, *args)
        if brain.optimizer_step == 12:
            brain.hparams.MaskNet.head.bias.data.fill_(torch.nan)

    monkeypatch.setattr(recipe.Separation, "on_fit_batch_end", on_fit_batch_end)
    # a loss above zero
    keys = {"loss": "{objective: mse}", "selection_metric": "loss"}
    message = r"epoch 2: the losses of (\d+) of \1 validation items are not fin"
    with pytest.raises(ValueError, match=message):
        run(songs, tmp_path, number_of_epochs=3, **keys)
    (checkpoint,) = (tmp_path / "save").glob("CKPT*")
    state = torch.load(checkpoint / "masknet.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize(
    "more",
    (
        {"precision": "bf16", "MaskNet": "{checkpointing: True}"},
        {
            "grad_accumulation_factor": 2,
            "max_grad_norm": "inf",
            "loss": "{objective: mse, assign_by: si_snr}",
            "lambda_mask_count": 0.1,
            "pairs": "{single_stem_share: 0.5, silent_share: 0.5, gain_db: 6}",
        },
    ),
)
def test_options_train_to_finite_figures(more, songs, tmp_path, quick):
    metrics = run(songs, tmp_path, **more)[2]
    assert torch.get_float32_matmul_precision() == "high"
    assert np.isfinite(metrics["history"][0]["train_loss"])
    assert all(torch.isfinite(w).all() for w in weights(tmp_path).values())


def damaged(folder, number, **options):
    """Songs, of which one has no number in it."""
    stems = write_songs(folder, seconds=1.3, **options)
    broken = stems / f"song {number}" / "tone.wav"
    sig, _ = soundfile.read(broken)
    soundfile.write(broken, np.full_like(sig, np.nan), RATE, "FLOAT")
    return stems


def test_file_that_fails_in_training_is_named_once(tmp_path, quick):
    songs = damaged(tmp_path / "songs", 3, num_songs=12)
    metrics = run(songs, tmp_path / "run", number_of_epochs=2)[2]
    assert metrics["unreadable_segments"] >= 2
    log = (tmp_path / "run" / "log.txt").read_text("utf-8").splitlines()
    (line,) = [line for line in log if "segments are skipped" in line]
    assert "song 3" in line and "tone.wav" in line


def test_debug_leaves_the_results_of_a_training(songs, begun, quick):
    def contents():
        return {
            path: path.read_bytes()
            for name in ("*.csv", "train_log.txt", "separator/*.s*", "tens*/*")
            for path in begun.glob(name)
        }

    before = contents()
    assert len(before) > 3
    run_debug = tiny("performer_mixit.yaml", songs, begun, allow_changes=True)
    recipe.main([*run_debug, "--debug"])
    assert contents() == before
    assert (begun / "debug" / "metrics.json").is_file()


def test_unreadable_test_item_has_an_empty_row(songs, tmp_path, quick):
    stems = damaged(tmp_path / "stems", 2, num_songs=4)
    rows, average, metrics = run(songs, tmp_path / "run", test_folder=stems)
    lost = [row for row in rows if "song_2" in row["id"]]
    for row in lost:
        assert set(row.values()) == {row["id"], ""}
    assert np.isfinite(float(average["si_snri"]))
    # it was a partner as well, whose place another one can take
    assert metrics["unreadable_segments"] > len(lost) > 0
    for row in rows:
        if row not in lost:
            assert row["si_snri"] and row["mixture_si_snr"]


def test_a_test_song_without_a_partner_has_an_empty_row(songs, tmp_path, quick):
    """Alone it would be separated by 120 dB."""
    stems = damaged(tmp_path / "stems", 1, num_songs=2)
    rows, _, metrics = run(songs, tmp_path / "run", test_folder=stems)
    assert {row["mixture_si_snr"] for row in rows} == {""}
    assert metrics["mixit_loss"] is metrics["mixture_si_snr"] is None


@pytest.mark.parametrize(
    ("more", "message"),
    (
        ({"data_folder": "/no/such/folder"}, "folder=/no/such/folder"),
        ({"segment_seconds": 60}, "segment_seconds"),
        ({"grad_accumulation_factor": 16}, "accumulation_factor: 12 training"),
        ({"selection_metric": "sisnri"}, "selection_metric.*si_snri.*sisnri"),
        ({"MaskNet": "{depth: 1}"}, "PerformerMaskNet.*'depth'"),
        ({"test_only": True}, "no checkpoint of a finished epoch"),
    ),
)
def test_bad_input_is_named(more, message, songs, tmp_path):
    argv = tiny("performer_mixit.yaml", songs, tmp_path / "run")
    argv += [f"--{key}={value}" for key, value in more.items()]
    with pytest.raises(Exception, match=f"(?s){message}"):
        recipe.main(argv)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("pairs={gain_db: 3}", r"pairs\.gain_db was None, now 3"),
        ("d_model=32", r"d_model was 16, now 32"),
    ],
)
def test_other_settings_need_a_word(option, message, songs, begun, quick):
    argv = tiny("performer_mixit.yaml", songs, begun, lr="1e-4")
    resolved = (begun / "hyperparams.yaml").read_text("utf-8")
    with pytest.raises(ValueError, match=message):
        recipe.main([*argv, f"--{option}"])
    # the refused run has not written over the first one's settings
    assert (begun / "hyperparams.yaml").read_text("utf-8") == resolved
    if "d_model" in option:
        return
    argv += ["--number_of_epochs=2", "--allow_changes=True"]
    recipe.main([*argv, f"--{option}"])
    assert len(read_results(begun)[2]["history"]) == 2


def test_second_run_in_a_folder_is_refused(songs, begun, monkeypatch):
    argv = tiny("performer_mixit.yaml", songs, begun)
    message = f"in use by process {os.getpid()} on"

    def meanwhile(experiment):
        with pytest.raises(FileExistsError, match=message):
            recipe.main([*argv, "--seed=2"])
        raise Killed

    monkeypatch.setattr(recipe, "train", meanwhile)
    with pytest.raises(Killed):
        recipe.main(argv)


def test_songs_decide_and_not_where_they_lie(songs, begun, tmp_path, quick):
    moved = shutil.copytree(
        songs, tmp_path / "moved", copy_function=shutil.copy
    )
    run(moved, begun, number_of_epochs=2)
    lines = read_songs(begun / "manifests", "train")
    paths = [path for line in lines for path in line["tracks"].values()]
    assert paths and all(path.startswith(f"{moved}/") for path in paths)
    shutil.move(moved / "song 3", moved / "song x")
    message = r"other songs: \d are gone, .*song_3; expected the same"
    with pytest.raises(ValueError, match=message):
        run(moved, begun, number_of_epochs=2)
    metrics = run(moved, begun, number_of_epochs=3, allow_changes=True)[2]
    assert len(metrics["history"]) == 3


def test_wrong_path_exits_with_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "train.py")]
    result = subprocess.run(
        [*command, "hparams/no_such.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    words = "No such file or directory: 'hparams/no_such.yaml'"
    assert result.stderr.endswith(f"{words}\n")
    assert "Traceback" not in result.stderr


def test_a_run_needs_no_console_and_starts_quietly(songs, tmp_path):
    argv = tiny("performer_mixit.yaml", songs, tmp_path, debug=True)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "train.py"), *argv],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "debug" / "separator" / "config.json").is_file()
    log = (tmp_path / "debug" / "log.txt").read_text("utf-8")
    assert "DEBUG - Run option max_grad_norm from hparams" in log


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

    def execute(script, *words):
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
    execute("benchmarks/demo_example.py", out)
    words = ("--model", out / "separator", "--out", mix.parent)
    assert cli.main(["separate", *map(str, (mix, *words))]) == 0
    with contextlib.redirect_stdout(io.StringIO()) as report:
        execute("benchmarks/demo_report.py", out, excerpt)
    named = report.getvalue().split()
    names = ("figure.png", "drums.wav", "bass.wav", "vocals.wav", "other.wav")
    paths = [excerpt / f"waterworks_{name}" for name in names]
    for path in (*paths, *(out / "figures").glob("*.png")):
        assert path.is_file() and str(path) in named
    sig, rate = soundfile.read(mix)
    assert rate == 22050
    sources = [
        soundfile.read(path)[0] for path in mix.parent.glob("mix_source*.wav")
    ]
    assert len(sources) == 8
    error = np.square(sum(sources) - sig).sum() / np.square(sig).sum()
    assert 10 * np.log10(error + 1e-20) < -80
    train, test = (
        {line["song"] for line in read_songs(out / "manifests", name)}
        for name in ("train", "test")
    )
    assert train.isdisjoint(test)


@pytest.mark.slow
def test_compiled_training(songs, tmp_path, quick):
    run(songs, tmp_path, compile=True)
    keys = weights(tmp_path).keys()
    assert not any("_orig_mod" in key for key in keys)


def test_readme_and_yaml_headers_name_existing_files():
    text = (ROOT / "README.md").read_text("utf-8")
    for path in (ROOT / "hparams").iterdir():
        text += path.read_text("utf-8")
    folders = "recipes|hparams|benchmarks"
    for name in set(re.findall(rf"\b(?:{folders})/\w+\.\w+", text)):
        assert (ROOT / name).is_file(), name
