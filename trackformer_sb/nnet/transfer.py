"""Pre-trained encoder weights into a masknet."""

import pathlib
import pickle

import torch
import yaml

from trackformer_sb.nnet.encoder_files import (
    ENCODER_FILE,
    SETTINGS,
    SETTINGS_FILE,
)

# The last key of an encoder's settings is among them: a file that is cut at
# the end of a line is a yaml as well.
KEYS_NEEDED = {*SETTINGS, "pretrainer"}

# What torch.load raises for a file that is cut, empty or something else.
DAMAGED = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    KeyError,
    pickle.UnpicklingError,
)


class _PlainLoader(yaml.SafeLoader):
    """Reads a HyperPyYAML file without building anything."""


_PlainLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def plain_values(text):
    """Top-level values of a HyperPyYAML text, nothing in it being executed.

    Example
    -------
    >>> plain_values("lr: 0.1\\nnet: !new:torch.nn.ReLU")
    {'lr': 0.1, 'net': None}
    """
    return yaml.load(text, _PlainLoader)


def read_state(path):
    """Reads a file of weights.

    Arguments
    ---------
    path : str or path
        File of a state dict.

    Returns
    -------
    dict
        Name -> tensor, on the CPU.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged or holds something else.
    """
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except DAMAGED as error:
            raise ValueError(
                f"{path}: no readable file of weights ({error})"
            ) from error
    if not isinstance(state, dict):
        raise ValueError(
            f"{path}: expected a dict of tensors, got {type(state).__name__}"
        )
    return state


def encoder_state(masknet):
    """The part of a masknet that pre-training provides.

    Arguments
    ---------
    masknet : PerformerMaskNet
        Any masknet with ``embedding`` and ``encoder``.

    Returns
    -------
    dict
        State of both, with the masknet's own key names.
    """
    return {
        key: value
        for key, value in masknet.state_dict().items()
        if key.startswith(("embedding.", "encoder."))
    }


def check_settings(settings, source):
    """Compares the settings of a separator with those of an encoder.

    Arguments
    ---------
    settings : dict
        Of the separator: ``sample_rate``, ``n_fft``, ``hop_length``,
        ``spec_norm``, ``d_model`` and so on. Other keys do not matter.
    source : str or path
        Folder that holds the encoder's ``hyperparams.yaml``; nothing in it is
        executed.

    Returns
    -------
    dict
        The encoder's settings; with ``songs``, if the names of what it was
        trained on are known.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, or naming all keys that differ with both
        values.
    """
    path = pathlib.Path(source) / SETTINGS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"pretrained_encoder: no {SETTINGS_FILE} in {source}"
        )
    try:
        known = plain_values(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no readable yaml ({error})") from error
    found = known.keys() if isinstance(known, dict) else set()
    if KEYS_NEEDED - found:
        raise ValueError(
            f"{path}: expected the settings of an encoder, got none of "
            f"{', '.join(sorted(KEYS_NEEDED - found))}"
        )
    different = [
        f"{key} is {value}, the separator has {settings[key]}"
        for key, value in known.items()
        if isinstance(value, (int, float, str))
        and key in settings
        and settings[key] != value
    ]
    if different:
        raise ValueError(
            f"pretrained_encoder: the encoder in {source} does not fit: "
            + "; ".join(different)
        )
    return known


def encoder_layers(masknet):
    """Parameters of a masknet that an encoder initialises, layer by layer.

    Arguments
    ---------
    masknet : PerformerMaskNet
        The masknet.

    Returns
    -------
    list of lists of torch.nn.Parameter
        Of the embedding, then of each layer; the last one's with those of the
        norm that follows it.
    """
    encoder = masknet.encoder
    layers = [masknet.embedding, *encoder.layers]
    parameters = [list(layer.parameters()) for layer in layers]
    parameters[-1] += encoder.norm.parameters()
    return parameters


def load_pretrained_encoder(masknet, source):
    """Initialises a masknet's embedding and encoder, strictly.

    Arguments
    ---------
    masknet : PerformerMaskNet
        The masknet to initialise in place.
    source : str or path
        Folder that holds ``encoder.ckpt``, a state as ``encoder_state``
        returns it.

    Returns
    -------
    list of str
        The keys that were loaded.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, or naming all missing, extra and misshapen
        keys; nothing is loaded then.
    """
    path = pathlib.Path(source) / ENCODER_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"pretrained_encoder: no {ENCODER_FILE} in {source}"
        )
    state = read_state(path)
    expected = encoder_state(masknet)
    problems = [f"missing {key}" for key in expected.keys() - state.keys()]
    problems += [f"extra {key}" for key in state.keys() - expected.keys()]
    problems += [
        f"{key} is {list(getattr(state[key], 'shape', []))}, expected "
        f"{list(expected[key].shape)}"
        for key in expected.keys() & state.keys()
        if getattr(state[key], "shape", None) != expected[key].shape
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit the masknet: {'; '.join(sorted(problems))}"
        )
    masknet.load_state_dict(state, strict=False)
    return sorted(state)
