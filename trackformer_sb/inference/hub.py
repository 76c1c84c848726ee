"""Pre-trained models by their yaml: in a local folder, or on the hub."""

import os
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml.error import YAMLError
from speechbrain.inference.interfaces import Pretrained
from speechbrain.utils.fetching import (
    FetchConfig,
    FetchFrom,
    FetchSource,
    LocalStrategy,
    fetch,
    guess_source,
)

from trackformer_sb.inference.download import model_file
from trackformer_sb.inference.folder import SAFETENSORS_FILE
from trackformer_sb.inference.weights import (
    SafetensorsPretrainer,
    load_weights,
)


def fetched_file(
    source,
    filename,
    what="separator",
    savedir=None,
    local_strategy=LocalStrategy.COPY,
    fetch_config=None,
):
    """The local path of one file of a model, in SpeechBrain's terms.

    Arguments
    ---------
    source : str or Path or FetchSource
        Folder, or id on the hub.
    filename : str
        Name of the file in it.
    what : str
        What the folder holds, for messages.
    savedir, local_strategy, fetch_config
        Where to put what comes from the hub, see ``fetch`` of SpeechBrain.

    Returns
    -------
    Path
        The file; a local one stays where it is.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, model, revision or file.
    OSError
        If the hub cannot be reached or refuses, or a download is broken.
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    fetch_config = fetch_config or FetchConfig()
    fetch_from, place = guess_source(source)
    if fetch_from == FetchFrom.LOCAL:
        return model_file(place, filename, what)
    if fetch_from == FetchFrom.HUGGING_FACE:
        kept = None if savedir is None else Path(savedir) / filename
        renewed = fetch_config.overwrite or fetch_config.allow_updates
        if kept is not None and kept.exists() and not renewed:
            return kept.absolute()
        path = model_file(
            place,
            filename,
            what,
            revision=fetch_config.revision,
            token=fetch_config.token,
            cache_dir=fetch_config.huggingface_cache_dir,
            local_files_only=not fetch_config.allow_network,
        )
        if kept is None:
            return path
        # SpeechBrain puts it into savedir
        source = FetchSource(FetchFrom.LOCAL, str(path.parent))
    try:
        return Path(
            fetch(
                filename,
                source,
                savedir=savedir,
                local_strategy=local_strategy,
                fetch_config=fetch_config,
            )
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{place} could not be fetched: {error}"
        ) from error


def is_local(source):
    """Whether a source is a folder of this machine."""
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    return guess_source(source)[0] == FetchFrom.LOCAL


def _check_covered(pretrainer, modules, path):
    """Refuses a yaml that leaves a module with the weights it was born with."""
    loaded = [id(module) for module in pretrainer.loadables.values()]
    untrained = [
        name
        for name, module in modules.items()
        if module.state_dict() and id(module) not in loaded
    ]
    if untrained:
        raise ValueError(
            f"{path}: the pretrainer loads no weights for "
            f"{', '.join(untrained)}"
        )


def load_strictly(
    source,
    hparams_file="hyperparams.yaml",
    savedir=None,
    overrides=None,
    overrides_must_match=True,
    local_strategy=LocalStrategy.COPY,
    fetch_config=None,
    what="separator",
):
    """Loads a yaml and all its weights, strictly.

    SpeechBrain's ``pretrained_from_hparams`` only warns of wrong or missing
    keys and then runs on random weights.

    Arguments
    ---------
    source, hparams_file, savedir, overrides, overrides_must_match
        As of ``Pretrained.from_hparams``; a local folder is read where it is.
    local_strategy, fetch_config
        How files come from the hub.
    what : str
        What the folder holds, for messages.

    Returns
    -------
    dict
        The loaded yaml, its ``modules`` with their weights.

    Raises
    ------
    FileNotFoundError
        If the folder, its yaml or its weights do not exist.
    ValueError
        If the yaml or the weights are damaged, or do not fit each other.
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    collect_in = None if is_local(source) else savedir
    how = {
        "local_strategy": local_strategy,
        "fetch_config": fetch_config or FetchConfig(),
    }
    path = fetched_file(source, hparams_file, what, collect_in, **how)
    try:
        with open(path, encoding="utf-8") as file:
            hparams = load_hyperpyyaml(file, overrides, overrides_must_match)
    except (YAMLError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: no usable yaml ({reason})") from error
    for key in ("modules", "pretrainer"):
        if key not in hparams:
            inner = os.path.join(source, "separator")
            hint = f", as in {inner}" if os.path.isdir(inner) else ""
            raise ValueError(f"{path}: expected the key {key}{hint}")
    hparams["savedir"] = savedir
    pretrainer = hparams["pretrainer"]
    pretrainer.add_custom_hooks(
        {
            name: load_weights
            for name, loadable in pretrainer.loadables.items()
            if isinstance(loadable, torch.nn.Module)
            and name not in pretrainer.custom_hooks
        }
    )
    _check_covered(pretrainer, hparams["modules"], path)
    if guess_source(source)[0] == FetchFrom.HUGGING_FACE:
        # fetched and checked here: the Pretrainer finds them on disk
        files = [
            f"{name}.ckpt"
            for name in pretrainer.loadables
            if name not in pretrainer.paths and pretrainer.is_loadable(name)
        ]
        if isinstance(pretrainer, SafetensorsPretrainer):
            files = [SAFETENSORS_FILE]
        for name in files:
            fetched_file(source, name, what, collect_in, **how)
        source = str(path.parent)
        # beside the yaml they are already where they belong
        collect_in = collect_in if pretrainer.paths else None
    pretrainer.set_collect_in(collect_in)
    pretrainer.collect_files(default_source=source, **how)
    pretrainer.load_collected()
    return hparams


class StrictPretrained(Pretrained):
    """A ``Pretrained`` whose weights fit exactly or are refused."""

    # what its folder holds, for messages
    what = "model"

    @classmethod
    def from_hparams(
        cls,
        source,
        hparams_file="hyperparams.yaml",
        savedir=None,
        overrides=None,
        overrides_must_match=True,
        local_strategy=LocalStrategy.COPY,
        fetch_config=None,
        **kwargs,
    ):
        """Loads a model from a folder or the hub, with strict weights.

        A local folder is read where it is; nothing is copied or linked. The
        yaml of a model can run any code: only load what you trust.

        Arguments
        ---------
        source : str or Path or FetchSource
            Folder as training writes it, or an id on the hub.
        hparams_file : str
            Name of the yaml in it.
        savedir : str or Path, optional
            Where to put the files of a model on the hub; by default they stay
            in the cache.
        overrides : dict, optional
            Changes to the yaml.
        overrides_must_match : bool
            Whether each override must replace a key.
        local_strategy : LocalStrategy
            How files get from the cache to ``savedir``.
        fetch_config : FetchConfig, optional
            Revision, token and network access for the hub.
        **kwargs : dict
            ``run_opts={"device": ...}`` and ``freeze_params``.

        Returns
        -------
        Pretrained
            The model, in evaluation mode unless ``freeze_params`` is False.

        Raises
        ------
        FileNotFoundError
            If the folder, its yaml or its weights do not exist.
        ValueError
            If the weights are damaged or do not fit the modules exactly.
        """
        hparams = load_strictly(
            source,
            hparams_file,
            savedir,
            overrides,
            overrides_must_match,
            local_strategy,
            fetch_config,
            cls.what,
        )
        return cls(modules=hparams["modules"], hparams=hparams, **kwargs)
