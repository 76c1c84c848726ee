"""Checkpoints that are whole or not there, and the history of a training."""

import json
import pathlib
import shutil

from speechbrain.utils.checkpoints import (
    METAFNAME,
    Checkpointer,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import ddp_barrier, if_main_process


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer, safe against a kill or a full disk.

    The stock class writes the file that makes a folder a checkpoint before
    the weights: killed in between, it recovers from the torso ever after.
    Here that file gets its name when all others are whole.

    Arguments are those of ``speechbrain.utils.checkpoints.Checkpointer``.

    Raises
    ------
    OSError
        If a checkpoint cannot be written; earlier ones are kept.
    ValueError
        If a checkpoint is damaged, or of another architecture.
    """

    def _save_checkpoint_metafile(self, fpath, *args):
        part = fpath.with_suffix(".part")
        return super()._save_checkpoint_metafile(part, *args)

    def save_checkpoint(self, *args, **options):
        """Saves a checkpoint, see ``Checkpointer.save_checkpoint``."""
        try:
            saved = super().save_checkpoint(*args, **options)
        except (OSError, RuntimeError) as error:  # the latter is torch's
            free = shutil.disk_usage(self.checkpoints_dir).free / 1e6
            raise OSError(
                f"could not write a checkpoint in {self.checkpoints_dir}, "
                f"{free:.0f} MB are free there: {error}. Earlier checkpoints "
                "are whole; the same command resumes from them."
            ) from error
        if if_main_process():
            metafile = saved.path / METAFNAME
            metafile.with_suffix(".part").replace(metafile)
            # what a kill or a full disk has left
            for path in self.checkpoints_dir.glob("CKPT+*"):
                if not self._is_checkpoint_dir(path):
                    shutil.rmtree(path, ignore_errors=True)
        ddp_barrier()
        return saved

    def load_checkpoint(self, checkpoint):
        """Loads a checkpoint, see ``Checkpointer.load_checkpoint``."""
        try:
            super().load_checkpoint(checkpoint)
        except (RuntimeError, ValueError, KeyError, EOFError) as error:
            raise ValueError(
                f"the checkpoint in {checkpoint.path} does not load: it is "
                "damaged, and to be removed to go on from the one before, or "
                "was made with other sizes or another optimizer, and needs "
                f"another output_folder ({error})"
            ) from error


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

    @mark_as_saver
    def _save(self, path):
        text = json.dumps(self.epochs)
        pathlib.Path(path).write_text(text, encoding="utf-8")

    @mark_as_loader
    def load(self, path, end_of_epoch=True):
        """Takes the figures of a checkpoint instead."""
        del end_of_epoch
        self.epochs = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
