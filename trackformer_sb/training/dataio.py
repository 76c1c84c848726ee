"""From the music of a yaml to datasets, for all recipes."""

import functools
import json
import os
import pathlib
from multiprocessing.reduction import DupFd, ForkingPickler

import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.data_pipeline import DataPipeline
from speechbrain.utils.distributed import main_process_only, run_on_main
from torch.multiprocessing.reductions import rebuild_storage_fd, reduce_storage
from torch.utils.data._utils.collate import default_collate_fn_map

from trackformer_sb.data.files import write_json
from trackformer_sb.data.manifest import MappedManifest
from trackformer_sb.data.mixtures import MAX_FAILURES, MixtureOfMixtures
from trackformer_sb.data.music import REPORT
from trackformer_sb.training.experiment import must_be_same

SONGS = "songs.json"


class SegmentDataset(DynamicItemDataset):
    """SpeechBrain's dataset over a ``Manifest``, without a list of its ids."""

    # not calling the one above: it makes the list
    def __init__(self, manifest):
        self.data = manifest
        self.data_ids = manifest.ids
        keys = manifest.row(0)
        self.pipeline = DataPipeline(["id", *keys], [])
        self.set_output_keys([])


def share_batches(worker_id):
    """Lets a loader worker share batches that /dev/shm does not hold.

    For ``worker_init_fn``. A container has 64 MB there by default, of which
    one batch of the paper's 30 s takes 42; a worker whose batch does not fit
    would lose it, and the training wait for it.
    """
    ForkingPickler.register(torch.UntypedStorage, _share_storage)
    # torch's own stacks in /dev/shm
    default_collate_fn_map[torch.Tensor] = lambda batch, **_: torch.stack(batch)


def _share_storage(storage):
    """As torch, or where /dev/shm is full in memory that has no name there."""
    try:
        return reduce_storage(storage)
    except RuntimeError:
        content = torch.empty(0, dtype=torch.uint8).set_(storage)
        with open(os.memfd_create("batch"), "wb") as file:
            file.write(content.numpy())
            file.flush()
            shared = DupFd(file.fileno()), storage.nbytes()
        return rebuild_storage_fd, (type(storage), *shared)


def prepare_data(hparams):
    """Makes the manifests of the music in a yaml, on the main process."""
    if hparams["dataset"] == "shards":
        _check_packed(hparams)
    else:
        run_on_main(
            hparams["music"].prepare,
            args=[manifest_folder(hparams), hparams["segment_seconds"]],
        )
    splits = data_report(hparams)["splits"]
    check_songs(hparams, {x: splits[x]["song_names"] for x in splits})


@main_process_only
def check_songs(hparams, parts):
    """Keeps the songs of a run, part -> names; goes on only where all are.

    Names are below the folder of the music, wherever that lies now; new songs
    may have joined.
    """
    folder = pathlib.Path(hparams["output_folder"])
    if (folder / SONGS).is_file() and must_be_same(hparams):
        begun = json.loads((folder / SONGS).read_text("utf-8"))
        gone = [
            name
            for part, names in begun.items()
            for name in sorted({*names}.difference(parts.get(part, ())))
        ]
        if gone:
            raise ValueError(
                f"{folder} has checkpoints of a training with other songs: "
                f"{len(gone)} are gone, {', '.join(gone[:3])}; expected the "
                "same music, another output_folder, or --allow_changes=True"
            )
    write_json(folder / SONGS, parts)


def manifest_folder(hparams):
    """Where the manifests of an experiment are."""
    if hparams["dataset"] == "shards":
        return pathlib.Path(hparams["data_folder"])
    return pathlib.Path(hparams["output_folder"]) / "manifests"


def data_report(hparams):
    """What the data of an experiment is, see ``Music.prepare``."""
    path = manifest_folder(hparams) / REPORT
    return json.loads(path.read_text(encoding="utf-8"))


def _check_packed(hparams):
    """Refuses a folder that packing did not leave, or settings it lacks."""
    folder = hparams["data_folder"]
    if not folder or not (pathlib.Path(folder) / REPORT).is_file():
        raise FileNotFoundError(
            f"data_folder={folder} has no {REPORT}, expected with dataset: "
            "shards a folder that `trackformer shards make` has finished"
        )
    packed = data_report(hparams)["settings"]
    rate, seconds = hparams["sample_rate"], hparams["segment_seconds"]
    if packed["sample_rate"] != rate or packed["segment_seconds"] < seconds:
        raise ValueError(
            f"expected segments at {packed['sample_rate']} Hz, of up to "
            f"{packed['segment_seconds']} s, as data_folder={folder} has, got "
            f"sample_rate and segment_seconds of {rate} Hz and {seconds} s"
        )


def _lost(tracks, skipped):
    """Whether a segment was itself replaced, or got no partner at all."""
    files = set()
    for paths in tracks.values():
        files |= {paths} if isinstance(paths, str) else {*paths}
    own = any(path in files for path, _ in skipped)
    return own or len(skipped) >= MAX_FAILURES


def dataio_prep(hparams, rank=0, world_size=1):
    """Datasets of pairs of mixtures from the prepared manifests.

    Returns them as "train", "valid" and "test", and what draws the training
    pairs, to be told the epoch.
    """
    folder = manifest_folder(hparams)
    make_train = functools.partial(hparams["pairs"], rank=rank)
    make_eval = functools.partial(
        MixtureOfMixtures,
        sample_rate=hparams["sample_rate"],
        seed=hparams["seed"],
        with_stems=True,
    )
    datasets = {}
    for split in ("train", "valid", "test"):
        make = make_train if split == "train" else make_eval
        if split == "train" and hparams["dataset"] == "shards":
            # Imported here: an optional extra.
            from trackformer_sb.data.shards import ShardedMixtures

            datasets[split] = train_pairs = ShardedMixtures(
                folder,
                duration=hparams["segment_seconds"],
                batch_size=hparams["batch_size"],
                urls=hparams["music"].shard_urls,
                world_size=world_size,
                epoch_segments=hparams["epoch_segments"],
                **make.keywords,
            )
            continue
        rows = MappedManifest(folder, split, hparams["segment_seconds"])
        pairs = make(rows)
        dataset = datasets[split] = SegmentDataset(rows)
        dataset.add_dynamic_item(
            pairs, takes="id", provides=["mixtures", "stems", "skipped"]
        )
        dataset.add_dynamic_item(list, takes="tracks", provides="names")
        dataset.add_dynamic_item(
            _lost, takes=["tracks", "skipped"], provides="lost"
        )
        keys = ["id", "mixtures", "skipped"]
        if split == "train":
            train_pairs = pairs
        else:
            keys += ["stems", "names", "lost"]
        dataset.set_output_keys(keys)
    return datasets, train_pairs
