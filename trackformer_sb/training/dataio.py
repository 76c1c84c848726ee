"""From the music of a yaml to datasets, for all recipes."""

import functools
import json
import pathlib

from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.data_pipeline import DataPipeline
from speechbrain.utils.distributed import run_on_main

from trackformer_sb.data.manifest import MappedManifest
from trackformer_sb.data.mixtures import MixtureOfMixtures
from trackformer_sb.data.music import REPORT


class SegmentDataset(DynamicItemDataset):
    """SpeechBrain's dataset over a manifest, without a list of its ids.

    Arguments
    ---------
    manifest : Manifest
        The segments.

    Example
    -------
    >>> from trackformer_sb.data.manifest import Manifest
    >>> dataset = SegmentDataset(Manifest({"a_0000": {"song": "a"}}))
    >>> dataset.set_output_keys(["id", "song"])
    >>> dataset[0]
    {'id': 'a_0000', 'song': 'a'}
    """

    # not calling the one above: it makes the list
    def __init__(self, manifest):
        self.data = manifest
        self.data_ids = manifest.ids
        keys = manifest.row(0)
        self.pipeline = DataPipeline(["id", *keys], [])
        self.set_output_keys([])


def prepare_data(hparams):
    """Makes the manifests of the music, on the main process.

    Arguments
    ---------
    hparams : dict
        The loaded yaml.

    Raises
    ------
    FileNotFoundError, ValueError
        For music that cannot be used.
    """
    if hparams["dataset"] == "shards":
        _check_packed(hparams)
        return
    run_on_main(
        hparams["music"].prepare,
        args=[manifest_folder(hparams), hparams["segment_seconds"]],
    )


def manifest_folder(hparams):
    """Where the manifests of an experiment are."""
    if hparams["dataset"] == "shards":
        return pathlib.Path(hparams["data_folder"])
    return pathlib.Path(hparams["output_folder"]) / "manifests"


def data_report(hparams):
    """What the data of an experiment is, see ``Music.prepare``."""
    return json.loads(_report_path(hparams).read_text(encoding="utf-8"))


def _report_path(hparams):
    return manifest_folder(hparams) / REPORT


def _check_packed(hparams):
    """Refuses a folder that packing did not leave, or settings it lacks."""
    where = f"data_folder={hparams['data_folder']}"
    if not hparams["data_folder"] or not _report_path(hparams).is_file():
        raise FileNotFoundError(
            f"{where} has no {REPORT}, expected with dataset: shards a folder "
            "that `trackformer shards make` has finished"
        )
    packed = data_report(hparams)["settings"]
    if packed["sample_rate"] != hparams["sample_rate"]:
        raise ValueError(
            f"sample_rate: expected {packed['sample_rate']} Hz, that of the "
            f"shards of {where}, got {hparams['sample_rate']}"
        )
    if packed["segment_seconds"] < hparams["segment_seconds"]:
        raise ValueError(
            f"segment_seconds: expected up to {packed['segment_seconds']}, the "
            f"length packed in {where}, got {hparams['segment_seconds']}"
        )


def _lost(max_failures, tracks, skipped):
    """Whether a segment was itself replaced, or got no partner at all."""
    files = set()
    for paths in tracks.values():
        files |= {paths} if isinstance(paths, str) else {*paths}
    own = any(path in files for path, _ in skipped)
    return own or len(skipped) >= max_failures


def dataio_prep(hparams, rank=0, world_size=1):
    """Datasets of pairs of mixtures from the prepared manifests.

    Arguments
    ---------
    hparams : dict
        The loaded yaml; ``pairs`` makes the training pairs.
    rank, world_size : int
        Number of this process, and of all.

    Returns
    -------
    datasets : dict
        "train", "valid" and "test".
    pairs : MixtureOfMixtures or ShardedMixtures
        What draws the training pairs; to be told the epoch.
    """
    folder = manifest_folder(hparams)
    more = {"max_failures": 1} if hparams["music"].strict else {}
    make_pairs = {
        "train": functools.partial(hparams["pairs"], rank=rank, **more)
    }
    make_pairs["valid"] = make_pairs["test"] = functools.partial(
        MixtureOfMixtures,
        sample_rate=hparams["sample_rate"],
        seed=hparams["seed"],
        with_stems=True,
        **more,
    )
    datasets, train_pairs = {}, None
    for split, make in make_pairs.items():
        if split == "train" and hparams["dataset"] == "shards":
            # Imported here: an optional extra.
            from trackformer_sb.data.shard_reading import ShardedMixtures

            datasets[split] = train_pairs = ShardedMixtures(
                hparams["music"].shard_urls or folder,
                duration=hparams["segment_seconds"],
                world_size=world_size,
                epoch_segments=hparams["epoch_segments"],
                batch_size=hparams["batch_size"],
                **make.keywords,
            )
            continue
        rows = MappedManifest(folder, split, hparams["segment_seconds"])
        dataset = SegmentDataset(rows)
        pairs = make(rows)
        dataset.add_dynamic_item(
            pairs, takes="id", provides=["mixtures", "stems", "skipped"]
        )
        dataset.add_dynamic_item(list, takes="tracks", provides="names")
        dataset.add_dynamic_item(
            functools.partial(_lost, pairs.max_failures),
            takes=["tracks", "skipped"],
            provides="lost",
        )
        keys = ["id", "song", "mixtures", "skipped"]
        if split == "train":
            train_pairs = pairs
        else:
            keys += ["stems", "names", "lost"]
        dataset.set_output_keys(keys)
        datasets[split] = dataset
    return datasets, train_pairs
