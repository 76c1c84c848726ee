"""From the data keys of a yaml to training: datasets, shards, augmentation."""

import multiprocessing
import sys

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
from trackformer_sb.training.experiment import run as run_recipe

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


def run(songs, out, **more):
    argv = tiny("performer_mixit.yaml", songs, out, **more)
    recipe.main(argv)
    return read_results(out)


@pytest.fixture
def batches(monkeypatch):
    """Stage and ids of all batches, and their number of samples."""
    found = []
    note_input = recipe.Separation.note_input

    def noting(brain, batch):
        samples = batch.mixtures.data.shape[-1]
        found.append((brain.modules.training, batch.id, samples))
        note_input(brain, batch)

    monkeypatch.setattr(recipe.Separation, "note_input", noting)
    return found


def trained_on(batches):
    """Ids of what was trained on since."""
    ids = [name for training, ids, _ in batches if training for name in ids]
    batches.clear()
    return ids


def test_training_on_shards(packed, tmp_path, batches):
    keys = {"dataset": "shards", "num_workers": 2, "number_of_epochs": 2}
    rows, _, metrics = run(packed, tmp_path / "run", **keys)
    # 5 songs to train on, 3 segments each, in batches of 2
    assert metrics["history"][-1]["step"] == 2 * 7
    assert len(rows) == 2 * 3
    assert np.isfinite(metrics["si_snri"])
    assert not (tmp_path / "run" / "manifests").exists()
    # evaluated as trained: on 0.3 s of the 0.4 s that were packed
    assert {samples for *_, samples in batches} == {round(0.3 * RATE)}


def test_a_stopped_training_on_shards_goes_on_in_its_epoch(
    packed, tmp_path, monkeypatch, batches
):
    run(packed, tmp_path / "whole", dataset="shards")
    whole = trained_on(batches)
    keys = {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 1}
    keys |= {"dataset": "shards"}
    argv = tiny("performer_mixit.yaml", packed, tmp_path / "stopped", **keys)
    interrupted(recipe.main, recipe.Separation, argv, monkeypatch, stop_at=3)
    before = trained_on(batches)
    recipe.main(argv)
    heard = trained_on(batches)
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
    pairs = (
        "{channel: left, equal_levels: True, augmentation: "
        "!new:trackformer_sb.data.augment.Augmentation "
        "{pitch_shift_semitones: 2, transform: !name:torch.sign }}"
    )
    argv = tiny("performer_mixit.yaml", songs, tmp_path / "run", pairs=pairs)
    with load_experiment(argv, recipe.Separation.selection_metrics) as found:
        dataio.prepare_data(found.hparams)
    datasets, train = dataio.dataio_prep(found.hparams)
    assert train.augmentation.pitch_shift_semitones == 2
    assert train.augmentation.transform(torch.tensor(-2.0)) == -1
    assert train.channel == "left" and train.equal_levels
    assert set(datasets) == {"train", "valid", "test"}
    for split in ("valid", "test"):
        dataset = datasets[split]
        dataset.set_output_keys(["mixtures", "stems"])
        assert len(dataset[0]["stems"]) == 2


# --- loader workers ----------------------------------------------------------


def test_batches_arrive_where_shared_memory_is_full(monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    items = [(torch.arange(n, n + 3), n > 1) for n in range(4)]
    loader = torch.utils.data.DataLoader(
        items,
        batch_size=2,
        num_workers=2,
        worker_init_fn=dataio.share_batches,
    )
    batches = [[part.tolist() for part in batch] for batch in loader]
    assert batches == [
        [[[0, 1, 2], [1, 2, 3]], [False, False]],
        [[[2, 3, 4], [3, 4, 5]], [True, True]],
    ]


def test_a_killed_worker_ends_the_run_with_advice(songs, tmp_path, monkeypatch):
    note_input = recipe.Separation.note_input

    def killing(brain, batch):
        note_input(brain, batch)
        for worker in multiprocessing.active_children():
            worker.kill()

    monkeypatch.setattr(recipe.Separation, "note_input", killing)
    keys = {"num_workers": 1, "epoch_segments": 4}
    argv = tiny("performer_mixit.yaml", songs, tmp_path / "run", **keys)
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit, match=r"worker died, .* num_workers"):
        run_recipe(recipe.main)
