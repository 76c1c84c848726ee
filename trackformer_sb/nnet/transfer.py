"""Pre-trained encoder weights into a masknet."""

import pathlib

import torch

ENCODER_FILE = "encoder.ckpt"


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
        Naming all missing, extra and misshapen keys; nothing is loaded then.
    """
    path = pathlib.Path(source) / ENCODER_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"pretrained_encoder: no {ENCODER_FILE} in {source}"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
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
