"""Writes a trained model as a folder that SpeechBrain can load.

The folder holds ``hyperparams.yaml``, one file of weights per module and a
model card. It needs nothing of the experiment it comes from. A model that is
described by plain values has ``config.json`` and ``model.safetensors`` too,
and ``pytorch_model.bin`` for Asteroid.
"""

import inspect
import io
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from safetensors.torch import save

from trackformer_sb.inference.config import asteroid_conf

# The Pretrainer looks for <name of the module>.ckpt beside the yaml. A path in
# the yaml would be taken from the working directory.
WEIGHTS_ENDING = ".ckpt"

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
# Asteroid asks the hub for this name and no other.
ASTEROID_FILE = "pytorch_model.bin"
# what file managers leave in any folder
DESKTOP_FILES = {".DS_Store", "Thumbs.db", "desktop.ini"}
KNOWN_FILES = (
    "hyperparams.yaml",
    "README.md",
    CONFIG_FILE,
    SAFETENSORS_FILE,
    ASTEROID_FILE,
)

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


def bare_node(node, key):
    """A copy of a yaml node without comments and anchors.

    In a yaml read by ruamel a comment hangs on the node before it, and would
    come along.

    Arguments
    ---------
    node : CommentedMap, CommentedSeq or scalar
        Of ``read_nodes``.
    key : str
        Its name, for messages.

    Returns
    -------
    CommentedMap, CommentedSeq or scalar
        The copy.

    Raises
    ------
    ValueError
        If it holds a path that exists on one machine only.
    """
    if isinstance(node, dict):
        copy = CommentedMap()
        for name, value in node.items():
            copy[name] = bare_node(value, f"{key}.{name}")
    elif isinstance(node, list):
        copy = CommentedSeq()
        for i, value in enumerate(node):
            copy.append(bare_node(value, f"{key}[{i}]"))
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


def read_nodes(hparams_file, keys, nodes):
    """The yaml of a training, of which nothing is built.

    Arguments
    ---------
    hparams_file : str or Path
        The yaml.
    keys : sequence of str
        Settings that it must have.
    nodes : dict
        Names of modules -> keys of their ``!new:`` nodes.

    Returns
    -------
    dict
        The yaml with its tags.

    Raises
    ------
    ValueError
        If a key is missing, or a module is no ``!new:`` node.
    """
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


@contextmanager
def replaced_folder(folder, what, nodes):
    """A new folder, which takes its place when all is in it.

    Arguments
    ---------
    folder : Path
        Where to; a model that is there is replaced.
    what : str
        What the folder holds, for messages.
    nodes : iterable of str
        Names of its modules.

    Yields
    ------
    Path
        The folder to fill, beside it.

    Raises
    ------
    FileExistsError
        If the folder holds other files than those of a model.
    """
    _check_replaceable(folder, what, nodes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(folder, what, nodes):
    """Refuses to replace a folder that is something else than such a model."""
    if not folder.exists():
        return
    known = {*KNOWN_FILES, *(f"{name}{WEIGHTS_ENDING}" for name in nodes)}
    found = sorted({path.name for path in folder.iterdir()} - DESKTOP_FILES)
    foreign = [name for name in found if name not in known]
    if found and "hyperparams.yaml" not in found:
        foreign = foreign or found
    elif found:
        text = (folder / "hyperparams.yaml").read_text(encoding="utf-8")
        modules = re.search(r"^modules:\n((?:  .*\n)+)", text, re.M)
        names = re.findall(r"^  (\w+):", modules[1], re.M) if modules else []
        if set(names) != set(nodes):
            foreign = foreign or ["another hyperparams.yaml"]
    if foreign:
        raise FileExistsError(
            f"{folder} is no {what} folder, it holds {foreign[0]}; expected "
            "an empty or a new folder"
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
    return read_nodes(hparams_file, keys, nodes)


def write_model(
    folder,
    hparams,
    modules,
    nodes,
    settings,
    header,
    card,
    what,
    config=None,
    check=None,
):
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
    config : dict, optional
        What ``config.json`` says, for a model of plain values.
    check : callable, optional
        Is called with the written folder, beside loading its yaml, before it
        takes its place.

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
    modules = {name: unwrapped(modules[name]) for name in nodes}
    with replaced_folder(folder, what, nodes) as partial:
        write_files(partial, hparams, modules, nodes, settings, header, config)
        (partial / "README.md").write_text(card, encoding="utf-8")
        # without touching the random state of a training
        with torch.random.fork_rng(devices=[]):
            _check_loads(partial)
            if check is not None:
                check(partial)
    return folder


def write_files(folder, hparams, modules, nodes, settings, header, config=None):
    """Writes a model's files but its card, see ``write_model``."""
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
    if config is not None:
        text = json.dumps(config, indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        flat = {
            f"{name}.{key}": value.contiguous()
            for name, state in weights.items()
            for key, value in state.items()
        }
        # save_file would leave it to its owner alone
        content = save(flat, {"format": "pt"})
        (folder / SAFETENSORS_FILE).write_bytes(content)
        torch.save(asteroid_conf(config, flat), folder / ASTEROID_FILE)
    references = [f"\n  {name}: !ref <{key}>" for name, key in nodes.items()]
    loadables = [f"\n    {name}: !ref <{nodes[name]}>" for name in weights]
    hooks = [f"\n    {name}: {LOAD_HOOK}" for name in weights]
    yaml = YAML()
    with open(folder / "hyperparams.yaml", "w", encoding="utf-8") as file:
        file.write(header)
        yaml.dump(settings, file)
        for key in nodes.values():
            file.write("\n")
            yaml.dump({key: bare_node(hparams[key], key)}, file)
        file.write(
            FOOTER.format(
                modules="".join(references),
                loadables="".join(loadables) or " {}",
                hooks="".join(hooks) or " {}",
            )
        )


def node_arguments(node, cls):
    """The arguments that a ``!new:`` node gives to a class.

    Arguments
    ---------
    node : CommentedMap, CommentedSeq or scalar
        Of ``read_model``; keyword arguments, positional ones, or none.
    cls : type
        The class that it builds.

    Returns
    -------
    dict
        All arguments of the class, with its defaults.

    Example
    -------
    >>> from trackformer_sb.nnet.stft import STFTEncoder
    >>> node_arguments({"n_fft": 512}, STFTEncoder)
    {'n_fft': 512, 'hop_length': 256}
    """
    args, kwargs = [], {}
    if isinstance(node, (dict, list)):
        text = io.StringIO()
        plain = dict(node) if isinstance(node, dict) else list(node)
        YAML().dump({"arguments": plain}, text)
        given = load_hyperpyyaml(text.getvalue())["arguments"]
        args, kwargs = ([], given) if isinstance(given, dict) else (given, {})
    bound = inspect.signature(cls).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _check_loads(folder):
    """Loads the folder by its yaml."""
    with open(folder / "hyperparams.yaml", encoding="utf-8") as file:
        pretrainer = load_hyperpyyaml(file)["pretrainer"]
    pretrainer.collect_files(default_source=str(folder))
    pretrainer.load_collected()
