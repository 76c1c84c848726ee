"""From the data keys of a yaml to training: datasets, shards, augmentation."""

import numpy as np
import pytest
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

from trackformer_sb.audio import UnreadableAudio
from trackformer_sb.data.music import Music
from trackformer_sb.data.shards import pack
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


def test_training_on_shards(packed, tmp_path, monkeypatch):
    lengths = set()
    note_input = recipe.Separation.note_input

    def noting(brain, batch):
        lengths.add(batch.mixtures.data.shape[-1])
        note_input(brain, batch)

    monkeypatch.setattr(recipe.Separation, "note_input", noting)
    keys = {"dataset": "shards", "num_workers": 2, "number_of_epochs": 2}
    rows, _, metrics = run(packed, tmp_path / "run", **keys)
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
        ({"data_folder": "null"}, FileNotFoundError, "trackformer shards make"),
        ({"sample_rate": 4000}, ValueError, "8000 Hz, of up to 0.4 s, .* 4000"),
        ({"segment_seconds": 1}, ValueError, "of up to 0.4 s, as .* and 1"),
        ({"pairs": "{channel: left}"}, ValueError, "channel: expected mean, "),
        (
            {"music": "{shard_urls: '/no/{}'}"},
            UnreadableAudio,
            "/no/train-",
        ),
    ],
)
def test_shards_that_do_not_fit(packed, tmp_path, more, error, message):
    more = {"dataset": "shards", **more}
    folder = more.pop("data_folder", packed)
    argv = tiny("performer_mixit.yaml", folder, tmp_path / "run", **more)
    with pytest.raises(error, match=message):
        recipe.main(argv)


def test_switches_reach_the_training_pairs_only(songs, tmp_path):
    experiment = prepare(
        songs,
        tmp_path / "run",
        pairs="{channel: left, equal_levels: True, augmentation: "
        "!new:trackformer_sb.data.augment.Augmentation "
        "{pitch_shift_semitones: 2, transform: !name:torch.sign }}",
    )
    datasets, train = dataio.dataio_prep(experiment.hparams)
    assert train.augmentation.pitch_shift_semitones == 2
    assert train.augmentation.transform(torch.tensor(-2.0)) == -1
    assert train.channel == "left" and train.equal_levels
    assert set(datasets) == {"train", "valid", "test"}
    for split in ("valid", "test"):
        dataset = datasets[split]
        dataset.set_output_keys(["mixtures", "stems"])
        assert len(dataset[0]["stems"]) == 2
