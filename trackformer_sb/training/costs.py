"""What a training took."""

import statistics

import torch

from trackformer_sb.memory import peak_memory_mb


def of_all_ranks(brain, value):
    """A value of each rank; all ranks have to call it.

    Arguments
    ---------
    brain : MusicBrain
        Says whether there are several.
    value : object
        This rank's, to be pickled.

    Returns
    -------
    list
    """
    values = [value]
    if brain.distributed_launch:
        values *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value)
    return values


def training_costs(brain):
    """What a training took, and its history, for metrics.json.

    Arguments
    ---------
    brain : MusicBrain
        After its training.

    Returns
    -------
    dict
        Times in seconds, memory in MB, numbers of steps.
    """
    history = brain.hparams.history
    _, epoch_seconds = history.series("epoch_seconds")
    _, step_seconds = history.series("step_seconds")
    _, steps = history.series("step")
    # of a training in several parts
    _, peaks = history.series("peak_memory_mb")
    return {
        "unreadable_segments": brain.unreadable_segments,
        "epochs": len(history.epochs),
        "batches": brain.num_batches,
        "steps": int(steps[-1]) if steps else None,
        "step_seconds": (
            statistics.median(step_seconds) if step_seconds else None
        ),
        "epoch_seconds": (
            statistics.fmean(epoch_seconds) if epoch_seconds else None
        ),
        "total_seconds": (
            history.total("epoch_seconds") + history.total("valid_seconds")
        ),
        "waiting_for_data_seconds": history.total("waiting_seconds"),
        "peak_memory_mb": max([peak_memory_mb(brain.device), *peaks]),
        "device": brain.device,
        "num_parameters": sum(p.numel() for p in brain.modules.parameters()),
        "history": history.epochs,
    }
