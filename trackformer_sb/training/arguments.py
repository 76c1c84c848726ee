"""Command line of the recipes: SpeechBrain's, without its surprises.

SpeechBrain's parser takes any unambiguous beginning of a run option, so that
yaml keys like ``test`` or ``log`` vanish, cuts values at each "=", and has no
way to switch a flag off. Here run options count by their full name only.
"""

import dataclasses
import difflib
import json
import pathlib
import re

import yaml
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.run_opts import HELP_TEXTS, RunOptions

# some fields of RunOptions are no options of its command line
_OPTIONS = HELP_TEXTS.keys() | {"jit_module_keys", "compile_module_keys"}
_FLAGS = {name for name in _OPTIONS if RunOptions()[name] is False}


class PlainLoader(yaml.SafeLoader):
    """Reads a HyperPyYAML file without building anything."""


def _untagged(loader, suffix, node):
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return suffix


PlainLoader.add_multi_constructor("!", _untagged)


def _as_yaml(key, value):
    """A value for a line of yaml: what yaml would read as text is quoted."""
    try:
        read = yaml.load(value, PlainLoader)
    except yaml.YAMLError:
        return json.dumps(value)
    # yaml drops the rest after " #", takes "a: b" apart, knows a null by its
    # absence; a folder may be called 2024
    text = isinstance(read, str) and value[0] not in "'\"!"
    text |= isinstance(read, (dict, list)) and value[0] not in "{["
    text |= value.startswith("#")
    text |= key.endswith(("_folder", "_file")) and not (
        read is None or value.startswith("!")
    )
    if text and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        # HyperPyYAML reads 1e-4 as a number
        text = key.endswith(("_folder", "_file"))
    return json.dumps(value) if text else value


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
        For a missing file name or value, a second file name, or a flag with a
        value other than True or False.

    Example
    -------
    >>> hparams_file, run_opts, overrides = parse_arguments(
    ...     ["train.yaml", "--music={max_stems: 4}", "--lr", "1e-3"]
    ... )
    >>> print(overrides)
    music: {max_stems: 4}
    lr: 1e-3
    """
    words, options, values, hparams_file = list(argv), {}, {}, None
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            RunOptions.from_command_line_args([word])
        key, has_value, value = word[2:].partition("=")
        if not word.startswith("--"):
            if hparams_file is not None:
                raise ValueError(
                    f"unexpected argument {word!r}: expected one yaml file, "
                    f"then --key=value, got {hparams_file!r} before"
                )
            hparams_file = word
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
            # given twice, the last one counts
            (options if key in _OPTIONS else values)[key] = value
    if hparams_file is None:
        raise ValueError(
            "expected a yaml file, for example: "
            "python recipes/train.py hparams/performer_mixit.yaml"
        )
    given = [hparams_file]
    for key, value in options.items():
        if value is not False:
            given += [f"--{key}"] if value is True else [f"--{key}", value]
    _, run_opts, _ = RunOptions.from_command_line_args(given)
    if run_opts.optimizer_step_limit is not None:
        # the one number that SpeechBrain's parser leaves a text
        run_opts = dataclasses.replace(
            run_opts, optimizer_step_limit=int(run_opts.optimizer_step_limit)
        )
    lines = [f"{key}: {_as_yaml(key, value)}" for key, value in values.items()]
    for key in keys_of(hparams_file) & options.keys():
        # recorded and compared with the rest of the yaml
        value = json.dumps(run_opts[key]).replace("Infinity", ".inf")
        lines.append(f"{key}: {value}")
    return hparams_file, run_opts, "\n".join(lines)


def keys_of(hparams_file):
    """Top-level keys of a yaml file; none if there is no such file."""
    path = pathlib.Path(hparams_file)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return set(re.findall(r"^([A-Za-z]\w*):", text, re.MULTILINE))


def load_hparams(hparams_file, overrides=""):
    """Loads a HyperPyYAML file with overrides.

    Arguments
    ---------
    hparams_file : str
        Path of the yaml file.
    overrides : str
        Yaml text, a line a key of the file; mappings are merged into what is
        built there: ``music: {max_stems: 4}`` adds an argument.

    Returns
    -------
    dict
        The loaded hyperparameters.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        For a key that the file does not have, with the nearest ones, or an
        argument that what it builds does not take.
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
            hint = f"did you mean {' or '.join(near)}?"
            if not near:
                hint = f"its keys are {', '.join(sorted(known))}"
            raise ValueError(f"unknown key {key!r} for {hparams_file}: {hint}")
    try:
        return load_hyperpyyaml(path.read_text(encoding="utf-8"), overrides)
    except TypeError as error:
        # of an argument that a class does not have
        words = ": ".join(map(str, error.args))
        raise ValueError(f"{hparams_file}: {words}") from error
