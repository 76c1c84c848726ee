"""Checkpoints that are whole or not there, and the history of a training."""

import json
import logging
import os
import pathlib
import pickle
import shutil

import torch
from speechbrain.utils.checkpoints import (
    Checkpoint,
    Checkpointer,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)

# What torch.load raises for a file that is cut, empty or something else.
DAMAGED = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    KeyError,
    pickle.UnpicklingError,
)

_UNFINISHED = "unfinished-"


def _is_of_file(error):
    """Whether torch failed at the file: it raises RuntimeError for that."""
    names = ("inline_container", "PytorchStream")
    return any(name in str(error) for name in names)


def _damaged(checkpoint, why):
    return (
        f"the checkpoint in {checkpoint.path} is damaged, remove it to go on "
        f"from the one before ({why})"
    )


def _misfit(checkpoint, why):
    return (
        f"the checkpoint in {checkpoint.path} does not fit this model: it was "
        "made with other sizes or another optimizer. Choose another "
        f"output_folder, or the keys it was made with. ({why})"
    )


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer, safe against a kill or a full disk.

    The stock class writes the file that makes a folder a checkpoint before
    the weights: killed in between, it recovers from the torso ever after.
    Here a checkpoint is written under another name and renamed when whole.

    Arguments are those of ``speechbrain.utils.checkpoints.Checkpointer``.

    Raises
    ------
    OSError
        If a checkpoint cannot be written; earlier ones are kept.
    ValueError
        If a checkpoint of another architecture is loaded.

    Example
    -------
    >>> import torch
    >>> folder = getfixture("tmpdir")
    >>> net = torch.nn.Linear(1, 1)
    >>> checkpointer = AtomicCheckpointer(folder, {"net": net})
    >>> saved = checkpointer.save_checkpoint(name="first")
    >>> saved.path.name
    'CKPT+first'
    """

    def _new_checkpoint_dirpath(self):
        return self._unfinished(super()._new_checkpoint_dirpath())

    def _custom_checkpoint_dirpath(self, name):
        return self._unfinished(super()._custom_checkpoint_dirpath(name))

    def _unfinished(self, path):
        for leftover in path.parent.glob(_UNFINISHED + "*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return path.with_name(_UNFINISHED + path.name)

    def save_checkpoint(
        self, meta=None, end_of_epoch=True, name=None, verbosity=logging.INFO
    ):
        """Saves a checkpoint, see ``Checkpointer.save_checkpoint``."""
        # a NumPy scalar in the meta file makes all checkpoints unreadable
        meta = {
            key: value.item() if hasattr(value, "item") else value
            for key, value in (meta or {}).items()
        }
        try:
            # it would tell of the unfinished folder
            saved = super().save_checkpoint(
                meta, end_of_epoch, name, logging.DEBUG
            )
        except (OSError, RuntimeError) as error:
            for leftover in self.checkpoints_dir.glob(_UNFINISHED + "*"):
                shutil.rmtree(leftover, ignore_errors=True)
            if isinstance(error, RuntimeError) and not _is_of_file(error):
                raise
            free = shutil.disk_usage(self.checkpoints_dir).free / 1e6
            raise OSError(
                f"could not write a checkpoint in {self.checkpoints_dir}, "
                f"{free:.0f} MB are free there: {error}. Earlier checkpoints "
                "are whole; the same command resumes from them."
            ) from error
        if if_main_process():
            path = saved.path.with_name(
                saved.path.name.removeprefix(_UNFINISHED)
            )
            if path.exists():
                shutil.rmtree(path)
            os.replace(saved.path, path)
            files = {
                name: path / file.name
                for name, file in saved.paramfiles.items()
            }
            saved = Checkpoint(path, saved.meta, files)
            logger.log(verbosity, f"Saved a checkpoint in {path}")
        ddp_barrier()
        return saved

    def check_fits(self):
        """Compares the newest checkpoint's modules with those at hand.

        Raises
        ------
        ValueError
            If keys or shapes differ; to be called before a run writes
            anything over what an earlier one left.
        """
        newest = self.find_checkpoint()
        for name, module in self.recoverables.items():
            if newest is None or not isinstance(module, torch.nn.Module):
                continue
            path = newest.paramfiles.get(name)
            if path is None:
                raise ValueError(_misfit(newest, f"it has no {name}"))
            try:
                saved = torch.load(path, map_location="meta", weights_only=True)
            except DAMAGED as error:
                raise ValueError(_damaged(newest, error)) from error
            expected = module.state_dict()
            for key in saved.keys() | expected.keys():
                shapes = [
                    list(state[key].shape) if key in state else "missing"
                    for state in (saved, expected)
                ]
                if shapes[0] != shapes[1]:
                    words = f"{name}: {key} is {shapes[0]}, not {shapes[1]}"
                    raise ValueError(_misfit(newest, words))

    def load_checkpoint(self, checkpoint):
        """Loads a checkpoint, see ``Checkpointer.load_checkpoint``."""
        try:
            super().load_checkpoint(checkpoint)
        except (RuntimeError, ValueError, KeyError) as error:
            if _is_of_file(error):
                raise ValueError(_damaged(checkpoint, error)) from error
            raise ValueError(_misfit(checkpoint, error)) from error


@register_checkpoint_hooks
class TrainingHistory:
    """Figures of each epoch, saved with the checkpoints.

    Example
    -------
    >>> history = TrainingHistory()
    >>> history.add(1, train_loss=-3.5)
    >>> history.series("train_loss")
    ([1], [-3.5])
    """

    def __init__(self):
        self.epochs = []

    def add(self, epoch, **figures):
        """Adds what was measured in an epoch; None is left out."""
        figures = {
            name: float(value)
            for name, value in figures.items()
            if value is not None
        }
        self.epochs.append({"epoch": epoch, **figures})

    def series(self, name):
        """Epochs and values of one figure where it was measured."""
        rows = [row for row in self.epochs if name in row]
        return [row["epoch"] for row in rows], [row[name] for row in rows]

    def total(self, name):
        """Sum of one figure over all epochs."""
        return sum(self.series(name)[1])

    @mark_as_saver
    def _save(self, path):
        text = json.dumps(self.epochs)
        pathlib.Path(path).write_text(text, encoding="utf-8")

    @mark_as_loader
    def load(self, path, end_of_epoch=True):
        """Takes the figures of a checkpoint instead."""
        del end_of_epoch
        self.epochs = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
