"""Command line of the recipes: SpeechBrain's, without its surprises.

SpeechBrain's parser takes any unambiguous beginning of a run option, so that
yaml keys like ``test`` or ``log`` vanish, cuts values at each "=", and has no
way to switch a flag off. Here run options count by their full name only.
"""

import dataclasses
import difflib
import io
import json
import pathlib
import re

import yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references
from speechbrain.utils.run_opts import HELP_TEXTS, RunOptions

from trackformer_sb.nnet.transfer import plain_values
from trackformer_sb.training.settings import check_values

# some fields of RunOptions are no options of its command line
_OPTIONS = HELP_TEXTS.keys() | {"jit_module_keys", "compile_module_keys"}
_FLAGS = {name for name in _OPTIONS if RunOptions()[name] is False}


# Keys whose values are paths, be they called 2024 or 2024-05-01.
PATHS = (
    "_folder",
    "_file",
    "_log",
    "pretrained_encoder",
    "pretrained_separator",
    "shard_urls",
)


def _as_yaml(key, value):
    """One line of overrides; what is no plain yaml value is quoted."""
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        plain = value.startswith("!")
    else:
        # of a text yaml may drop a part: " #" starts a comment, "&" a name
        cut = isinstance(read, str) and read != value and value[0] not in "'\""
        number = re.fullmatch(r"[-+.\w]*\d[-+.\w]*", value)
        other = not isinstance(read, (str, list, type(None)))
        path = key.endswith(PATHS) and (number or other)
        plain = not (
            cut
            or path
            or isinstance(read, dict)
            or value.startswith(("#", "- "))
        )
    return f"{key}: {value if plain else json.dumps(value)}"


def parse_arguments(argv):
    """Splits a command line into hyperparameter file, options and overrides.

    Arguments
    ---------
    argv : list of str
        ``FILE.yaml [--key=value | --key value] ...`` with keys of the yaml or
        run options of SpeechBrain (``--device``, ``--precision``, ...).

    Returns
    -------
    hparams_file : str
        The yaml file.
    run_opts : RunOptions
        SpeechBrain's run options.
    overrides : str
        Yaml text for ``load_hparams``; with the run options that the yaml has
        as keys.

    Raises
    ------
    ValueError
        For a missing file name or value, a second file name, a flag with a
        value other than True or False, or a limit that is no number.

    Example
    -------
    >>> hparams_file, run_opts, overrides = parse_arguments(
    ...     ["train.yaml", "--data_folder=/music/a=b", "--lr", "1e-3"]
    ... )
    >>> print(overrides)
    data_folder: /music/a=b
    lr: 1e-3
    """
    words, options, overrides, hparams_file = list(argv), [], {}, None
    given = set()
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            options.append(word)
            continue
        if not word.startswith("--"):
            if hparams_file is not None:
                raise ValueError(
                    f"unexpected argument {word!r}: expected one yaml file, "
                    f"then --key=value, got {hparams_file!r} before"
                )
            hparams_file = word
            continue
        key, has_value, value = word[2:].partition("=")
        if key in _FLAGS:
            given.add(key)
            if has_value and value.lower() not in ("true", "false"):
                raise ValueError(
                    f"--{key} is a flag, expected --{key}, --{key}=True or "
                    f"--{key}=False, got {word!r}"
                )
            if value.lower() != "false":
                options.append(f"--{key}")
            continue
        if not has_value:
            if not words or words[0].startswith("--"):
                raise ValueError(f"expected a value after {word}")
            value = words.pop(0)
        if key in _OPTIONS:
            given.add(key)
            options += [f"--{key}", value]
        else:
            # given twice, the last one counts
            overrides[key] = _as_yaml(key, value)
    if hparams_file is None and not options:
        raise ValueError(
            "expected a yaml file, for example: "
            "python recipes/train.py hparams/performer_mixit.yaml"
        )
    file_argument = [] if hparams_file is None else [hparams_file]
    _, run_opts, _ = RunOptions.from_command_line_args(file_argument + options)
    limit = run_opts.optimizer_step_limit
    if limit is not None:
        # the one number that SpeechBrain's parser leaves a text
        if not limit.isdecimal():
            raise ValueError(
                f"--optimizer_step_limit: expected a number, got {limit!r}"
            )
        run_opts = dataclasses.replace(
            run_opts, optimizer_step_limit=int(limit)
        )
    # what the yaml has as well is recorded and compared with the rest of it
    for key in keys_of(hparams_file) & given:
        value = json.dumps(run_opts[key]).replace("Infinity", ".inf")
        overrides[key] = f"{key}: {value}"
    return hparams_file, run_opts, "\n".join(overrides.values())


def keys_of(hparams_file):
    """Top-level keys of a yaml file; none if there is no such file."""
    path = pathlib.Path(hparams_file or "")
    if not path.is_file():
        return set()
    return {
        line.split(":")[0]
        for line in path.read_text(encoding="utf-8").splitlines()
        if line[:1].isalpha() and ":" in line
    }


def load_hparams(hparams_file, overrides=""):
    """Loads a HyperPyYAML file with overrides.

    Arguments
    ---------
    hparams_file : str
        Path of the yaml file.
    overrides : str
        Yaml text whose keys replace those of the file.

    Returns
    -------
    dict
        The loaded hyperparameters.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        For a key that the file does not have, with the nearest ones, or a
        value of a wrong kind.
    """
    path = pathlib.Path(hparams_file)
    if not path.is_file():
        raise FileNotFoundError(
            f"no hyperparameter file {hparams_file}, expected a yaml such as "
            "hparams/performer_mixit.yaml"
        )
    known = keys_of(path)
    for line in overrides.splitlines():
        key = line.split(":")[0]
        if key not in known:
            near = difflib.get_close_matches(key, known | _OPTIONS, n=3)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else (f"its keys are {', '.join(sorted(known))}")
            )
            raise ValueError(f"unknown key {key!r} for {hparams_file}: {hint}")
    text = path.read_text(encoding="utf-8")
    resolved = resolve_references(io.StringIO(text), overrides)
    # before anything is built, and as it will be used
    resolved = resolved.getvalue()
    empty = re.findall(r"^(\w+):[ \t]*(?:#.*)?$", resolved, re.MULTILINE)
    values = {
        key: value
        for key, value in plain_values(resolved).items()
        # what is built has no value yet
        if value is not None or key in empty
    }
    check_values(values, built=False)
    hparams = load_hyperpyyaml(text, overrides)
    check_values(hparams)
    return hparams
