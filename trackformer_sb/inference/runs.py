"""Separators out of the folder of a training."""

import csv
import json
from pathlib import Path

import torch
import yaml
from speechbrain.utils.checkpoints import Checkpointer

from trackformer_sb.inference.hub import read_recipe
from trackformer_sb.inference.separator import Separator

# The number by which a training keeps its best checkpoint; higher is better.
SCORE = "score"

# Weights averaged over the steps, which are better than the last ones.
AVERAGE = "ema"

# What the card says of the yaml, as the recipe does.
TRAINING_KEYS = ("dataset", "segment_seconds", "seed", "selection_metric")


def find_checkpoint(run, name=None):
    """A checkpoint of a training, and whether it is what was tested.

    Arguments
    ---------
    run : str or Path
        Folder of the training.
    name : str or Path, optional
        Folder of the checkpoint, or its name in ``save``; by default the best
        of those made at the end of an epoch.

    Returns
    -------
    speechbrain.utils.checkpoints.Checkpoint
        The checkpoint.
    bool
        Whether it is the best.
    int or None
        The last epoch of the training.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If one is damaged.
    """
    save = Path(run) / "save"
    if name is not None and Path(name).is_dir():
        save = Path(name).parent
    checkpoints = []
    if save.is_dir():
        try:
            checkpoints = Checkpointer(save).list_checkpoints()
        except (yaml.YAMLError, LookupError, TypeError, AttributeError) as e:
            raise ValueError(
                f"{save}: a CKPT.yaml in it is damaged, take its checkpoint "
                f"out ({e})"
            ) from e
    epochs = [x for x in checkpoints if SCORE in x.meta]
    best = max(epochs, key=lambda x: x.meta[SCORE], default=None)
    chosen = best
    if name is not None:
        named = (x for x in checkpoints if x.path.name == Path(name).name)
        chosen = next(named, None)
    if chosen is None:
        raise FileNotFoundError(
            f"{name or save}: no checkpoint of a finished epoch, nor one of "
            f"that name in {save}; expected the folder of a training, as "
            "recipes/train.py leaves it"
        )
    last = max((x.meta["epoch"] for x in epochs), default=None)
    return chosen, best is not None and chosen.path == best.path, last


def measured_on_test(run):
    """What a training measured on its test songs.

    Arguments
    ---------
    run : str or Path
        Folder of the training, with ``metrics.json`` and
        ``test_results.csv``, whose columns are the metrics.

    Returns
    -------
    dict
        Name -> average; empty if it was not tested.
    int or None
        Epochs that it was trained for when it was tested.
    """
    path, table = Path(run) / "metrics.json", Path(run) / "test_results.csv"
    if not path.is_file() or not table.is_file():
        return {}, None
    results = json.loads(path.read_text(encoding="utf-8"))
    with open(table, newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file))
    numbers = {
        name: results[name]
        for name in columns
        if isinstance(results.get(name), (int, float))
    }
    return numbers, results.get("epochs")


def _load(module, path, average=False):
    """Loads a file of a checkpoint."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if average:
        del state["n_averaged"]
        state = {k.removeprefix("module."): v for k, v in state.items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error


def separator_of_run(run, checkpoint=None):
    """The separator of a training, and what its card says.

    Arguments
    ---------
    run : str or Path
        Folder of the training: ``hyperparams.yaml``, ``save`` and, for the
        card, ``metrics.json``.
    checkpoint : str or Path, optional
        Folder of a checkpoint, or its name; by default the best one. Only
        that was tested: the card of another has no test results.

    Returns
    -------
    Separator
        On the CPU, in evaluation mode.
    dict
        Sections of the card.

    Raises
    ------
    FileNotFoundError
        If it is no folder of a training, or there is no such checkpoint.
    ValueError
        If yaml and weights do not fit.
    """
    hparams_file = Path(run) / "hyperparams.yaml"
    if not hparams_file.is_file():
        raise FileNotFoundError(
            f"{hparams_file} not found: expected the folder of a training, as "
            "recipes/train.py leaves it"
        )
    chosen, is_best, last = find_checkpoint(run, checkpoint)
    separator = Separator.of_recipe(hparams_file)
    files = chosen.paramfiles
    for name, module in separator.named_children():
        if name == "masknet" and AVERAGE in files:
            _load(module, files[AVERAGE], average=True)
        elif name in files:
            _load(module, files[name])
        elif module.state_dict():
            raise ValueError(f"{chosen.path}: no weights of the {name}")
    hparams = read_recipe(hparams_file)
    training = {key: hparams[key] for key in TRAINING_KEYS if key in hparams}
    if "segment_seconds" in training:
        training["segments"] = f"{training.pop('segment_seconds')} s"
    training["epoch"] = chosen.meta.get("epoch", "unfinished")
    if SCORE in chosen.meta:
        training["validation score"] = f"{chosen.meta[SCORE]:.2f}"
    metadata = {"Training": training}
    metrics, epochs = measured_on_test(run)
    # unless it went on after its test
    if metrics and is_best and epochs in (None, last):
        metadata["Measured on the test songs"] = {
            name: f"{value:.2f}" for name, value in metrics.items()
        }
    if separator.groups is not None:
        separator.bfloat16()  # as the training leaves it
    return separator, metadata
