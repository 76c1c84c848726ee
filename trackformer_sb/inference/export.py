"""Writes a trained separator as a folder that loads everywhere.

In ``PerformerSeparation``, in SpeechBrain's ``SepformerSeparation``, and, if
it is a Performer on an STFT, in ``PerformerSeparator`` and in Asteroid.
"""

import trackformer_sb
from trackformer_sb.inference.card import separator_card, separator_title
from trackformer_sb.inference.config import plain_config
from trackformer_sb.inference.folder import (
    ASTEROID_FILE,
    node_arguments,
    read_model,
    unwrapped,
    write_model,
)
from trackformer_sb.inference.pretrained import (
    HEADER,
    NODES,
    SETTINGS,
    PerformerSeparator,
)
from trackformer_sb.inference.weights import load_state
from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder
from trackformer_sb.nnet.transfer import read_state

# What a separator of plain values is made of.
PLAIN_CLASSES = {
    "encoder": STFTEncoder,
    "masknet": PerformerMaskNet,
    "decoder": STFTDecoder,
}


def _sums_to_mixture(modules):
    """Whether the outputs sum to the mixture by themselves."""
    masknet = unwrapped(modules["masknet"])
    softmax = getattr(masknet, "mask_activation", None) == "softmax"
    return softmax and isinstance(unwrapped(modules["encoder"]), STFTEncoder)


def _config(hparams, modules, settings):
    """What config.json says, None for a separator of other parts."""
    arguments = {}
    for name, cls in PLAIN_CLASSES.items():
        if type(unwrapped(modules[name])) is not cls:
            return None
        arguments[name] = node_arguments(hparams[NODES[name]], cls)
    stft = arguments["encoder"]
    masknet = arguments["masknet"]
    if arguments["decoder"] != stft:
        raise ValueError(
            "expected Encoder and Decoder with the same n_fft and hop_length, "
            f"got {stft} and {arguments['decoder']}"
        )
    del masknet["in_channels"], masknet["checkpointing"]
    return plain_config({**settings, **stft, **masknet})


def _check_plain(folder):
    """Loads what needs no yaml; Asteroid itself may not be installed."""
    separator = PerformerSeparator.from_pretrained(folder)
    path = folder / ASTEROID_FILE
    load_state(separator, read_state(path)["state_dict"], path)


def export_separator(hparams_file, modules, folder, metadata=None):
    """Writes the folder of a trained separator.

    It loads in ``PerformerSeparation`` and, as it is, in SpeechBrain's own
    ``SepformerSeparation``; a Performer on an STFT has ``config.json`` and
    ``model.safetensors`` as well and loads in ``PerformerSeparator``, and
    ``pytorch_model.bin``, which Asteroid's ``BaseModel`` loads. Everything is
    written and loaded once beside ``folder`` before it takes its place. In a
    distributed run, call it on the main process only.

    Arguments
    ---------
    hparams_file : str or Path
        The yaml of the experiment with its references resolved, as
        ``create_experiment_directory`` leaves it: with ``Encoder``,
        ``MaskNet`` and ``Decoder`` as ``!new:`` nodes, ``sample_rate``,
        ``num_spks``, and ``mixture_consistency`` if the training had it.
        Otherwise that is on unless the masks are a softmax on the STFT.
    modules : dict
        The trained ``encoder``, ``masknet`` and ``decoder``, which may be
        wrapped by DDP or torch.compile.
    folder : str or Path
        Where to write. A separator that is there is replaced.
    metadata : dict, optional
        Sections of the model card: title -> text, or a dict as a table.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If keys or modules are missing, if a node has an absolute path, or if
        the yaml does not build modules that fit the trained ones.
    FileExistsError
        If the folder holds other files than those of a separator.
    """
    hparams = read_model(hparams_file, modules, SETTINGS, NODES)
    consistency = hparams.get(
        "mixture_consistency", not _sums_to_mixture(modules)
    )
    settings = {
        **{key: hparams[key] for key in SETTINGS},
        "mixture_consistency": bool(consistency),
    }
    title = separator_title(
        type(unwrapped(modules["masknet"])).__name__,
        settings["num_spks"],
        settings["sample_rate"],
    )
    config = _config(hparams, modules, settings)
    plain = config is not None
    return write_model(
        folder,
        hparams,
        modules,
        NODES,
        settings,
        HEADER.format(title=title, version=trackformer_sb.__version__),
        separator_card(
            title,
            settings["num_spks"],
            settings["sample_rate"],
            metadata,
            plain,
        ),
        "separator",
        config,
        _check_plain if plain else None,
    )
