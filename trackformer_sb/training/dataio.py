"""From the data keys of a yaml to datasets, for all recipes."""

import functools
import inspect
import json
import pathlib

import torch
import yaml
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.data_pipeline import DataPipeline
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger

from trackformer_sb.data.augment import Augmentation
from trackformer_sb.data.catalogue import REPORT, prepare
from trackformer_sb.data.manifest import MappedManifest
from trackformer_sb.data.mixtures import MixtureOfMixtures
from trackformer_sb.training.keys import SONG_KEYS
from trackformer_sb.training.settings import check_values

logger = get_logger(__name__)

# Keys of the yaml that ``prepare`` takes.
DATA_KEYS = (
    "data_folder",
    "dataset",
    "segment_seconds",
    "segment_hop_seconds",
    "seed",
    "sample_rate",
    "test_folder",
    "test_dataset",
    *SONG_KEYS,
)

# Those that say how training pairs are made, and how they are augmented.
PAIR_KEYS = (
    "gain_db",
    "single_stem_share",
    "silent_share",
    "equal_levels",
    "channel",
)
AUGMENTATION_KEYS = (
    "polarity_share",
    "time_shift_seconds",
    "speed_percent",
    "time_stretch_percent",
    "pitch_shift_semitones",
)

# Settled when shards are packed.
PACKED_KEYS = (
    "split",
    "split_ratio",
    "stem_groups",
    "max_stems",
    "min_active_share",
    "min_level_db",
)


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
    """Makes the manifests of the data, on the main process.

    Arguments
    ---------
    hparams : dict
        The loaded yaml.

    Raises
    ------
    FileNotFoundError, ValueError
        For a data folder that cannot be used.
    """
    check_values(hparams)
    if not isinstance(hparams["min_level_db"], (int, float, type(None))):
        raise ValueError(
            "min_level_db: expected dBFS or null, got "
            f"{hparams['min_level_db']!r}"
        )
    if hparams["dataset"] == "shards":
        _check_packed(hparams)
        return
    if hparams["shard_urls"]:
        raise ValueError(
            "shard_urls is given, expected dataset: shards, got dataset: "
            f"{hparams['dataset']}"
        )
    options = {key: hparams[key] for key in DATA_KEYS}
    options["stem_groups"] = read_mapping(hparams, "stem_groups")
    options["manifest_folder"] = manifest_folder(hparams)
    run_on_main(prepare, kwargs=options)


def read_mapping(hparams, key, expected="{group: [pattern, ...]}"):
    """The value of a key; a mapping on the command line arrives as a text."""
    value = hparams[key]
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{key}: expected {expected}, got {value!r}"
        ) from error


def manifest_folder(hparams):
    """Where the manifests of an experiment are."""
    if hparams["dataset"] == "shards":
        return pathlib.Path(hparams["data_folder"])
    return pathlib.Path(hparams["output_folder"]) / "manifests"


def data_report(hparams):
    """What the data of an experiment is, see ``data.catalogue.prepare``."""
    path = manifest_folder(hparams) / REPORT
    return json.loads(path.read_text(encoding="utf-8"))


def _check_packed(hparams):
    """Refuses a folder that packing did not leave, or settings it lacks."""
    folder = hparams["data_folder"]
    where = f"data_folder={folder}"
    path = pathlib.Path(folder or "") / REPORT
    if not folder or not path.is_file():
        raise FileNotFoundError(
            f"{where} has no {REPORT}, expected with dataset: shards a folder "
            "that `trackformer shards make` has finished"
        )
    packed = json.loads(path.read_text(encoding="utf-8"))["settings"]
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
    asked = {**hparams, "stem_groups": read_mapping(hparams, "stem_groups")}
    for key in PACKED_KEYS:
        default = inspect.signature(prepare).parameters[key].default
        # of earlier packings, and of older yamls, not all are known
        known = packed.get(key, default)
        value = asked.get(key, default)
        if key == "split_ratio":  # two parts with a test_folder
            value, default = (list(x)[: len(known)] for x in (value, default))
            known = list(known)
        if value not in (known, default):
            raise ValueError(
                f"{key}: expected {known}, with which {where} was "
                f"packed, got {value}"
            )
    faster = 1.0
    for key in ("speed_percent", "time_stretch_percent"):
        faster *= 1 + hparams[key] / 100
    needed = hparams["segment_seconds"] * faster
    if packed["segment_seconds"] < needed - 1e-6:
        logger.warning(
            "speed_percent, time_stretch_percent: segments that are played "
            "faster end with silence, for the shards hold no more than "
            f"{packed['segment_seconds']:g} s of each; those of {needed:g} s "
            "would not"
        )
    if hparams["test_folder"]:
        raise ValueError(
            "test_folder: shards bring their own test songs, expected null, "
            f"got {hparams['test_folder']}"
        )


def _sharded(hparams, training):
    """The training set of shards; gives its loader the options it needs."""
    # Imported here: an optional extra.
    from trackformer_sb.data.shard_reading import ShardedMixtures

    distributed = torch.distributed.is_initialized()
    dataset = ShardedMixtures(
        hparams["shard_urls"] or hparams["data_folder"],
        hparams["sample_rate"],
        hparams["segment_seconds"],
        hparams["seed"],
        world_size=torch.distributed.get_world_size() if distributed else 1,
        epoch_segments=hparams["epoch_segments"],
        batch_size=hparams["batch_size"],
        **training,
    )
    options = hparams["train_loader_options"]
    options.pop("shuffle", None)
    options["collate_fn"] = PaddedBatch
    return dataset


def _lost(max_failures, tracks, skipped):
    """Whether a segment was itself replaced, or got no partner at all."""
    files = set()
    for paths in tracks.values():
        files |= {paths} if isinstance(paths, str) else {*paths}
    own = any(path in files for path, _ in skipped)
    return own or len(skipped) >= max_failures


def dataio_prep(hparams, rank):
    """Datasets of pairs of mixtures from the prepared manifests.

    Returns
    -------
    datasets : dict
        "train", "valid" and "test".
    pairs : MixtureOfMixtures or ShardedMixtures
        What draws the training pairs; to be told the epoch.
    """
    folder = manifest_folder(hparams)
    training = {key: hparams[key] for key in PAIR_KEYS}
    evaluation = {"with_stems": True}
    training["rank"] = rank
    training["augmentation"] = Augmentation(
        **{key: hparams[key] for key in AUGMENTATION_KEYS}
    )
    if hparams["strict"]:
        training["max_failures"] = evaluation["max_failures"] = 1
    datasets, train_pairs = {}, None
    for split in ("train", "valid", "test"):
        if split == "train" and hparams["dataset"] == "shards":
            datasets[split] = train_pairs = _sharded(hparams, training)
            continue
        rows = MappedManifest(folder, split, hparams["segment_seconds"])
        dataset = SegmentDataset(rows)
        pairs = MixtureOfMixtures(
            rows,
            hparams["sample_rate"],
            hparams["seed"],
            **(training if split == "train" else evaluation),
        )
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
