"""From a command line to a Brain with its data, for all recipes."""

import gc
import io
import os
import pathlib
import signal
import sys
from typing import NamedTuple

import speechbrain as sb
import torch
import yaml
from hyperpyyaml import resolve_references
from speechbrain.utils.logger import get_logger
from speechbrain.utils.run_opts import RunOptions

from trackformer_sb.data.audio import UnreadableAudio
from trackformer_sb.training.arguments import (
    PlainLoader,
    load_hparams,
    parse_arguments,
)

logger = get_logger(__name__)

# What torch says in a RuntimeError when memory on the CPU is used up.
CPU_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")


class Experiment(NamedTuple):
    """What a command line asks for."""

    hparams: dict
    run_opts: RunOptions
    # arguments of create_experiment_directory, which also keeps a copy of the
    # file that calls it
    directory: dict


def load_experiment(argv, selection_metrics):
    """Reads the command line and the yaml; writes no file.

    Arguments
    ---------
    argv : list of str
        The command line, see ``parse_arguments``.
    selection_metrics : sequence of str
        Valid values of the key ``selection_metric``.

    Returns
    -------
    Experiment
        The loaded yaml, and what it was loaded from.

    Raises
    ------
    FileNotFoundError, ValueError
        For settings that cannot work, or an output folder with checkpoints of
        another model or of other settings.
    """
    hparams_file, run_opts, overrides = parse_arguments(argv)
    hparams = load_hparams(hparams_file, overrides)
    metric = hparams.get("selection_metric", selection_metrics[0])
    if metric not in selection_metrics:
        raise ValueError(
            f"selection_metric must be one of {', '.join(selection_metrics)}, "
            f"got {metric!r}"
        )
    hparams["checkpointer"].check_fits()
    begun = hparams["checkpointer"].find_checkpoint() is not None
    # a yaml of the user's own may not have the key
    if begun and not hparams.get("allow_changes"):
        check_same(hparams_file, overrides, hparams["output_folder"])
    sb.utils.distributed.ddp_init_group(run_opts)
    directory = {
        "experiment_directory": hparams["output_folder"],
        "hyperparams_to_save": hparams_file,
        "overrides": overrides,
    }
    return Experiment(hparams, run_opts, directory)


def check_same(hparams_file, overrides, output_folder):
    """Compares an experiment with the one that its folder was begun with.

    What was trained with other settings must not get the name of these.

    Raises
    ------
    ValueError
        Naming the keys that differ, with both values.
    """
    path = pathlib.Path(output_folder) / "hyperparams.yaml"
    if not path.is_file():
        return
    text = pathlib.Path(hparams_file).read_text(encoding="utf-8")
    asked = resolve_references(io.StringIO(text), overrides).getvalue()
    asked, begun = (
        yaml.load(x, PlainLoader)
        for x in (asked, path.read_text(encoding="utf-8"))
    )
    asked, begun = dict(_flat(asked)), dict(_flat(begun))
    different = {}
    for key, value in asked.items():
        before = begun.get(key)
        if key != "allow_changes" and _plain(before) != _plain(value):
            # what refers to a key changes with it
            change = f"was {before!r}, now {value!r}"
            different.setdefault(change, f"{key} {change}")
    if different:
        raise ValueError(
            f"{output_folder} has checkpoints of an experiment with other "
            f"settings: {'; '.join(different.values())}. Choose another "
            "output_folder, or go on with these by --allow_changes=True"
        )


def _flat(tree, prefix=""):
    """Keys and values of mappings in mappings."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value):
    """Numbers have many spellings, as 1e-4 and 0.0001, and paths too."""
    if isinstance(value, list):
        return [_plain(x) for x in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return os.path.normpath(value)
    return value


def run(main):
    """Runs a recipe with one line in place of a traceback for the user.

    Raises
    ------
    SystemExit
        If the recipe fails in a way that is known, or is interrupted.
    """
    try:
        main(sys.argv[1:])
        if torch.distributed.is_initialized():
            # ranks that just exit abort now and then; what DDP holds goes first
            gc.collect()
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except (OSError, ValueError, ImportError, UnreadableAudio) as error:
        logger.debug("stopped", exc_info=True)
        message = f"{type(error).__name__}: {error}"
        if "Traceback" in message:
            # from a loader worker: the last line says what happened
            message = message.strip().splitlines()[-1]
        sys.exit(message)
    except KeyboardInterrupt:
        print(
            "interrupted; the same command goes on from its last checkpoint",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(x in str(error) for x in CPU_OUT_OF_MEMORY):
            raise
        logger.debug("stopped", exc_info=True)
        sys.exit(
            "out of memory: expected a smaller batch_size or segment_seconds, "
            f"or more memory ({str(error).splitlines()[0]})"
        )
