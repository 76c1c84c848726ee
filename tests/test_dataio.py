"""From the data keys of a yaml to training: datasets, shards, augmentation."""

import logging

import numpy as np
import pytest
import soundfile
import torch
from recipe_runs import (
    RATE,
    interrupted,
    load_recipe,
    read_results,
    tiny,
    without_pictures,
    write_songs,
)

from trackformer_sb.data.audio import UnreadableAudio
from trackformer_sb.data.music import Music
from trackformer_sb.data.packing import pack
from trackformer_sb.training import dataio
from trackformer_sb.training.experiment import load_experiment

recipe = load_recipe("train")


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    return write_songs(tmp_path_factory.mktemp("songs"), num_songs=9)


@pytest.fixture(scope="module")
def packed(songs, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed")
    music = Music(songs, "stems", seed=1234, sample_rate=RATE)
    pack(music, out, segment_seconds=0.4, shard_megabytes=0.02)
    assert len(list(out.glob("train-*.tar"))) > 3
    return out


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Runs without what takes most of them."""
    without_pictures(monkeypatch, recipe.Separation)


def prepare(songs, out, **more):
    """What comes before training."""
    argv = tiny("performer_mixit.yaml", songs, out, **more)
    experiment = load_experiment(argv, recipe.Separation.selection_metrics)
    dataio.prepare_data(experiment.hparams)
    return experiment


def run(songs, out, **more):
    argv = tiny("performer_mixit.yaml", songs, out, **more)
    recipe.main(argv)
    return read_results(out)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_on_shards(packed, tmp_path, num_workers, monkeypatch):
    lengths = set()
    note_input = recipe.Separation.note_input

    def noting(brain, batch):
        lengths.add(batch.mixtures.data.shape[-1])
        note_input(brain, batch)

    monkeypatch.setattr(recipe.Separation, "note_input", noting)
    rows, _, metrics = run(
        packed,
        tmp_path / "run",
        dataset="shards",
        num_workers=num_workers,
        number_of_epochs=2,
    )
    # 5 songs to train on, 3 segments each, in batches of 2
    assert metrics["history"][-1]["step"] == 2 * 7
    assert len(rows) == 2 * 3
    assert np.isfinite(metrics["si_snri"])
    assert not (tmp_path / "run" / "manifests").exists()
    # evaluated as trained: on 0.3 s of the 0.4 s that were packed
    assert lengths == {round(0.3 * RATE)}


def test_a_stopped_training_on_shards_goes_on_in_its_epoch(
    packed, tmp_path, monkeypatch
):
    heard = []
    note_input = recipe.Separation.note_input

    def noting(brain, batch):
        if brain.modules.training:
            heard.extend(batch.id)
        note_input(brain, batch)

    monkeypatch.setattr(recipe.Separation, "note_input", noting)
    run(packed, tmp_path / "whole", dataset="shards")
    whole = list(heard)
    heard.clear()
    argv = tiny(
        "performer_mixit.yaml",
        packed,
        tmp_path / "stopped",
        dataset="shards",
        ckpt_interval_minutes=0,
        ckpt_interval_steps=1,
    )
    interrupted(recipe.main, recipe.Separation, argv, monkeypatch, stop_at=3)
    before = list(heard)
    heard.clear()
    recipe.main(argv)
    # the last step before the stop has no checkpoint, and is done again
    assert len(whole) == 14 and before == whole[: len(before)]
    assert heard == whole[-len(heard) :]
    assert len(whole) <= len(before) + len(heard) <= len(whole) + 2


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"data_folder": "/nowhere"}, FileNotFoundError, "/nowhere has no"),
        ({"data_folder": "null"}, FileNotFoundError, "trackformer shards make"),
        ({"sample_rate": 4000}, ValueError, "sample_rate: expected 8000 Hz"),
        ({"segment_seconds": 1}, ValueError, "segment_seconds: expected up to"),
        ({"pairs": "{channel: left}"}, ValueError, "channel"),
        (
            {"music": "{shard_urls: '/no/{0..3}.tar'}"},
            FileNotFoundError,
            "/no/",
        ),
    ],
)
def test_shards_that_do_not_fit(packed, tmp_path, more, error, message):
    more = {"dataset": "shards", **more}
    folder = more.pop("data_folder", packed)
    argv = tiny("performer_mixit.yaml", folder, tmp_path / "run", **more)
    with pytest.raises(error, match=message):
        recipe.main(argv)


def test_all_switches_at_once(songs, tmp_path):
    _, _, metrics = run(
        songs,
        tmp_path / "run",
        music="{min_active_share: 0.2, audio_check: full, "
        "stem_groups: {all: ['*']}}",
        pairs="{channel: random, equal_levels: True, gain_db: 5, "
        "augmentation: !new:trackformer_sb.data.augment.Augmentation "
        "{polarity_share: 0.5, time_shift_seconds: 0.2, speed_percent: 5, "
        "time_stretch_percent: 5, pitch_shift_semitones: 1}}",
    )
    assert np.isfinite(metrics["mixture_si_snr"])


def test_switches_reach_the_training_pairs_only(songs, tmp_path):
    experiment = prepare(
        songs,
        tmp_path / "run",
        pairs="{channel: left, equal_levels: True, augmentation: "
        "!new:trackformer_sb.data.augment.Augmentation "
        "{pitch_shift_semitones: 2, transform: !name:torch.sign }}",
        music="{strict: True}",
    )
    datasets, train = dataio.dataio_prep(experiment.hparams)
    assert train.augmentation.pitch_shift_semitones == 2
    assert train.augmentation.transform(torch.tensor(-2.0)) == -1
    assert train.channel == "left" and train.equal_levels
    assert train.max_failures == 1
    assert set(datasets) == {"train", "valid", "test"}
    for split in ("valid", "test"):
        dataset = datasets[split]
        dataset.set_output_keys(["mixtures", "stems"])
        assert len(dataset[0]["stems"]) == 2


def test_strict_training_stops_at_damage(tmp_path):
    songs = write_songs(tmp_path / "songs", stems=False)
    for path in sorted(songs.glob("*.wav")):
        sig, _ = soundfile.read(path)
        sig[::1000] = np.nan
        soundfile.write(path, sig, RATE, "FLOAT")
    argv = tiny(
        "performer_mixit.yaml",
        songs,
        tmp_path / "run",
        dataset="mixtures",
        music="{strict: True}",
    )
    with pytest.raises(UnreadableAudio, match=r"after 1 tries: .* NaN"):
        recipe.main(argv)


def test_what_is_left_out_is_said(tmp_path, caplog):
    songs = write_songs(tmp_path / "songs")
    (songs / "song 2" / "tone.wav").write_bytes(b"")
    with caplog.at_level(logging.INFO):
        prepare(songs, tmp_path / "run")
    assert [m for m in caplog.messages if m.startswith("1 left out\n")]
