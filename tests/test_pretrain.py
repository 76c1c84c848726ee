"""The pre-training recipe as a user runs it, and separators that use it."""

import inspect
import json
import re
import shutil

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
    values_of,
    without_pictures,
    write_songs,
)

from trackformer_sb.data.manifest import read_songs
from trackformer_sb.data.music import Music
from trackformer_sb.data.packing import pack
from trackformer_sb.inference.features import PerformerFeatures
from trackformer_sb.inference.separator import Separator
from trackformer_sb.nnet.mae import MASK_MODES, AudioMAE
from trackformer_sb.nnet.transfer import check_settings, encoder_state
from trackformer_sb.training.arguments import load_hparams
from trackformer_sb.training.optimization import separate_layers

PRETRAINING_YAMLS = sorted(
    path.name for path in (ROOT / "hparams").glob("audio_mae*.yaml")
)

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
def earlier(tmp_path):
    """What an earlier training left in the output folder."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("hyperparams.yaml", "log.txt", "metrics.json"):
        (out / name).write_text("of an earlier run")
    before = contents(out)
    yield out
    assert contents(out) == before


@pytest.fixture
def quick(monkeypatch):
    """Runs without what takes most of them."""
    without_pictures(monkeypatch, recipe.Pretraining, train.Separation)


MAE = inspect.signature(AudioMAE).parameters
FINE_TUNING = inspect.signature(separate_layers).parameters


def gathered(keys, name, arguments, **least):
    """Puts the arguments of what a yaml builds into one mapping."""
    found = {key: keys.pop(key) for key in list(keys) if key in arguments}
    return keys | {name: json.dumps(least | found)} if found else keys


def pretraining(songs, out, **more):
    """A command line; 6 steps an epoch."""
    more = {"dataset": "mixtures", **more}
    more = gathered(more, "AudioMAE", MAE, d_decoder=16, decoder_nhead=2)
    more = gathered(more, "pairs", ("silent_share",))
    return tiny("audio_mae.yaml", songs, out, **more)


def separation(songs, out, source, **more):
    """A command line that starts from an encoder; 6 steps an epoch."""
    more = {"dataset": "mixtures", "pretrained_encoder": source, **more}
    more = gathered(more, "fine_tuning", FINE_TUNING)
    return tiny("performer_mixit_mae.yaml", songs, out, **more)


def encoder_weights(out):
    return PerformerFeatures.from_pretrained(
        out / "encoder"
    ).encoder.state_dict()


def masknet_weights(out):
    return Separator.from_pretrained(out / "separator").masknet.state_dict()


def contents(folder):
    """All that is in a folder: path -> bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- results -----------------------------------------------------------------


def test_run_leaves_all_results(pretrained):
    for name in ("train_log.txt", "hyperparams.yaml", "env.log", "log.txt"):
        assert (pretrained / name).stat().st_size > 0, name
    assert len(list((pretrained / "save").glob("CKPT*"))) == 1
    assert list((pretrained / "tensorboard").glob("events*"))
    for name in ("training_curves", "reconstruction"):
        path = pretrained / "figures" / f"{name}.png"
        assert path.stat().st_size > 10_000
    rows, average, metrics = read_results(pretrained)
    # 2 songs of 4 segments
    assert len(rows) == metrics["test_items"] == 8
    assert list(average) == ["id", "reconstruction_loss", "explained_variance"]
    assert average["id"] == "avg"
    for name in recipe.COLUMNS:
        values = [float(row[name]) for row in rows]
        assert np.isfinite(values).all(), name
        assert float(average[name]) == pytest.approx(np.mean(values))
        assert metrics[name] == pytest.approx(np.mean(values))
    assert metrics["test_loss"] == pytest.approx(metrics["reconstruction_loss"])
    costs = ("step_seconds", "epoch_seconds", "total_seconds")
    for name in (*costs, "peak_memory_mb", "num_parameters"):
        assert metrics[name] > 0, name
    assert metrics["step_seconds"] < metrics["epoch_seconds"]
    assert metrics["batches"] == metrics["steps"] == 6
    (epoch,) = metrics["history"]
    assert epoch["valid_loss"] == pytest.approx(
        epoch["valid_reconstruction_loss"]
    )


def test_encoder_folder_is_the_trained_encoder(pretrained):
    features = PerformerFeatures.from_pretrained(pretrained / "encoder")
    x = features.encode_batch(torch.randn(2, 1000))
    assert x.shape == (2, 32, 16) and x.isfinite().all()
    (checkpoint,) = (pretrained / "save").glob("CKPT*")
    mae = torch.load(checkpoint / "mae.ckpt", weights_only=True)
    state = encoder_weights(pretrained)
    assert {f"features.{key}" for key in state} == {
        key for key in mae if key.startswith("features.")
    }
    for key, value in state.items():
        assert torch.equal(value, mae[f"features.{key}"]), key
    card = (pretrained / "encoder" / "README.md").read_text("utf-8")
    assert "| hidden | 30 % in spans of 1 frames (noise) |" in card
    assert "| weight of what is visible | 0.0 |" in card
    assert "| explained_variance | " in card


@pytest.mark.parametrize(
    ("mask_mode", "more"),
    (
        ("noise", {"mask_bands": 3, "precision": "bf16"}),
        ("zero", {"dataset": "stems", "normalise_target": True}),
        ("zero", {"mask_bands": 2, "visible_weight": 0.5}),
        ("drop", {"mask_ratio": 0.75, "mask_span": 4, "redraw_interval": 2}),
    ),
)
def test_options_train_to_finite_figures(
    mask_mode, more, songs, tmp_path, quick
):
    assert mask_mode in MASK_MODES
    if more.get("dataset") == "stems":
        songs = write_songs(tmp_path / "songs")
    out = tmp_path / "run"
    recipe.main(pretraining(songs, out, mask_mode=mask_mode, **more))
    rows, _, metrics = read_results(out)
    assert len(rows) == 8
    assert np.isfinite(metrics["history"][0]["train_loss"])
    assert np.isfinite(metrics["reconstruction_loss"])
    state = encoder_weights(out)
    assert all(value.isfinite().all() for value in state.values())


def test_pretraining_on_shards(tmp_path, monkeypatch, quick):
    songs = write_songs(tmp_path / "songs", num_songs=9)
    packed = tmp_path / "packed"
    music = Music(songs, "stems", seed=1234, sample_rate=RATE)
    pack(music, packed, 0.4, shard_megabytes=0.02)
    out = tmp_path / "run"
    recorder = Recorder(monkeypatch)
    options = {"dataset": "shards", "number_of_epochs": 2, "num_workers": 2}
    recipe.main(pretraining(packed, out, **options))
    rows, _, metrics = read_results(out)
    # 5 songs to train on, 3 segments each, in batches of 2
    assert metrics["history"][-1]["step"] == 2 * 7
    assert len(rows) == 2 * 3
    masks = [batch["result"].hidden for batch in recorder.of(sb.Stage.TRAIN)]
    assert not torch.equal(masks[0], masks[7])
    assert len(check_settings({}, out / "encoder")["songs"]) == 7


def test_training_lowers_the_loss(songs, tmp_path, quick):
    out = tmp_path / "run"
    options = {"number_of_epochs": 8, "lr": 0.01, "dropout": 0.0}
    recipe.main(pretraining(songs, out, **options))
    history = read_results(out)[2]["history"]
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]
    assert history[-1]["valid_explained_variance"] > 0
    # the schedule reached its end
    assert history[-1]["lr"] == pytest.approx(1e-5)


class Recorder:
    """Notes what is trained on: (epoch, ids, mixtures, input of the STFT)."""

    def __init__(self, monkeypatch):
        self.batches = []
        forward = recipe.Pretraining.compute_forward

        def compute_forward(brain, batch, stage):
            inputs = []
            hook = brain.modules.stft.register_forward_pre_hook(
                lambda module, args: inputs.append(args[0])
            )
            result = forward(brain, batch, stage)
            hook.remove()
            self.batches.append(
                {
                    "stage": stage,
                    "epoch": brain.hparams.epoch_counter.current,
                    "ids": list(batch.id),
                    "mixtures": batch.mixtures.data,
                    "input": inputs[0],
                    "result": result,
                }
            )
            return result

        monkeypatch.setattr(
            recipe.Pretraining, "compute_forward", compute_forward
        )

    def of(self, stage):
        return [batch for batch in self.batches if batch["stage"] == stage]


@pytest.mark.parametrize("silent_share", (1.0, 0.0))
def test_trains_on_songs_or_on_sums(
    silent_share, songs, tmp_path, monkeypatch, quick
):
    recorder = Recorder(monkeypatch)
    out = tmp_path / "run"
    recipe.main(pretraining(songs, out, silent_share=silent_share))
    for stage in sb.Stage:
        batches = recorder.of(stage)
        assert batches
        for batch in batches:
            first, second = batch["mixtures"].unbind(1)
            assert first.any()
            if silent_share:
                # in evaluation there is a partner, left out
                assert torch.equal(batch["input"], first)
                assert second.any() == (stage != sb.Stage.TRAIN)
            else:
                assert second.any()
                assert torch.equal(batch["input"], first + second)


def test_evaluation_hides_the_same_in_each_epoch(
    songs, tmp_path, monkeypatch, quick
):
    recorder = Recorder(monkeypatch)
    recipe.main(pretraining(songs, tmp_path / "run", number_of_epochs=2))
    masks = [batch["result"].hidden for batch in recorder.of(sb.Stage.VALID)]
    half = len(masks) // 2
    for one, other in zip(masks[:half], masks[half:]):
        assert torch.equal(one, other)
    assert not torch.equal(masks[0], masks[1])
    # in training nothing is hidden twice
    drawn = {
        tuple(item[:, 0].tolist())
        for batch in recorder.of(sb.Stage.TRAIN)
        for item in batch["result"].hidden
    }
    assert len(drawn) == 2 * 12


@pytest.mark.parametrize("visible_weight", [0.0, 0.5])
def test_explained_variance_is_that_of_what_is_hidden(
    visible_weight, songs, tmp_path, monkeypatch, quick
):
    recorder = Recorder(monkeypatch)
    out = tmp_path / "run"
    recipe.main(pretraining(songs, out, visible_weight=visible_weight))
    rows, _, metrics = read_results(out)
    for row, batch in zip(rows, recorder.of(sb.Stage.TEST), strict=True):
        _, prediction, target, hidden = batch["result"]
        error = (prediction - target)[hidden].square().mean().item()
        assert float(row["reconstruction_loss"]) == pytest.approx(error)
        explained = 1 - error / target[hidden].var().item()
        assert float(row["explained_variance"]) == pytest.approx(explained)
    hidden_alone = metrics["reconstruction_loss"]
    same = metrics["test_loss"] == pytest.approx(hidden_alone)
    assert same == (visible_weight == 0)


# --- epochs ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch_segments", "segments"), ((4, 4), (5, 4), (1000, 12), ("null", 12))
)
def test_epoch_has_as_many_segments(
    epoch_segments, segments, songs, tmp_path, monkeypatch, quick
):
    recorder = Recorder(monkeypatch)
    out = tmp_path / "run"
    options = {"number_of_epochs": 4, "epoch_segments": epoch_segments}
    recipe.main(pretraining(songs, out, **options))
    epochs = [
        [
            name
            for batch in recorder.of(sb.Stage.TRAIN)
            if batch["epoch"] == epoch
            for name in batch["ids"]
        ]
        for epoch in (1, 2, 3, 4)
    ]
    for names in epochs:
        # none twice; what does not fill a batch is left out
        assert len(names) == len(set(names)) == segments
    if segments < 12:
        # another set in each epoch
        assert len({frozenset(names) for names in epochs}) > 2
        # and in the end most of the music
        assert len(set().union(*epochs)) > 8
    metrics = read_results(out)[2]
    assert metrics["batches"] == segments // 2
    assert metrics["steps"] == 4 * segments // 2
    assert metrics["history"][-1]["lr"] == pytest.approx(1e-5)


def test_epoch_without_a_batch_is_refused(songs, tmp_path):
    argv = pretraining(songs, tmp_path / "run", epoch_segments=1)
    with pytest.raises(ValueError, match=r"batch_size .* 1 training seg"):
        recipe.main(argv)


def test_resumed_run_equals_uninterrupted_one(
    songs, tmp_path, monkeypatch, quick
):
    def command(out, **more):
        return pretraining(
            songs,
            out,
            number_of_epochs=2,
            epoch_segments=8,
            dropout=0.0,
            redraw_interval=3,
            **more,
        )

    recipe.main(command(tmp_path / "whole"))
    # 4 steps an epoch
    keys = {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 1}
    cut = command(tmp_path / "cut", **keys)
    interrupted(recipe.main, recipe.Pretraining, cut, monkeypatch, stop_at=6)
    recipe.main(cut)
    whole, cut = (encoder_weights(tmp_path / name) for name in ("whole", "cut"))
    assert len(read_results(tmp_path / "cut")[2]["history"]) == 2
    for key in whole:
        torch.testing.assert_close(cut[key], whole[key], msg=key)


# --- yamls -------------------------------------------------------------------


@pytest.mark.parametrize("yaml_name", PRETRAINING_YAMLS)
def test_every_key_is_used(yaml_name):
    assert unused_keys(yaml_name, "recipes/pretrain.py") == []


def test_paper_values():
    paper = {
        "sample_rate": "44100",
        "segment_seconds": "3.0",
        "n_fft": "1024",
        "hop_length": "256",
        "num_layers": "12",
        "n_features": "256",
        "batch_size": "4",
        "number_of_epochs": "100",
        "early_stop_epochs": "10",
        "lr": "0.0001",
        "weight_decay": "0.01",
        "dropout": "0.1",
    }
    values = values_of("audio_mae.yaml")
    assert {key: values[key] for key in paper} == paper


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
    state = {f"{k}": v for k, v in encoder["Features"].state_dict().items()}
    expected = encoder_state(separator["MaskNet"])
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in expected.items()
    }


def test_separator_starts_from_what_its_header_makes():
    text = (ROOT / "hparams" / "performer_mixit_mae.yaml").read_text("utf-8")
    (yaml_name,) = re.findall(r"recipes/pretrain\.py hparams/(\S+)", text)
    encoder = values_of(yaml_name)
    assert encoder["experiment"] == yaml_name.removesuffix(".yaml")
    place = f"results/{encoder['experiment']}/<seed>/encoder"
    assert f"\npretrained_encoder: !ref {place}  #" in text
    # trained at the rate of all else, once the masknet's head fits to it
    assert "    freeze_steps: 0.1  #" in text


@pytest.mark.parametrize("yaml_name", PRETRAINING_YAMLS)
def test_pretrainings_differ_in_masking_loss_decoder_and_speed_alone(yaml_name):
    paper, other = values_of("audio_mae.yaml"), values_of(yaml_name)
    assert paper.keys() == other.keys()
    different = {key for key in paper if paper[key] != other[key]}
    assert all(
        key.startswith(
            ("experiment", "mask_", "visible_", "decoder_", "speed_percent")
        )
        for key in different
    )


def test_pretrained_separator_differs_in_its_encoder_alone():
    bodies = []
    for name in ("performer_mixit.yaml", "performer_mixit_mae.yaml"):
        text = (ROOT / "hparams" / name).read_text("utf-8")
        text = re.sub(r"\A(#.*\n)+", "", text)
        # early stopping does not count while the encoder is frozen
        keys = r"(experiment|pretrained_encoder|fine_tuning| +freeze_steps"
        keys += "| +limit_warmup)"
        bodies.append(re.sub(rf"(?m)^{keys}:.*\n", "", text))
    assert len(bodies[0]) > 3000
    assert bodies[0] == bodies[1]
    assert values_of("performer_mixit.yaml")["pretrained_encoder"] == "null"


@pytest.mark.parametrize("yaml_name", PRETRAINING_YAMLS)
def test_header_names_existing_files(yaml_name):
    text = (ROOT / "hparams" / yaml_name).read_text("utf-8")
    named = set(re.findall(r"\b(?:recipes|hparams)/\w+\.\w+", text))
    assert "hparams/performer_mixit_mae.yaml" in named
    for name in named:
        assert (ROOT / name).is_file(), name


# --- errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    (
        ({"mask_ratio": 0}, r"mask_ratio in \(0, 1\), got 0"),
        ({"mask_ratio": 1}, r"mask_ratio in \(0, 1\), got 1"),
        ({"mask_ratio": 1.5}, r"mask_ratio in \(0, 1\), got 1\.5"),
        # 0.3 s at 8 kHz and hop 32
        ({"mask_span": 76}, "mask_span: .* at least 76 frames, got 75"),
        ({"mask_mode": "blank"}, "mask_mode must be .* mix, got 'blank'"),
        ({"mask_mode": "drop", "mask_bands": 2}, "expected mask_bands 1, got"),
        ({"selection_metric": "si_snri"}, "explained_variance, loss, got"),
        ({"num_spks": 2}, "num_spks.*audio_mae.yaml"),
        # the songs have 1.2 s
        ({"segment_seconds": 2}, "segment_seconds"),
        ({"dataset": "musik"}, "dataset.*musik"),
    ),
)
def test_bad_settings_leave_an_earlier_run_alone(more, message, songs, earlier):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        recipe.main(pretraining(songs, earlier, **more))


def test_missing_music_leaves_an_earlier_run_alone(pretrained, earlier):
    nowhere = "/no/such/folder"
    message = f"folder={nowhere}"
    with pytest.raises(FileNotFoundError, match=message):
        recipe.main(pretraining(nowhere, earlier))
    with pytest.raises(FileNotFoundError, match=message):
        train.main(separation(nowhere, earlier, pretrained / "encoder"))


@pytest.mark.parametrize(
    ("more", "message"),
    (
        ({"mask_ratio": 0.5}, "mask_ratio was 0.3, now 0.5"),
        ({"mask_mode": "zero"}, "mask_mode was 'noise', now 'zero'"),
        ({"mask_mode": "drop"}, "other sizes.*mae: mask_token"),
        ({"d_model": 32}, "other sizes.*output_folder"),
    ),
)
def test_results_do_not_get_other_settings(more, message, songs, pretrained):
    before = contents(pretrained)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        recipe.main(pretraining(songs, pretrained, **more))
    assert contents(pretrained) == before


def test_longest_span_is_taken(songs, tmp_path, quick):
    recipe.main(pretraining(songs, tmp_path / "run", mask_span=75))
    assert np.isfinite(read_results(tmp_path / "run")[2]["test_loss"])


@pytest.mark.parametrize("more", ({}, {"optimizer_step_limit": 1}))
def test_music_that_is_silent_is_refused(more, tmp_path, quick):
    songs = write_songs(tmp_path / "music", stems=False)
    for i, path in enumerate(sorted(songs.glob("*.wav"))):
        sig, _ = soundfile.read(path)
        # equal files would be one song
        soundfile.write(path, np.zeros(len(sig) + i), RATE)
    out = tmp_path / "run"
    message = r"data_folder: expected music, .* \d training songs are silent"
    with pytest.raises(ValueError, match=message):
        recipe.main(pretraining(songs, out, **more))
    assert not (out / "encoder").exists()
    assert not list((out / "save").glob("CKPT*"))


def test_silent_songs_among_others_are_no_harm(tmp_path, quick):
    songs = write_songs(tmp_path / "music", num_songs=9, stems=False)
    for number in range(3):
        path = songs / f"{number}.wav"
        sig, _ = soundfile.read(path)
        soundfile.write(path, np.zeros(len(sig) + number), RATE)
    out = tmp_path / "run"
    recipe.main(pretraining(songs, out))
    rows, average, _ = read_results(out)
    assert all(
        value.isfinite().all() for value in encoder_weights(out).values()
    )
    for row in (*rows, average):
        assert np.isfinite(float(row["reconstruction_loss"]))
        # of silence there is no variance to explain
        silent = row["explained_variance"] == ""
        assert silent or np.isfinite(float(row["explained_variance"]))


# --- separators from a pre-trained encoder -----------------------------------


class Steps:
    """The masknet's weights before the first step and after each."""

    def __init__(self, monkeypatch, stop_at=None):
        self.states = []
        start = train.Separation.on_fit_batch_start
        end = train.Separation.on_fit_batch_end

        def keep(brain):
            state = brain.hparams.MaskNet.state_dict()
            self.states.append({k: v.clone() for k, v in state.items()})
            if len(self.states) - 1 == stop_at:
                raise Killed

        def on_fit_batch_start(brain, *args):
            start(brain, *args)
            if not self.states:
                keep(brain)

        def on_fit_batch_end(brain, *args):
            end(brain, *args)
            keep(brain)

        for method in (on_fit_batch_start, on_fit_batch_end):
            monkeypatch.setattr(train.Separation, method.__name__, method)

    def moved(self, key):
        """For each step whether it changed a tensor."""
        return [
            not torch.equal(before[key], after[key])
            for before, after in zip(self.states, self.states[1:])
        ]


def test_separator_starts_from_exactly_these_weights(
    pretrained, songs, tmp_path, monkeypatch, quick
):
    steps = Steps(monkeypatch, stop_at=0)
    out = tmp_path / "run"
    with pytest.raises(Killed):
        train.main(separation(songs, out, pretrained / "encoder"))
    state = encoder_weights(pretrained)
    (start,) = steps.states
    assert start.keys() - state.keys() == {"head.weight", "head.bias"}
    for key, value in state.items():
        assert torch.equal(start[key], value), key
    # the same songs are held back, see test_encoder_and_separator_agree
    for split in ("train", "valid", "test"):
        name = f"manifests/{split}.jsonl"
        lines = (out / name).read_text("utf-8")
        assert lines == (pretrained / name).read_text("utf-8") != ""


def test_loaded_keys_are_reported_in_the_log(
    pretrained, songs, tmp_path, monkeypatch, quick
):
    Steps(monkeypatch, stop_at=0)
    out = tmp_path / "run"
    with pytest.raises(Killed):
        train.main(separation(songs, out, pretrained / "encoder"))
    log = (out / "log.txt").read_text("utf-8")
    (line,) = [x for x in log.splitlines() if str(pretrained) in x]
    for key in encoder_weights(pretrained):
        assert key in line


def test_frozen_encoder_waits_for_the_head(
    pretrained, songs, tmp_path, monkeypatch, quick
):
    steps = Steps(monkeypatch, stop_at=5)
    with pytest.raises(Killed):
        train.main(
            separation(
                songs,
                tmp_path / "run",
                pretrained / "encoder",
                freeze_steps=3,
                lr=0.01,
            )
        )
    for key in encoder_weights(pretrained):
        if "projection" in key:
            # random features, not trained
            assert not any(steps.moved(key))
        else:
            assert steps.moved(key) == [False] * 3 + [True] * 2, key
    for key in ("head.weight", "head.bias"):
        assert all(steps.moved(key))


def test_encoder_with_a_rate_of_zero_stays_as_it_is(
    pretrained, songs, tmp_path, monkeypatch, quick
):
    steps = Steps(monkeypatch)
    out = tmp_path / "run"
    train.main(separation(songs, out, pretrained / "encoder", lr_scale=0))
    state = masknet_weights(out)
    for key, value in encoder_weights(pretrained).items():
        assert torch.equal(state[key], value), key
    assert len(steps.states) == 7
    assert all(steps.moved("head.weight"))


def test_layers_near_the_input_change_less(
    pretrained, songs, tmp_path, monkeypatch, quick
):
    steps = Steps(monkeypatch, stop_at=2)
    with pytest.raises(Killed):
        train.main(
            separation(
                songs,
                tmp_path / "run",
                pretrained / "encoder",
                layer_decay=0.1,
                freeze_steps=0,
                lr=0.01,
            )
        )
    # AdamW's first step moves weights by the learning rate
    before, after = steps.states[:2]
    head, layer, norm, embedding = [
        (after[name] - before[name]).abs().max().item()
        for name in (
            "head.weight",
            "encoder.layers.0.ffn.0.weight",
            "encoder.norm.weight",
            "embedding.weight",
        )
    ]
    assert layer == pytest.approx(0.1 * head, rel=0.05)
    assert norm == pytest.approx(layer, rel=0.05)
    assert embedding == pytest.approx(0.1 * layer, rel=0.05)


def test_gradients_are_clipped_as_with_one_group(
    pretrained, songs, tmp_path, monkeypatch, quick
):
    init = train.Separation.init_optimizers
    gradients = []

    def init_optimizers(brain):
        init(brain)
        named = dict(brain.hparams.MaskNet.named_parameters())
        brain.optimizer.register_step_pre_hook(
            lambda *_: gradients.append(
                {name: p.grad.clone() for name, p in named.items()}
            )
        )

    monkeypatch.setattr(train.Separation, "init_optimizers", init_optimizers)
    for lr_scale in (1.0, 0.5):
        out = tmp_path / f"run {lr_scale}"
        with monkeypatch.context() as context, pytest.raises(Killed):
            Steps(context, stop_at=1)
            train.main(
                separation(
                    songs,
                    out,
                    pretrained / "encoder",
                    lr_scale=lr_scale,
                    freeze_steps=0,
                    max_grad_norm=0.01,
                )
            )
    one_group, two_groups = gradients
    norm = torch.cat([x.flatten() for x in one_group.values()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)
    for name, gradient in one_group.items():
        torch.testing.assert_close(two_groups[name], gradient, msg=name)


def test_resumed_separator_equals_uninterrupted_one(
    pretrained, songs, tmp_path, monkeypatch, quick
):
    def command(out):
        return separation(
            songs,
            out,
            pretrained / "encoder",
            freeze_steps=3,
            lr_scale=0.5,
            number_of_epochs=1,
            lr=0.01,
            dropout=0.0,
            max_grad_norm=0.1,
            ckpt_interval_minutes=0,
            ckpt_interval_steps=1,
        )

    train.main(command(tmp_path / "whole"))
    interrupted(
        train.main,
        train.Separation,
        command(tmp_path / "cut"),
        monkeypatch,
        stop_at=2,
    )
    train.main(command(tmp_path / "cut"))
    whole, cut = (masknet_weights(tmp_path / name) for name in ("whole", "cut"))
    for key in whole:
        torch.testing.assert_close(cut[key], whole[key], msg=key)
    moved = encoder_weights(pretrained)["embedding.bias"]
    assert not torch.equal(whole["embedding.bias"], moved)


@pytest.mark.parametrize("seed", (1234, 1))
def test_test_songs_that_the_encoder_knows_are_counted(
    seed, pretrained, songs, tmp_path, quick
):
    out = tmp_path / "run"
    train.main(separation(songs, out, pretrained / "encoder", seed=seed))
    split = {}
    for name, folder in (
        ("train", pretrained),
        ("valid", pretrained),
        ("test", out),
    ):
        lines = read_songs(folder / "manifests", name)
        split[name] = {line["song"] for line in lines}
    known = (split["train"] | split["valid"]) & split["test"]
    # one seed is that of the pre-training, which splits the songs alike
    assert bool(known) == (seed != 1234)
    metrics = read_results(out)[2]
    assert metrics["test_songs_pretrained_on"] == len(known)
    log = (out / "log.txt").read_text("utf-8")
    named = [x for x in log.splitlines() if "of the test songs" in x]
    assert len(named) == bool(known)
    assert all(song in named[0] for song in known)


def test_names_of_songs_come_back_as_they_were(songs, tmp_path, quick):
    names = ["No", "1:30", "on", "null", "1e3", "07", "a: b # c"]
    music = tmp_path / "music"
    music.mkdir()
    for path, name in zip(sorted(songs.iterdir()), names, strict=True):
        shutil.copy(path, music / f"{name}.wav")
    out = tmp_path / "run"
    recipe.main(pretraining(music, out))
    settings = check_settings({}, out / "encoder")
    tested = {line["song"] for line in read_songs(out / "manifests", "test")}
    assert len(settings["songs"]) == 5 and len(tested) == 2
    assert all(isinstance(song, str) for song in settings["songs"])
    heard = {
        line["song"]
        for split in ("train", "valid")
        for line in read_songs(out / "manifests", split)
    }
    assert set(settings["songs"]) == heard


@pytest.mark.parametrize("freeze", (0, 3))
def test_separator_goes_on_without_its_encoder(
    freeze, encoder, songs, tmp_path, quick
):
    out = tmp_path / "run"
    more = {"freeze_steps": freeze}
    train.main(separation(songs, out, encoder, **more))
    moved = shutil.move(encoder, tmp_path / "elsewhere")
    argv = separation(songs, out, encoder, number_of_epochs=2, **more)
    argv.append("--allow_changes=True")
    train.main(argv)
    history = read_results(out)[2]["history"]
    assert [row["step"] for row in history] == [6, 12]
    assert "going on from the checkpoint" in (out / "log.txt").read_text()
    # the same as with it
    shutil.rmtree(out)
    shutil.move(moved, encoder)
    train.main(separation(songs, out, encoder, **more))
    train.main(argv)
    again = read_results(out)[2]["history"]
    assert again[1]["train_loss"] == history[1]["train_loss"]
    # without a checkpoint there is nothing to go on from
    shutil.rmtree(out)
    shutil.move(encoder, moved)
    with pytest.raises(FileNotFoundError, match="pretrained_encoder"):
        train.main(argv)


# --- encoders that do not fit ------------------------------------------------


@pytest.fixture
def encoder(pretrained, tmp_path):
    """A copy of the encoder, to be damaged."""
    return shutil.copytree(pretrained / "encoder", tmp_path / "encoder")


@pytest.mark.parametrize(
    ("more", "message"),
    (
        ({"d_model": 32}, "d_model is 16, the separator has 32$"),
        ({"num_layers": 2}, "num_layers is 1, the separator has 2$"),
        ({"nhead": 4}, "nhead is 2, the separator has 4$"),
        ({"n_features": 32}, "n_features is 16, the separator has 32$"),
        ({"sample_rate": 4000}, "sample_rate is 8000, the separator has 4000$"),
        ({"hop_length": 64}, "hop_length is 32, the separator has 64$"),
        ({"MaskNet": "{spec_norm: minmax}"}, "spec_norm is z.*, .* minmax$"),
        (
            {"n_fft": 256, "hop_length": 64},
            "n_fft is 128, the separator has 256; "
            "hop_length is 32, the separator has 64$",
        ),
    ),
)
def test_encoder_of_another_kind_is_refused(
    more, message, songs, pretrained, earlier
):
    argv = separation(songs, earlier, pretrained / "encoder", **more)
    message = f"pretrained_encoder: the encoder in .* does not fit: {message}"
    with pytest.raises(ValueError, match=message):
        train.main(argv)


@pytest.mark.parametrize(
    ("damage", "message"),
    (
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "model.safetensors not found",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"half"),
            "model.safetensors: no readable file of weights",
        ),
        (shutil.rmtree, "encoder not found: expected a folder, or the owner"),
    ),
)
def test_half_an_encoder_is_refused(damage, message, songs, encoder, earlier):
    damage(encoder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.main(separation(songs, earlier, encoder))


@pytest.mark.parametrize(
    ("more", "message"),
    (
        ({"lr_scale": -1}, "lr_scale and .* from 0, got -1 and"),
        ({"freeze_steps": -5}, "from 0, got 1.0 and -5"),
        ({"layer_decay": 0}, "decay above 0 and up to 1, got 0"),
    ),
)
def test_rates_and_steps_out_of_range_are_refused(
    more, message, songs, pretrained, tmp_path
):
    argv = separation(songs, tmp_path, pretrained / "encoder", **more)
    with pytest.raises(ValueError, match=message):
        train.main(argv)


# --- several processes -------------------------------------------------------


@pytest.mark.slow
def test_torchrun_pretrains(songs, tmp_path):
    out = tmp_path / "run"
    options = {"mask_mode": "drop", "redraw_interval": 2, "epoch_segments": 8}
    argv = pretraining(songs, out, number_of_epochs=2, **options)
    argv = [word for word in argv if word != "--noprogressbar=True"]
    torchrun(
        ROOT / "recipes" / "pretrain.py", *argv, "--distributed_backend=gloo"
    )
    rows, average, metrics = read_results(out)
    assert len(rows) == 8
    assert np.isfinite(float(average["reconstruction_loss"]))
    # two ranks share the 8 segments of an epoch
    assert metrics["batches"] == 2 and metrics["steps"] == 4
    features = PerformerFeatures.from_pretrained(out / "encoder")
    assert features.encode_batch(torch.randn(1, 320)).isfinite().all()
