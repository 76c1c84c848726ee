"""From a command line to a Brain with its data, for all recipes.

SpeechBrain's parser takes any unambiguous beginning of a run option, so that
yaml keys like ``test`` or ``log`` vanish, cuts values at each "=", and has no
way to switch a flag off. Here run options count by their full name only.
"""

import dataclasses
import difflib
import gc
import inspect
import io
import os
import pathlib
import pydoc
import re
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml import YAML, Loader, YAMLError
from speechbrain.utils.logger import get_logger
from speechbrain.utils.run_opts import HELP_TEXTS, RunOptions

from trackformer_sb.audio import UnreadableAudio
from trackformer_sb.inference.hub import plain_values
from trackformer_sb.inference.separator import find_device
from trackformer_sb.paths import expanded
from trackformer_sb.training.lock import locked

logger = get_logger(__name__)

# How torch, C++ and Python say it, on a GPU or a CPU.
OUT_OF_MEMORY = re.compile(
    "out of memory|not enough memory|(can't|cannot) allocate memory"
    "|bad_alloc|MemoryError",
    re.IGNORECASE,
)
# What torch says of a loader worker that was killed, by its number.
LOST_WORKER = "DataLoader worker (pid"
# some fields of RunOptions are no options of its command line
_OPTIONS = HELP_TEXTS.keys() | {"jit_module_keys", "compile_module_keys"}
# Where things lie, and how long it goes on, makes no other run of it.
_NO_SETTINGS = re.compile(
    r".*(folders?|file|dir)|number_of_epochs|.*\bepoch_counter\.limit"
    "|allow_changes"
)
_FLAGS = {name for name in _OPTIONS if RunOptions()[name] is False}


def _read_value(key, text):
    """Words and what is marked as yaml reads them, all else is text."""
    word = re.fullmatch(r"[+-]?\.?\w[\w.+-]*", text)
    marked = text in ("", "null") or text.startswith("!")
    if key.endswith(("_folder", "_file")) and not marked:
        return text  # a folder may be called 2024
    marked = marked or text.startswith(("{", "[", "'", '"'))
    return YAML().load(text) if word or marked else text


def parse_arguments(argv):
    """Splits a command line into yaml file, run options and overrides.

    It has keys of the yaml and run options of SpeechBrain (``--device``,
    ``--precision``, ...), as ``--key=value`` or ``--key value``. Those run
    options that the yaml has as keys are among the overrides as well.

    Example
    -------
    >>> hparams_file, run_opts, overrides = parse_arguments(
    ...     ["train.yaml", "--data_folder=a=b", "--lr", "1e-3", "--compile"]
    ... )
    >>> run_opts.compile, overrides
    (True, {'data_folder': 'a=b', 'lr': 0.001})
    """
    words, options, overrides, hparams_file = list(argv), {}, {}, None
    while words:
        word = words.pop(0)
        key, has_value, value = word[2:].partition("=")
        if word in ("-h", "--help"):
            RunOptions.from_command_line_args([word])
        elif not word.startswith("--"):
            if hparams_file is not None:
                raise ValueError(
                    f"unexpected argument {word!r}: expected one yaml file, "
                    f"then --key=value, got {hparams_file!r} before"
                )
            hparams_file = expanded(word)
        elif key in _FLAGS:
            if value.lower() not in ("", "true", "false"):
                raise ValueError(
                    f"--{key} is a flag, expected --{key}, --{key}=True or "
                    f"--{key}=False, got {word!r}"
                )
            options[key] = value.lower() != "false"
        else:
            if not has_value:
                if not words or words[0].startswith("--"):
                    raise ValueError(f"expected a value after {word}")
                value = words.pop(0)
            if key in _OPTIONS:
                options[key] = value
            else:
                overrides[key] = _read_value(key, value)
    if hparams_file is None:
        raise ValueError(
            "expected a yaml file, for example: "
            "python recipes/train.py hparams/performer_mixit.yaml"
        )
    given = [hparams_file]
    for key, value in options.items():
        if value is not False:
            given += [f"--{key}"] if value is True else [f"--{key}", value]
    if "device" in options:
        find_device(options["device"])
    _, run_opts, _ = RunOptions.from_command_line_args(given)
    if run_opts.optimizer_step_limit is not None:
        # the one number that SpeechBrain's parser leaves a text
        run_opts = dataclasses.replace(
            run_opts, optimizer_step_limit=int(run_opts.optimizer_step_limit)
        )
    for key in keys_of(hparams_file) & options.keys():
        # recorded and compared with the rest of the yaml
        overrides[key] = run_opts[key]
    return hparams_file, run_opts, overrides


def keys_of(hparams_file):
    """Top-level keys of a yaml file; none if there is no such file."""
    path = pathlib.Path(hparams_file)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return set(re.findall(r"^([A-Za-z]\w*):", text, re.MULTILINE))


def check_keys(hparams_file, keys):
    """Raises ValueError for a key that a yaml does not have."""
    known = keys_of(hparams_file)
    for key in keys - known:
        near = difflib.get_close_matches(key, known | _OPTIONS, n=3)
        hint = f"did you mean {' or '.join(near)}?"
        if not near:
            hint = f"its keys are {', '.join(sorted(known))}"
        raise ValueError(f"unknown key {key!r} for {hparams_file}: {hint}")


def _check_arguments(text, overrides):
    """Raises ValueError for an argument that what a yaml builds has not."""
    built = re.findall(r"^(\w+): *!(?:new|name):([\w.]+)", text, re.MULTILINE)
    for key, place in built:
        if not isinstance(overrides.get(key), dict):
            continue
        known = inspect.signature(pydoc.locate(place)).parameters
        open_ended = any(x.kind is x.VAR_KEYWORD for x in known.values())
        unknown = sorted(overrides[key].keys() - known.keys())
        if unknown and not open_ended:
            raise ValueError(
                f"--{key}: {place} has no argument {unknown[0]!r}, expected "
                f"one of {', '.join(known)}"
            )


class _Loader(Loader):
    """Puts ~ and environment variables into all text."""


_Loader.add_constructor(
    "tag:yaml.org,2002:str",
    lambda loader, node: expanded(loader.construct_scalar(node)),
)


def load_hparams(hparams_file, overrides=None):
    """Loads a HyperPyYAML file with overrides, key -> value.

    In text, ~ and environment variables are replaced by their values.
    Mappings are merged into what is built there: ``{"music": {"max_stems":
    4}}`` adds an argument. Raises FileNotFoundError or ValueError where there
    is no such file or key, or what is built does not take an argument.
    """
    path, overrides = pathlib.Path(hparams_file), overrides or {}
    text = path.read_text(encoding="utf-8")
    check_keys(path, overrides.keys())
    _check_arguments(text, overrides)
    try:
        return load_hyperpyyaml(text, overrides, loader=_Loader)
    except TypeError as error:
        # of an argument that a class cannot take
        words = ": ".join(map(str, error.args))
        raise ValueError(f"{hparams_file}: {words}") from error


class Experiment(NamedTuple):
    """What a command line asks for."""

    hparams: dict
    # the same without what it builds, see plain_values
    values: dict
    run_opts: RunOptions
    # arguments of create_experiment_directory, which also keeps a copy of the
    # file that calls it
    directory: dict


@contextmanager
def load_experiment(argv, selection_metrics):
    """Reads the command line and the yaml; keeps other runs out meanwhile.

    `argv` is as of ``parse_arguments``, `selection_metrics` are valid values of
    the key ``selection_metric``. Yields an Experiment. Raises FileExistsError
    if another run is at work in the output folder, FileNotFoundError or
    ValueError for settings that cannot work, or an output folder with
    checkpoints of other settings.
    """
    hparams_file, run_opts, overrides = parse_arguments(argv)
    hparams = load_hparams(hparams_file, overrides)
    if run_opts.debug:
        # a few batches must not replace the results of a run
        folder = os.path.join(hparams["output_folder"], "debug")
        overrides["output_folder"] = folder
        hparams = load_hparams(hparams_file, overrides)
    metric = hparams.get("selection_metric", selection_metrics[0])
    if metric not in selection_metrics:
        raise ValueError(
            f"selection_metric must be one of {', '.join(selection_metrics)}, "
            f"got {metric!r}"
        )
    directory = {
        "experiment_directory": hparams["output_folder"],
        "hyperparams_to_save": hparams_file,
        "overrides": overrides,
        # a list of packages, which takes seconds
        "save_env_desc": not run_opts.debug,
    }
    text = pathlib.Path(hparams_file).read_text(encoding="utf-8")
    text = resolve_references(io.StringIO(text), overrides).getvalue()
    values = plain_values(text)
    # one for all ranks, of which the first alone writes
    first = not sb.utils.distributed.get_rank()
    with locked(hparams["output_folder"]) if first else nullcontext():
        if must_be_same(hparams):
            _check_same(values, hparams["output_folder"])
        sb.utils.distributed.ddp_init_group(run_opts)
        yield Experiment(hparams, values, run_opts, directory)


def must_be_same(hparams):
    """Whether a run goes on that may not be changed."""
    begun = hparams["checkpointer"].find_checkpoint() is not None
    # a yaml of the user's own may not have the key
    return begun and not hparams.get("allow_changes")


def _check_same(values, output_folder):
    """Refuses to train with other settings under the name of the first ones."""
    path = pathlib.Path(output_folder) / "hyperparams.yaml"
    begun = dict(_flat(plain_values(path.read_text(encoding="utf-8"))))
    different = {}
    for key, value in _flat(values):
        if not _NO_SETTINGS.fullmatch(key) and begun.get(key) != value:
            # what refers to a key changes with it
            change = f"was {begun.get(key)!r}, now {value!r}"
            different.setdefault(change, f"{key} {change}")
    if different:
        raise ValueError(
            f"{output_folder} has checkpoints of an experiment with other "
            f"settings: {'; '.join(different.values())}. Choose another "
            "output_folder, or go on with these by --allow_changes=True"
        )


def _flat(tree, prefix=""):
    """Keys and values of mappings in mappings; "a/" and "a" are one path."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            is_text = isinstance(value, str)
            value = os.path.normpath(value) if is_text else value
            yield f"{prefix}{key}", value


def run(main):
    """Runs a recipe; ends it with one line, no traceback, where it may fail."""
    # what ends a run on a cluster is told as what ends it by hand
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        try:
            main(sys.argv[1:])
        except ConnectionError:
            # a loader worker died: torch says so as soon as it is told
            time.sleep(1)
            raise
        if torch.distributed.is_initialized():
            # ranks that just exit abort now and then; what DDP holds goes first
            gc.collect()
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except KeyboardInterrupt:
        print(
            "interrupted; the same command goes on from its last checkpoint",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)
    except (
        *(OSError, ValueError, ImportError),
        *(RuntimeError, MemoryError, YAMLError),
    ) as error:
        message = f"{type(error).__name__}: {error}"
        if "Traceback" in message:
            # from a loader worker: the last line says what happened
            message = message.strip().splitlines()[-1]
        if OUT_OF_MEMORY.search(message):
            message = (
                "out of memory: expected a smaller batch_size or "
                f"segment_seconds, or more memory ({message.splitlines()[0]})"
            )
        elif LOST_WORKER in message or isinstance(error, ConnectionError):
            message = (
                "a loader worker died, as a system short of memory ends it: "
                "expected fewer num_workers, a smaller batch_size or "
                "segment_seconds, or more memory; the same command goes on "
                f"from its last checkpoint ({message})"
            )
        elif isinstance(error, RuntimeError) and not isinstance(
            error, UnreadableAudio
        ):
            raise
        logger.debug("stopped", exc_info=True)
        sys.exit(message)
