"""Separators out of the folder of a run."""

import csv
import json
from pathlib import Path

import torch
from speechbrain.utils.checkpoints import Checkpointer

from trackformer_sb.inference.hub import plain_values
from trackformer_sb.inference.separator import Separator

# The number by which a run keeps its best checkpoint; higher is better.
SCORE = "score"

# Weights averaged over the steps, which are better than the last ones.
AVERAGE = "ema"


def _measured(run, last):
    """Averages of the test songs; none if it went on after its test."""
    path, table = Path(run, "metrics.json"), Path(run, "test_results.csv")
    if not path.is_file() or not table.is_file():
        return {}
    results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("epochs") not in (None, last.meta["epoch"]):
        return {}
    with open(table, newline="", encoding="utf-8") as file:
        names = next(csv.reader(file))
    return {
        name: f"{results[name]:.2f}"
        for name in names
        if isinstance(results.get(name), (int, float))
    }


def separator_of_run(run, checkpoint=None):
    """The separator of a run, and the sections of its card.

    ``checkpoint`` is one of the run, by its name or folder; by default the best
    one. Only that was tested: the card of another has no test results. Raises
    FileNotFoundError if there is no such run or checkpoint, ValueError or
    RuntimeError if yaml and weights do not fit.
    """
    hparams_file = Path(run) / "hyperparams.yaml"
    separator = Separator.of_recipe(hparams_file)
    checkpointer = Checkpointer(hparams_file.with_name("save"))
    best = chosen = checkpointer.find_checkpoint(max_key=SCORE)
    if checkpoint is not None:
        name = Path(checkpoint).name
        chosen = checkpointer.find_checkpoint(
            ckpt_predicate=lambda x: x.path.name == name
        )
    if chosen is None:
        raise FileNotFoundError(
            f"{checkpoint or checkpointer.checkpoints_dir}: no checkpoint of a "
            "finished epoch, nor one of that name"
        )
    files = chosen.paramfiles
    for name, module in separator.named_children():
        average = name == "masknet" and AVERAGE in files
        file = files.get(AVERAGE if average else name)
        if file is not None:
            state = torch.load(file, map_location="cpu", weights_only=True)
            if average:
                del state["n_averaged"]
                state = {k.removeprefix("module."): v for k, v in state.items()}
            module.load_state_dict(state)
        elif module.state_dict():
            raise ValueError(f"{chosen.path}: no weights of the {name}")
    hparams = plain_values(hparams_file.read_text("utf-8"))
    training = {
        "dataset": hparams["dataset"],
        "segments": f"{hparams['segment_seconds']} s",
        "seed": hparams["seed"],
        "epoch": chosen.meta.get("epoch", "unfinished"),
    }
    if "selection_metric" in hparams:
        training["selection_metric"] = hparams["selection_metric"]
    if SCORE in chosen.meta:
        training["validation score"] = f"{chosen.meta[SCORE]:.2f}"
    metadata = {"Training": training}
    last = checkpointer.find_checkpoint(max_key="epoch")
    if chosen == best and (measured := _measured(run, last)):
        metadata["Measured on the test songs"] = measured
    if separator.groups is not None:
        separator.bfloat16()  # as the training leaves it
    return separator, metadata
