"""Separators out of the folder of a training, and onto the hub."""

import csv
import io
import json
from contextlib import contextmanager
from pathlib import Path

import yaml
from huggingface_hub import HfApi, errors
from huggingface_hub.errors import HTTPError
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from speechbrain.utils.checkpoints import Checkpointer

from trackformer_sb.inference.export import export_separator
from trackformer_sb.inference.folder import (
    bare_node,
    read_nodes,
    replaced_folder,
)
from trackformer_sb.inference.pretrained import NODES, SETTINGS
from trackformer_sb.inference.separator import Separator
from trackformer_sb.inference.weights import load_state, load_weights
from trackformer_sb.nnet.transfer import plain_values, read_state

# The number by which a training keeps its best checkpoint; higher is better.
SCORE = "score"

# Weights averaged over the steps, which are better than the last ones.
AVERAGE = "ema"

# What the card says of the yaml, as the recipe does.
TRAINING_KEYS = ("dataset", "segment_seconds", "seed", "selection_metric")


@contextmanager
def _readable(save):
    """SpeechBrain reads what a checkpoint says of itself, whole or not."""
    try:
        yield
    except (yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{save}: a CKPT.yaml in it is damaged, take its checkpoint out "
            f"({error})"
        ) from error


def best_checkpoint(run):
    """The best checkpoint of a training, and its last one.

    Arguments
    ---------
    run : str or Path
        Folder of the training.

    Returns
    -------
    speechbrain.utils.checkpoints.Checkpoint
        The best of those made at the end of an epoch.
    speechbrain.utils.checkpoints.Checkpoint
        The newest of them.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If one is damaged.
    """
    save = Path(run) / "save"
    if save.is_dir():
        checkpointer = Checkpointer(save)
        with _readable(save):
            best = checkpointer.find_checkpoint(max_key=SCORE)
            newest = checkpointer.find_checkpoint(
                ckpt_predicate=lambda checkpoint: SCORE in checkpoint.meta
            )
        if best is not None:
            return best, newest
    raise FileNotFoundError(
        f"{save}: no checkpoint of a finished epoch; expected the folder of a "
        "training, as recipes/train.py leaves it"
    )


def named_checkpoint(run, checkpoint):
    """A checkpoint by its folder.

    Arguments
    ---------
    run : str or Path
        Folder of the training.
    checkpoint : str or Path
        Folder of the checkpoint, or its name in ``save``.

    Returns
    -------
    speechbrain.utils.checkpoints.Checkpoint
        The checkpoint.

    Raises
    ------
    FileNotFoundError
        If there is none in that folder.
    ValueError
        If it, or one beside it, is damaged.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        folder = Path(run) / "save" / checkpoint
    found = []
    if folder.is_dir():
        with _readable(folder.parent):
            checkpoints = Checkpointer(folder.parent).list_checkpoints()
        found = [x for x in checkpoints if x.path.resolve() == folder.resolve()]
    if not found:
        raise FileNotFoundError(
            f"{checkpoint}: no checkpoint; expected a folder CKPT+... with "
            "CKPT.yaml, or the name of one in "
            f"{Path(run) / 'save'}"
        )
    return found[0]


def _trained_modules(hparams_file, checkpoint):
    """Builds the modules of a yaml and loads their weights."""
    text = io.StringIO()
    try:
        hparams = read_nodes(hparams_file, SETTINGS, NODES)
        # of all that the yaml says only the modules are built
        nodes = {key: bare_node(hparams[key], key) for key in NODES.values()}
        YAML().dump(nodes, text)
        built = load_hyperpyyaml(text.getvalue())
    except (YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{hparams_file}: {error}") from error
    modules = {name: built[key] for name, key in NODES.items()}
    for name, module in modules.items():
        if name == "masknet" and AVERAGE in checkpoint.paramfiles:
            path = checkpoint.paramfiles[AVERAGE]
            state = read_state(path)
            del state["n_averaged"]
            begin = "module."
            state = {k.removeprefix(begin): v for k, v in state.items()}
            load_state(module, state, path)
        elif name in checkpoint.paramfiles:
            load_weights(module, checkpoint.paramfiles[name])
        elif module.state_dict():
            raise ValueError(f"{checkpoint.path}: no weights of the {name}")
    return modules


def measured_on_test(run):
    """What a training measured on its test songs.

    Arguments
    ---------
    run : str or Path
        Folder of the training, with ``metrics.json`` and
        ``test_results.csv``, whose columns are the metrics.

    Returns
    -------
    dict
        Name -> average; empty if it was not tested.
    int or None
        Epochs that it was trained for when it was tested.

    Raises
    ------
    ValueError
        If a file is damaged.
    """
    path, table = Path(run) / "metrics.json", Path(run) / "test_results.csv"
    if not path.is_file() or not table.is_file():
        return {}, None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        with open(table, newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file))
        values = {name: results.get(name) for name in columns}
        epochs = results.get("epochs")
    except (ValueError, AttributeError, StopIteration) as error:
        raise ValueError(f"{path}, {table}: not readable ({error})") from error
    numbers = {
        name: value
        for name, value in values.items()
        if isinstance(value, (int, float))
    }
    return numbers, epochs


def export_run(run, folder, checkpoint=None):
    """Makes the separator folder of a training again.

    Arguments
    ---------
    run : str or Path
        Folder of the training: ``hyperparams.yaml``, ``save`` and, for the
        card, ``metrics.json``.
    folder : str or Path
        Where to write, see ``export_separator``.
    checkpoint : str or Path, optional
        Folder of a checkpoint, or its name; by default the best one. Only
        that was tested: the card of another has no test results.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileNotFoundError
        If it is no folder of a training, or there is no such checkpoint.
    ValueError
        If yaml and weights do not fit.
    FileExistsError
        If the folder holds other files than those of a separator.
    """
    hparams_file = Path(run) / "hyperparams.yaml"
    if not hparams_file.is_file():
        raise FileNotFoundError(
            f"{hparams_file} not found: expected the folder of a training, as "
            "recipes/train.py leaves it"
        )
    chosen = None if checkpoint is None else named_checkpoint(run, checkpoint)
    tested = True
    try:
        best, newest = best_checkpoint(run)
    except FileNotFoundError:
        if chosen is None:
            raise
        tested = False
    else:
        chosen = chosen or best
        tested = chosen.path.resolve() == best.path.resolve()
    metrics, epochs = measured_on_test(run)
    # a training that went on after its test
    tested = tested and newest.meta.get("epoch", epochs) == epochs
    try:
        settings = plain_values(hparams_file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{hparams_file}: no readable yaml") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{hparams_file}: no keys in it")
    metadata = {"Training": _training(settings, chosen)}
    if tested and metrics:
        metadata["Measured on the test songs"] = {
            name: f"{value:.2f}" for name, value in metrics.items()
        }
    modules = _trained_modules(hparams_file, chosen)
    if "classes" in settings:
        keys = ("classes", "sample_rate", "n_fft", "hop_length")
        separator = Separator.of_masknet(
            modules["masknet"], **{key: settings[key] for key in keys}
        )
        folder = Path(folder).resolve()
        with replaced_folder(folder, "separator", NODES) as partial:
            separator.save_pretrained(
                partial, model_card_kwargs={"metadata": metadata}
            )
        return folder
    return export_separator(hparams_file, modules, folder, metadata)


def _training(settings, checkpoint):
    """What the card says of the training."""
    training = {key: settings[key] for key in TRAINING_KEYS if key in settings}
    if "segment_seconds" in training:
        training["segments"] = f"{training.pop('segment_seconds')} s"
    training["epoch"] = checkpoint.meta.get("epoch", "unfinished")
    if SCORE in checkpoint.meta:
        training["validation score"] = f"{checkpoint.meta[SCORE]:.2f}"
    return training


def push_folder(folder, repo, private=None, token=None):
    """Uploads the folder of a separator to the hub, in one commit.

    Arguments
    ---------
    folder : str or Path
        As ``export_separator`` writes it.
    repo : str
        The owner/name of the model, which is made if there is none.
    private : bool, optional
        Whether a model that is made is private.
    token : str, optional
        Of the account; by default the one that is logged in.

    Returns
    -------
    str
        Address of the commit.

    Raises
    ------
    OSError
        If the hub cannot be reached or refuses; the message names the model.
    ValueError
        If the name is no hub id.
    """
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Separator of trackformer_sb",
        )
    except errors.HFValidationError as error:
        raise ValueError(f"{repo}: {error}") from error
    except (HTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = str(error).strip().splitlines()[0]
        if status in (401, 403):
            reason = (
                f"access refused ({status}): log in (hf auth login) or set "
                "HF_TOKEN to a token that may write"
            )
        raise OSError(f"{repo}: not uploaded, {reason}") from error
    return str(commit)
