"""The pre-training recipe as a user runs it, and separators that use it."""

import shutil
from itertools import pairwise

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
    without_pictures,
    write_songs,
)

from trackformer_sb.data.manifest import read_songs
from trackformer_sb.inference.features import PerformerFeatures, encoder_of
from trackformer_sb.training.experiment import load_hparams

PRETRAINING_YAMLS = ("audio_mae.yaml", "audio_mae_blocks.yaml")

recipe = load_recipe("pretrain")
train = load_recipe("train")


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """7 finished mixtures: 3 to train on, of 4 segments each."""
    return write_songs(tmp_path_factory.mktemp("music"), stems=False)


@pytest.fixture(scope="module")
def pretrained(songs, tmp_path_factory):
    """The results of a pre-training."""
    out = tmp_path_factory.mktemp("results") / "audio_mae"
    with apart():
        recipe.main(pretraining(songs, out))
    return out


@pytest.fixture
def encoder(pretrained, tmp_path):
    """A copy of its encoder, to be damaged."""
    return shutil.copytree(pretrained / "encoder", tmp_path / "encoder")


@pytest.fixture
def earlier(tmp_path):
    """What an earlier training left in the output folder."""

    def contents():
        files = [path for path in out.rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in files}

    out = tmp_path / "run"
    out.mkdir()
    for name in ("hyperparams.yaml", "log.txt", "metrics.json"):
        (out / name).write_text("of an earlier run")
    before = contents()
    yield out
    assert contents() == before


@pytest.fixture
def quick(monkeypatch):
    """Runs without what takes most of them."""
    without_pictures(monkeypatch, recipe.Pretraining, train.Separation)


def pretraining(songs, out, mae="", **more):
    """A command line; 6 steps an epoch."""
    more = {"dataset": "mixtures", **more}
    more["AudioMAE"] = f"{{d_decoder: 16, decoder_nhead: 2, {mae}}}"
    return tiny("audio_mae.yaml", songs, out, **more)


def separation(songs, out, source, **more):
    """A command line that starts from an encoder; 6 steps an epoch."""
    more = {"dataset": "mixtures", "pretrained_encoder": source, **more}
    return tiny("performer_mixit_mae.yaml", songs, out, **more)


def encoder_weights(out):
    folder = out / "encoder"
    return PerformerFeatures.from_pretrained(folder).encoder.state_dict()


# --- pre-training ------------------------------------------------------------


def test_run_leaves_all_results(pretrained):
    for name in ("train_log.txt", "hyperparams.yaml", "env.log", "log.txt"):
        assert (pretrained / name).stat().st_size > 0, name
    for name in ("training_curves", "reconstruction"):
        path = pretrained / "figures" / f"{name}.png"
        assert path.stat().st_size > 10_000
    rows, average, metrics = read_results(pretrained)
    # 2 songs of 4 segments
    assert len(rows) == metrics["test_items"] == 8
    assert list(average) == ["id", "reconstruction_loss", "explained_variance"]
    for name in recipe.COLUMNS:
        values = [float(row[name]) for row in rows]
        assert metrics[name] == pytest.approx(np.mean(values))
    assert metrics["test_loss"] == pytest.approx(metrics["reconstruction_loss"])
    assert metrics["step_seconds"] < metrics["epoch_seconds"]
    assert metrics["batches"] == metrics["steps"] == 6


def test_encoder_folder_is_the_trained_encoder(pretrained):
    (checkpoint,) = (pretrained / "save").glob("CKPT*")
    mae = torch.load(checkpoint / "mae.ckpt", weights_only=True)
    for key, value in encoder_weights(pretrained).items():
        assert torch.equal(value, mae[f"features.{key}"]), key
    card = (pretrained / "encoder" / "README.md").read_text("utf-8")
    assert "| hidden | 30 % in spans of 1 frames (noise) |" in card
    assert "| explained_variance | " in card


@pytest.fixture
def batches(monkeypatch):
    """What is trained on and evaluated, as dictionaries."""
    found = []
    forward = recipe.Pretraining.compute_forward

    def compute_forward(brain, batch, stage):
        inputs = []
        hook = brain.modules.stft.register_forward_pre_hook(
            lambda module, args: inputs.append(args[0])
        )
        result = forward(brain, batch, stage)
        hook.remove()
        epoch = brain.hparams.epoch_counter.current
        found.append({"stage": stage, "epoch": epoch, "result": result})
        found[-1] |= {"ids": list(batch.id), "input": inputs[0]}
        found[-1]["mixtures"] = batch.mixtures.data
        return result

    monkeypatch.setattr(recipe.Pretraining, "compute_forward", compute_forward)
    return found


@pytest.mark.parametrize("silent_share", (1.0, 0.0))
def test_trains_on_songs_or_on_sums(
    silent_share, songs, tmp_path, batches, quick
):
    pairs = f"{{silent_share: {silent_share}}}"
    recipe.main(pretraining(songs, tmp_path, pairs=pairs))
    assert {batch["stage"] for batch in batches} == {*sb.Stage}
    for batch in batches:
        first, second = batch["mixtures"].unbind(1)
        assert first.any()
        if silent_share:
            # in evaluation there is a partner, left out
            assert torch.equal(batch["input"], first)
            assert second.any() == (batch["stage"] != sb.Stage.TRAIN)
        else:
            assert second.any()
            assert torch.equal(batch["input"], first + second)


def test_evaluation_is_of_what_is_hidden_the_same_in_each_epoch(
    songs, tmp_path, batches, quick
):
    more = {"number_of_epochs": 2}
    recipe.main(pretraining(songs, tmp_path, "visible_weight: 0.5", **more))
    train, valid, test = (
        [batch["result"] for batch in batches if batch["stage"] == stage]
        for stage in sb.Stage
    )
    masks = [result.hidden for result in valid]
    half = len(masks) // 2
    for one, other in zip(masks[:half], masks[half:]):
        assert torch.equal(one, other)
    assert not torch.equal(masks[0], masks[1])
    # in training nothing is hidden twice
    items = [item for result in train for item in result.hidden]
    assert len({tuple(x[:, 0].tolist()) for x in items}) == len(items) == 24
    rows, _, metrics = read_results(tmp_path)
    for row, result in zip(rows, test, strict=True):
        _, prediction, target, hidden = result
        error = (prediction - target)[hidden].square().mean().item()
        assert float(row["reconstruction_loss"]) == pytest.approx(error)
        explained = 1 - error / target[hidden].var().item()
        assert float(row["explained_variance"]) == pytest.approx(explained)
    assert metrics["test_loss"] != pytest.approx(metrics["reconstruction_loss"])


def test_epoch_has_as_many_segments_as_asked_for(
    songs, tmp_path, batches, quick
):
    options = {"number_of_epochs": 2, "epoch_segments": 5}
    recipe.main(pretraining(songs, tmp_path, **options))
    epochs = [[], []]
    for batch in batches:
        if batch["stage"] == sb.Stage.TRAIN:
            epochs[batch["epoch"] - 1] += batch["ids"]
    for names in epochs:
        # none twice; what does not fill a batch is left out
        assert len(names) == len(set(names)) == 4
    # another set in each epoch
    assert {*epochs[0]} != {*epochs[1]}
    metrics = read_results(tmp_path)[2]
    assert metrics["batches"] == 2 and metrics["steps"] == 4


def test_resumed_run_equals_uninterrupted_one(
    songs, tmp_path, monkeypatch, quick
):
    # 4 steps an epoch
    keys = {"number_of_epochs": 2, "epoch_segments": 8, "redraw_interval": 3}
    keys |= {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 1}
    recipe.main(pretraining(songs, tmp_path / "whole", **keys))
    cut = pretraining(songs, tmp_path / "cut", **keys)
    interrupted(recipe.main, recipe.Pretraining, cut, monkeypatch, stop_at=6)
    recipe.main(cut)
    whole, cut = (encoder_weights(tmp_path / name) for name in ("whole", "cut"))
    for key in whole:
        torch.testing.assert_close(cut[key], whole[key], msg=key)


@pytest.mark.parametrize(
    ("mae", "more", "message"),
    (
        # 0.3 s at 8 kHz and hop 32
        ("mask_span: 76", {}, "mask_span: .* at least 76 frames, got 75"),
        ("", {"selection_metric": "si_snri"}, "explained_variance, loss, got"),
    ),
)
def test_bad_settings_leave_an_earlier_run_alone(
    mae, more, message, songs, earlier
):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        recipe.main(pretraining(songs, earlier, mae, **more))


def test_silent_songs_among_others_are_no_harm(tmp_path, quick):
    songs = write_songs(tmp_path / "music", num_songs=9, stems=False)
    for number in range(3):
        # equal files would be one song
        silence = np.zeros(RATE + number)
        soundfile.write(songs / f"{number}.wav", silence, RATE)
    recipe.main(pretraining(songs, tmp_path))
    rows, average, _ = read_results(tmp_path)
    for row in (*rows, average):
        assert np.isfinite(float(row["reconstruction_loss"]))
        # of silence there is no variance to explain
        silent = row["explained_variance"] == ""
        assert silent or np.isfinite(float(row["explained_variance"]))


# --- yamls -------------------------------------------------------------------


@pytest.mark.parametrize("yaml_name", PRETRAINING_YAMLS)
def test_encoder_and_separator_agree(yaml_name):
    encoder = load_hparams(ROOT / "hparams" / yaml_name)
    separator = load_hparams(ROOT / "hparams" / "performer_mixit_mae.yaml")
    # the same songs are held back: a separator is not tested on music that
    # its encoder has heard
    data = ("seed", "data_folder", "dataset", "test_folder", "segment_seconds")
    for key in (*data, "sample_rate", "n_fft", "hop_length", "dropout"):
        assert encoder[key] == separator[key], key
    assert vars(encoder["music"]).keys() == vars(separator["music"]).keys()
    assert encoder["Features"].spec_norm == separator["MaskNet"].spec_norm
    state = encoder["Features"].state_dict()
    expected = encoder_of(separator["MaskNet"]).state_dict()
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in expected.items()
    }


# --- separators from a pre-trained encoder -----------------------------------


def first_steps(monkeypatch, count, argv):
    """The masknet's weights before the first step and after each."""
    states = []

    def keep(brain):
        state = brain.hparams.MaskNet.state_dict()
        states.append({k: v.clone() for k, v in state.items()})
        if len(states) > count:
            raise Killed

    start = train.Separation.on_fit_batch_start
    end = train.Separation.on_fit_batch_end

    def on_fit_batch_start(brain, *args):
        start(brain, *args)
        if not states:
            keep(brain)

    def on_fit_batch_end(brain, *args):
        end(brain, *args)
        keep(brain)

    with monkeypatch.context() as context, pytest.raises(Killed):
        for method in (on_fit_batch_start, on_fit_batch_end):
            context.setattr(train.Separation, method.__name__, method)
        train.main(argv)
    return states


def test_separator_starts_from_exactly_these_weights(
    pretrained, songs, tmp_path, monkeypatch, quick
):
    argv = separation(songs, tmp_path, pretrained / "encoder")
    (start,) = first_steps(monkeypatch, 0, argv)
    state = encoder_weights(pretrained)
    assert start.keys() - state.keys() == {"head.weight", "head.bias"}
    for key, value in state.items():
        assert torch.equal(start[key], value), key
    # the same songs are held back, see test_encoder_and_separator_agree
    for split in ("train", "valid", "test"):
        name = f"manifests/{split}.jsonl"
        lines = (tmp_path / name).read_text("utf-8")
        assert lines == (pretrained / name).read_text("utf-8") != ""
    log = (tmp_path / "log.txt").read_text("utf-8")
    (line,) = [x for x in log.splitlines() if str(pretrained) in x]
    assert all(key in line for key in state)


def test_frozen_encoder_waits_for_the_head(
    pretrained, songs, tmp_path, monkeypatch, quick
):
    # half of the steps
    more = {"fine_tuning": "{freeze_steps: 0.5}", "lr": 0.01}
    argv = separation(songs, tmp_path, pretrained / "encoder", **more)
    states = first_steps(monkeypatch, 5, argv)
    for key in states[0]:
        moved = [
            not torch.equal(before[key], after[key])
            for before, after in pairwise(states)
        ]
        if "projection" in key:
            # random features, not trained
            assert not any(moved)
        elif key.startswith("head"):
            assert all(moved)
        else:
            assert moved == [False] * 3 + [True] * 2, key


@pytest.mark.parametrize("seed", (1234, 1))
def test_test_songs_that_the_encoder_knows_are_counted(
    seed, pretrained, songs, tmp_path, quick
):
    train.main(separation(songs, tmp_path, pretrained / "encoder", seed=seed))
    heard = {
        line["song"]
        for name in ("train", "valid")
        for line in read_songs(pretrained / "manifests", name)
    }
    tested = read_songs(tmp_path / "manifests", "test")
    known = heard & {line["song"] for line in tested}
    # one seed is that of the pre-training, which splits the songs alike
    assert bool(known) == (seed != 1234)
    metrics = read_results(tmp_path)[2]
    assert metrics["test_songs_pretrained_on"] == len(known)
    log = (tmp_path / "log.txt").read_text("utf-8")
    named = [x for x in log.splitlines() if "of the test songs" in x]
    assert len(named) == bool(known)
    assert all(song in named[0] for song in known)


def test_separator_goes_on_without_its_encoder(encoder, songs, tmp_path, quick):
    out = tmp_path / "run"

    def command(epochs):
        argv = separation(songs, out, encoder, number_of_epochs=epochs)
        return [*argv, "--allow_changes=True"]

    train.main(command(1))
    shutil.rmtree(encoder)
    train.main(command(2))
    assert len(read_results(out)[2]["history"]) == 2
    assert "going on from the checkpoint" in (out / "log.txt").read_text()


def test_encoder_that_does_not_fit_or_is_missing_is_named(
    songs, encoder, earlier
):
    argv = separation(songs, earlier, encoder, d_model=32, nhead=4)
    message = (
        "does not fit: d_model is 16, the separator has 32; "
        "nhead is 2, the separator has 4$"
    )
    with pytest.raises(ValueError, match=f"^pretrained_encoder: .* {message}"):
        train.main(argv)
    shutil.rmtree(encoder)
    with pytest.raises(FileNotFoundError, match="encoder not found: expected"):
        train.main(argv)
