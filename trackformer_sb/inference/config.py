"""A separator in plain values: ``config.json``, and what Asteroid takes."""

import inspect
import json
import sys

import torch

import trackformer_sb
from trackformer_sb.nnet.masknet import PerformerMaskNet

LIBRARY = "trackformer_sb"
ABOUT = ("library_name", "library_version")

# The name under which Asteroid knows the class, see trackformer_sb.asteroid.
ASTEROID_MODEL = "PerformerSeparatorModel"


def masknet_arguments():
    """The arguments of the masknet that are its own, with their defaults.

    Example
    -------
    >>> masknet_arguments()["spec_norm"]
    'zscore'
    """
    return {
        name: parameter.default
        for name, parameter in inspect.signature(
            PerformerMaskNet
        ).parameters.items()
        # how it is trained says nothing of what it computes
        if name not in ("in_channels", "num_spks", "checkpointing")
    }


# Keys of config.json, each with a value of the type that is expected.
EXAMPLES = {
    "sample_rate": 44100,
    "num_spks": 8,
    "mixture_consistency": False,
    "n_fft": 1024,
    "hop_length": 256,
    **masknet_arguments(),
}


def _wrong_value(value, example):
    """What is expected instead of a value, or None if it is right."""
    if isinstance(example, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(example, str):
        return None if isinstance(value, str) else "a text"
    if isinstance(example, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # an integer of json may be larger than any float
        right = number and abs(value) <= sys.float_info.max
        return None if right else "a number"
    whole = isinstance(value, int) and not isinstance(value, bool)
    if example is None:
        right = value is None or (whole and value > 0)
        return None if right else "a positive whole number or null"
    return None if whole and value > 0 else "a positive whole number"


def plain_config(values):
    """What ``config.json`` says of a separator.

    Arguments
    ---------
    values : dict
        All keys of ``EXAMPLES``, see ``PerformerSeparator``.

    Returns
    -------
    dict
        The values, with name and version of this library.

    Raises
    ------
    ValueError
        Naming what is missing, unknown or of another type.
    """
    return {
        "library_name": LIBRARY,
        "library_version": trackformer_sb.__version__,
        **_checked(values, "the separator"),
    }


def asteroid_conf(config, state):
    """A separator as Asteroid's ``BaseModel.from_pretrained`` takes it.

    Arguments
    ---------
    config : dict
        Of ``plain_config``.
    state : dict
        Name -> tensor, with the names of ``PerformerSeparator``.

    Returns
    -------
    dict
        ``model_name``, ``model_args``, ``state_dict`` and ``infos``. A file
        of it opens with ``weights_only``: versions are texts, where Asteroid
        has an object of torch.

    Example
    -------
    >>> conf = asteroid_conf({"library_name": LIBRARY, "num_spks": 4}, {})
    >>> conf["model_args"]
    {'num_spks': 4}
    """
    return {
        "model_name": ASTEROID_MODEL,
        "model_args": {
            key: value for key, value in config.items() if key not in ABOUT
        },
        "state_dict": dict(state),
        "infos": {
            "software_versions": {
                "torch_version": str(torch.__version__),
                f"{LIBRARY}_version": trackformer_sb.__version__,
            }
        },
    }


def _checked(values, where):
    """The values of all keys, in their order."""
    problems = [f"missing {key}" for key in EXAMPLES if key not in values]
    problems += [f"unknown {key}" for key in values if key not in EXAMPLES]
    for key, example in EXAMPLES.items():
        expected = _wrong_value(values.get(key), example)
        if key in values and expected:
            problems.append(f"{key}: expected {expected}, got {values[key]!r}")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}")
    return {key: values[key] for key in EXAMPLES}


def read_json(path):
    """The content of a JSON file.

    Raises
    ------
    ValueError
        If it is none.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no readable JSON ({error})") from error


def _library(config):
    """Whose config it is."""
    return config.get(ABOUT[0]) if isinstance(config, dict) else None


def is_ours(path):
    """Whether a ``config.json`` is that of a separator of this library.

    Models of SpeechBrain on the hub may have one with other content.

    Arguments
    ---------
    path : str or Path
        The file.

    Returns
    -------
    bool
        Whether it names this library; nothing else is checked.

    Raises
    ------
    ValueError
        If it is no JSON.
    """
    return _library(read_json(path)) == LIBRARY


def read_config(path):
    """Reads a ``config.json``.

    Arguments
    ---------
    path : str or Path
        The file.

    Returns
    -------
    dict
        Arguments of ``PerformerSeparator``.

    Raises
    ------
    ValueError
        If it is no JSON, of another library, or keys are missing, unknown or
        of another type.
    """
    config = read_json(path)
    library = _library(config)
    if library != LIBRARY:
        raise ValueError(
            f"{path}: expected the config of a separator, with library_name "
            f"{LIBRARY}, got {library!r}"
        )
    values = {key: config[key] for key in config if key not in ABOUT}
    return _checked(values, path)
