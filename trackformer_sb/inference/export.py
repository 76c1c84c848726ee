"""Writes a trained separator as a folder that SpeechBrain can load.

The folder holds ``hyperparams.yaml``, one file of weights per module and a
model card. It needs nothing of the experiment it comes from.
"""

import os
import shutil
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

import trackformer_sb
from trackformer_sb.nnet.stft import STFTEncoder

NODES = {"encoder": "Encoder", "masknet": "MaskNet", "decoder": "Decoder"}
SETTINGS = ("sample_rate", "num_spks")

# The Pretrainer looks for <name of the module>.ckpt beside the yaml. A path in
# the yaml would be taken from the working directory.
WEIGHTS_ENDING = ".ckpt"

HEADER = """\
# {title}
# Written by trackformer_sb {version}. To use it:
#   trackformer separate song.wav --model <this folder> --out sources
# or in Python:
#   from trackformer_sb.inference.interfaces import PerformerSeparation
#   separator = PerformerSeparation.from_hparams(source="<this folder>")
"""

FOOTER = """
modules:{modules}

audio_normalizer: !new:speechbrain.dataio.preprocess.AudioNormalizer
  sample_rate: !ref <sample_rate>
  mix: keep

# Weights are loaded strictly: SpeechBrain by itself only warns of wrong keys.
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
  loadables:{loadables}
  custom_hooks:{hooks}
"""

CARD = """\
---
library_name: speechbrain
pipeline_tag: audio-to-audio
license: apache-2.0
tags:
- speechbrain
- audio-source-separation
- music-source-separation
- unsupervised
- mixit
---

# {title}

Separates music into {num_spks} waveforms that sum to it. Trained with mixture
invariant training (MixIT, arXiv 2006.12701), which needs no separated stems.

## How to use

```python
from trackformer_sb.inference.interfaces import PerformerSeparation

separator = PerformerSeparation.from_hparams(source="path/to/this/folder")
paths = separator.separate_file("song.wav", out_folder="sources")
```

```shell
trackformer separate song.wav --model path/to/this/folder --out sources
```

SpeechBrain's `SepformerSeparation.from_hparams` loads the folder as well; its
`separate_file` scales each source to a peak of one.
{sections}
## Limits

- The outputs have no names: MixIT does not tell which of them are the drums.
  An instrument can be spread over several outputs, and several can share one.
- The model works at {sample_rate} Hz. Files of other rates are resampled;
  what it cannot represent is distributed evenly over the outputs.
- Channels share their masks, which are predicted from the mean of them.
- Long files are separated in chunks. Outputs are aligned where chunks overlap,
  so that silence or a change of the music there can swap them.
"""

LOAD_HOOK = "!name:trackformer_sb.inference.weights.load_weights"


def unwrapped(module):
    """The module inside of DDP, DataParallel and torch.compile."""
    wrappers = (
        torch.nn.parallel.DistributedDataParallel,
        torch.nn.DataParallel,
    )
    while True:
        if isinstance(module, wrappers):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            return module


def _bare(node, key):
    """A copy of a yaml node without comments and anchors.

    In a yaml read by ruamel a comment hangs on the node before it, and would
    come along. A path that exists on one machine only is refused.
    """
    if isinstance(node, dict):
        copy = CommentedMap()
        for name, value in node.items():
            copy[name] = _bare(value, f"{key}.{name}")
    elif isinstance(node, list):
        copy = CommentedSeq()
        for i, value in enumerate(node):
            copy.append(_bare(value, f"{key}[{i}]"))
        copy.fa.set_flow_style()
    else:
        text = getattr(node, "value", node)
        if isinstance(text, str) and os.path.isabs(text):
            raise ValueError(
                f"{key}: an absolute path, which exists on one machine only, "
                f"cannot be exported: {node}"
            )
        return node
    if node.tag.value is not None:
        copy.yaml_set_ctag(node.tag)
    return copy


def _read_hparams(hparams_file, keys, nodes):
    """The top-level keys of a training yaml that make up a model."""
    with open(hparams_file, encoding="utf-8") as file:
        hparams = YAML().load(resolve_references(file))
    needed = [*keys, *nodes.values()]
    missing = [key for key in needed if key not in hparams]
    if missing:
        raise ValueError(
            f"{hparams_file}: expected the keys {', '.join(needed)}, missing "
            f"{', '.join(missing)}"
        )
    for key in nodes.values():
        tag = getattr(getattr(hparams[key], "tag", None), "value", None) or ""
        if not tag.startswith("!new:"):
            raise ValueError(
                f"{hparams_file}: expected {key} to be a !new: node, got "
                f"{tag or hparams[key]!r}"
            )
    return hparams


def _sums_to_mixture(modules):
    """Whether the outputs sum to the mixture by themselves."""
    masknet = unwrapped(modules["masknet"])
    softmax = getattr(masknet, "mask_activation", None) == "softmax"
    return softmax and isinstance(unwrapped(modules["encoder"]), STFTEncoder)


def _replace_folder(new, folder):
    """Moves a finished folder into the place of another."""
    old = new.with_name(f"{new.name}.old")
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(folder, what):
    """Refuses to replace a folder that is something else than a model."""
    if not folder.exists():
        return
    for path in sorted(folder.iterdir()):
        known = path.name in ("hyperparams.yaml", "README.md")
        if not known and path.suffix != WEIGHTS_ENDING:
            raise FileExistsError(
                f"{folder} is no {what} folder, it holds {path.name}; "
                "expected an empty or a new folder"
            )


def export_separator(hparams_file, modules, folder, metadata=None):
    """Writes the folder of a trained separator.

    It loads in ``PerformerSeparation`` and, as it is, in SpeechBrain's own
    ``SepformerSeparation``. Everything is written and loaded once beside
    ``folder`` before it takes its place. In a distributed run, call it on the
    main process only.

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
    title = (
        f"{type(unwrapped(modules['masknet'])).__name__} separator: "
        f"{settings['num_spks']} outputs at {settings['sample_rate']} Hz"
    )
    header = HEADER.format(title=title, version=trackformer_sb.__version__)
    sections = card_sections(metadata or {})
    card = CARD.format(title=title, sections=sections, **settings)
    return write_model(
        folder, hparams, modules, NODES, settings, header, card, "separator"
    )


def read_model(hparams_file, modules, keys, nodes):
    """Checks that a yaml and modules are complete.

    Arguments
    ---------
    hparams_file : str or Path
        The yaml of the experiment.
    modules : dict
        The trained modules by name.
    keys : sequence of str
        Settings that the yaml must have.
    nodes : dict
        Names of modules -> keys of their ``!new:`` nodes in the yaml.

    Returns
    -------
    dict
        The yaml with its tags.

    Raises
    ------
    ValueError
        Naming what is missing.
    """
    missing = [name for name in nodes if name not in modules]
    if missing:
        raise ValueError(
            f"expected the modules {', '.join(nodes)}, missing "
            f"{', '.join(missing)}"
        )
    return _read_hparams(hparams_file, keys, nodes)


def write_model(folder, hparams, modules, nodes, settings, header, card, what):
    """Writes a model's folder, loads it once, and moves it to its place.

    Arguments
    ---------
    folder : str or Path
        Where to; a model that is there is replaced.
    hparams, modules, nodes
        As of ``read_model``.
    settings : dict
        Plain values at the head of the yaml.
    header, card : str
        First lines of the yaml, and the README.md.
    what : str
        What the folder holds, for messages.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileExistsError
        If the folder holds other files than those of a model.
    ValueError
        If a node has an absolute path, or the yaml does not build modules
        that fit the trained ones.
    """
    folder = Path(folder).resolve()
    _check_replaceable(folder, what)
    modules = {name: unwrapped(modules[name]) for name in nodes}
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write(partial, hparams, modules, nodes, settings, header, card)
        _check_loads(partial)
        _replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(folder, hparams, modules, nodes, settings, header, card):
    """Writes weights, yaml and model card."""
    weights = {
        name: {
            key: value.detach().cpu().clone()
            for key, value in module.state_dict().items()
        }
        for name, module in modules.items()
    }
    weights = {name: state for name, state in weights.items() if state}
    for name, state in weights.items():
        torch.save(state, folder / f"{name}{WEIGHTS_ENDING}")
    references = [f"\n  {name}: !ref <{key}>" for name, key in nodes.items()]
    loadables = [f"\n    {name}: !ref <{nodes[name]}>" for name in weights]
    hooks = [f"\n    {name}: {LOAD_HOOK}" for name in weights]
    yaml = YAML()
    with open(folder / "hyperparams.yaml", "w", encoding="utf-8") as file:
        file.write(header)
        yaml.dump(settings, file)
        for key in nodes.values():
            file.write("\n")
            yaml.dump({key: _bare(hparams[key], key)}, file)
        file.write(
            FOOTER.format(
                modules="".join(references),
                loadables="".join(loadables) or " {}",
                hooks="".join(hooks) or " {}",
            )
        )
    (folder / "README.md").write_text(card, encoding="utf-8")


def card_sections(metadata):
    """Sections of a model card: title -> text, or a dict as a table."""
    sections = []
    for name, content in metadata.items():
        if isinstance(content, dict):
            rows = [f"| {key} | {value} |" for key, value in content.items()]
            content = "\n".join(["| | |", "|---|---|", *rows])
        sections.append(f"\n## {name}\n\n{content}\n")
    return "".join(sections)


def _check_loads(folder):
    """Loads the folder, without touching the random state of a training."""
    with (
        torch.random.fork_rng(devices=[]),
        open(folder / "hyperparams.yaml", encoding="utf-8") as file,
    ):
        pretrainer = load_hyperpyyaml(file)["pretrainer"]
    pretrainer.collect_files(default_source=str(folder))
    pretrainer.load_collected()
