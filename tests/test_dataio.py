"""From the data keys of a yaml to training: datasets, shards, augmentation."""

import logging

import numpy as np
import pytest
import soundfile
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
from trackformer_sb.data.packing import pack
from trackformer_sb.training import dataio
from trackformer_sb.training.experiment import load_experiment, make_brain

recipe = load_recipe("train")


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    return write_songs(tmp_path_factory.mktemp("songs"), num_songs=9)


@pytest.fixture(scope="module")
def packed(songs, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed")
    pack(
        songs,
        "stems",
        out,
        RATE,
        shard_megabytes=0.02,
        segment_seconds=0.4,
        seed=1234,
    )
    assert len(list(out.glob("train-*.tar"))) > 3
    return out


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Runs without what takes most of them."""
    without_pictures(monkeypatch, recipe.Separation)


def prepare(songs, out, **more):
    """What comes before training."""
    argv = tiny("performer_mixit.yaml", songs, out, **more)
    experiment = load_experiment(argv, recipe.SELECTION_METRICS)
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


@pytest.mark.parametrize(
    ("percent", "warned"),
    [(30, False), ("33.333333333333336", False), (40, True)],
)
def test_shards_of_too_little_music_for_other_speeds(
    packed, tmp_path, percent, warned, caplog
):
    more = {"dataset": "shards", "speed_percent": percent}
    prepare(packed, tmp_path / "run", **more)
    words = "no more than 0.4 s of each; those of 0.42 s would not"
    assert (words in caplog.text) == warned


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
        ({"test_folder": "/music"}, ValueError, "test_folder: shards bring"),
        ({"channel": "left"}, ValueError, "channel"),
        ({"max_stems": 1}, ValueError, "max_stems: expected None, with which"),
        ({"split": "from_file"}, ValueError, "split: expected auto, with"),
        (
            {"stem_groups": "{all: ['*']}"},
            ValueError,
            r"stem_groups: expected None, with which .*, got \{'all'",
        ),
        ({"shard_urls": "/no/{0..3}.tar"}, FileNotFoundError, "/no/"),
    ],
)
def test_shards_that_do_not_fit(packed, tmp_path, more, error, message):
    more = {"dataset": "shards", **more}
    folder = more.pop("data_folder", packed)
    argv = tiny("performer_mixit.yaml", folder, tmp_path / "run", **more)
    with pytest.raises(error, match=message):
        recipe.main(argv)


def test_shard_urls_without_shards(songs, tmp_path):
    argv = tiny("performer_mixit.yaml", songs, tmp_path / "run")
    with pytest.raises(ValueError, match=r"shard_urls .* dataset: shards"):
        recipe.main([*argv, "--shard_urls=x.tar"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("speed_percent", "five", "speed_percent: expected a number"),
        ("gain_db", "True", "gain_db: expected a number, got True"),
        ("min_active_share", "null", "min_active_share: expected a number"),
        ("min_level_db", "soft", "min_level_db: expected dBFS or null"),
        ("strict", "maybe", "strict: expected True or False, got 'maybe'"),
        ("equal_levels", "1", "equal_levels: expected True or False, got 1"),
        ("stem_groups", "{band: [bass", "stem_groups: expected {group"),
    ],
)
def test_values_of_another_type(songs, tmp_path, key, value, message):
    argv = tiny("performer_mixit.yaml", songs, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        recipe.main([*argv, f"--{key}={value}"])


def test_all_switches_at_once(songs, tmp_path):
    _, _, metrics = run(
        songs,
        tmp_path / "run",
        polarity_share=0.5,
        time_shift_seconds=0.2,
        speed_percent=5,
        time_stretch_percent=5,
        pitch_shift_semitones=1,
        channel="random",
        equal_levels=True,
        gain_db=5,
        min_active_share=0.2,
        audio_check="full",
        stem_groups="{all: ['*']}",
    )
    assert np.isfinite(metrics["mixture_si_snr"])


def test_switches_reach_the_training_pairs_only(songs, tmp_path, monkeypatch):
    made = []

    class Noting(dataio.MixtureOfMixtures):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(dataio, "MixtureOfMixtures", Noting)
    experiment = prepare(
        songs,
        tmp_path / "run",
        pitch_shift_semitones=2,
        channel="left",
        equal_levels=True,
        strict=True,
    )
    make_brain(recipe.Separation, experiment)
    train, valid, test = made
    assert train.augmentation.pitch_shift_semitones == 2
    assert train.channel == "left" and train.equal_levels
    assert train.max_failures == 1
    for pairs in (valid, test):
        assert pairs.max_failures == 1
        assert pairs.augmentation.is_off and pairs.channel == "mean"
        assert not pairs.equal_levels and pairs.with_stems


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
        strict=True,
    )
    with pytest.raises(UnreadableAudio, match=r"after 1 tries: .* NaN"):
        recipe.main(argv)


def test_what_is_left_out_is_said(tmp_path, caplog):
    songs = write_songs(tmp_path / "songs")
    (songs / "song 2" / "tone.wav").write_bytes(b"")
    with caplog.at_level(logging.INFO):
        prepare(songs, tmp_path / "run")
    assert [m for m in caplog.messages if m.startswith("1 left out\n")]
