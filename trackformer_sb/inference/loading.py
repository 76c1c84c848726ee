"""A separator from any folder or hub id, by its safest files."""

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from speechbrain.utils.logger import get_logger

from trackformer_sb.inference.config import is_ours, read_json
from trackformer_sb.inference.download import model_file
from trackformer_sb.inference.folder import CONFIG_FILE
from trackformer_sb.inference.hub import is_local
from trackformer_sb.inference.interfaces import PerformerSeparation
from trackformer_sb.inference.pretrained import PerformerSeparator
from trackformer_sb.inference.separator import (
    YAML_FILE,
    Separator,
    resolved,
)

logger = get_logger(__name__)


def load_separator(source, device=None, trust_yaml=False):
    """Loads a separator, without running its code where that is possible.

    Arguments
    ---------
    source : str or Path
        Folder as training leaves it, an id on the hub, or "default": the
        separator that the package brings.
    device : str, optional
        Where to put it; by default a GPU if there is one.
    trust_yaml : bool
        Whether a model on the hub may be loaded by its ``hyperparams.yaml``,
        which can run any code.

    Returns
    -------
    PerformerSeparation
        From ``config.json`` if this library wrote one. Else from the yaml;
        that of a folder with a warning.
    str
        The name of that file.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, model or file.
    OSError
        If the hub cannot be reached or refuses, or a download is broken.
    ValueError
        If it does not load, there is no CUDA device, or it has a yaml only
        and is not trusted.
    """
    cuda = torch.cuda.is_available()
    if device is None:
        device = "cuda" if cuda else "cpu"
    if str(device).startswith("cuda") and not cuda:
        raise ValueError(f"device {device}: torch finds no CUDA device")
    # SpeechBrain warns of "cuda" without a number
    run_opts = {"device": "cuda:0" if device == "cuda" else str(device)}
    source = resolved(source)
    try:
        plain = is_ours(model_file(source, CONFIG_FILE))
    except FileNotFoundError as error:
        unknown = isinstance(error.__cause__, LocalEntryNotFoundError)
        if unknown and not trust_yaml:
            raise  # without the hub nobody knows whether it has one
        plain = False
    if not plain:
        model_file(source, YAML_FILE)  # first of all it has to be there
        danger = (
            f"{source} has no {CONFIG_FILE} of this library, only a "
            f"{YAML_FILE}, which can run any code"
        )
        if not trust_yaml and not is_local(source):
            raise ValueError(f"{danger}: loaded with trust_yaml only")
        if not trust_yaml:
            logger.warning(danger)
        separator = PerformerSeparation.from_hparams(source, run_opts=run_opts)
        return separator, YAML_FILE
    if "classes" in read_json(model_file(source, CONFIG_FILE)):
        separator = Separator.from_pretrained(source).interface(run_opts)
        return separator, CONFIG_FILE
    model = PerformerSeparator.from_pretrained(source)
    separator = PerformerSeparation(
        modules=dict(model.named_children()),
        hparams=dict(model.config),
        run_opts=run_opts,
    )
    return separator, CONFIG_FILE
