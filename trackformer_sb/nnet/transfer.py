"""Pre-trained encoder weights into a masknet."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PREFIX = "encoder."

# What a masknet must have in common with the encoder that initialises it.
SETTINGS = (
    "sample_rate",
    "n_fft",
    "hop_length",
    "spec_norm",
    "d_model",
    "nhead",
    "num_layers",
    "n_features",
)


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


def check_settings(settings, folder):
    """Compares the settings of a separator with those of an encoder.

    Arguments
    ---------
    settings : dict
        Of the separator, of which ``SETTINGS`` count.
    folder : str or Path
        Folder that holds the encoder's ``config.json``.

    Returns
    -------
    dict
        The encoder's settings; ``songs`` are the names of what it was trained
        on.

    Raises
    ------
    ValueError
        If the file is damaged, or naming all keys that differ with both
        values.
    """
    path = Path(folder) / CONFIG_FILE
    known = json.loads(path.read_text("utf-8"))
    different = [
        f"{key} is {known[key]}, the separator has {settings[key]}"
        for key in SETTINGS
        if known.get(key) is not None
        and key in settings
        and settings[key] != known[key]
    ]
    if different:
        raise ValueError(
            f"pretrained_encoder: the encoder in {folder} does not fit: "
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
    source : str or Path
        Folder of a pre-trained encoder.

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
    path = Path(source) / WEIGHTS_FILE
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: no readable file of weights ({error})"
        ) from error
    state = {key.removeprefix(PREFIX): value for key, value in state.items()}
    expected = encoder_state(masknet)
    problems = [f"missing {key}" for key in expected.keys() - state.keys()]
    problems += [f"extra {key}" for key in state.keys() - expected.keys()]
    problems += [
        f"{key} is {list(state[key].shape)}, expected "
        f"{list(expected[key].shape)}"
        for key in expected.keys() & state.keys()
        if state[key].shape != expected[key].shape
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit the masknet: {'; '.join(sorted(problems))}"
        )
    masknet.load_state_dict(state, strict=False)
    return sorted(state)
