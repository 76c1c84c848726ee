"""How much memory was in use at most."""

import resource
import sys

import torch


def peak_memory_mb(device):
    """Largest memory in use so far.

    Arguments
    ---------
    device : str or torch.device
        Where it is computed.

    Returns
    -------
    float
        MB, of a GPU what tensors took, else what the whole process took.

    Example
    -------
    >>> peak_memory_mb("cpu") > 1.0
    True
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
