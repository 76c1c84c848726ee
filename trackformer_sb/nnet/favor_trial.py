"""Whether the Triton kernels of FAVOR+ attention work where we are.

Drivers, cards and versions of triton differ in what they compile, so that the
kernels are compared with the plain form before they are trusted.
"""

import functools
import os
import threading

import torch
from speechbrain.utils.logger import get_logger

from trackformer_sb.nnet import favor, favor_triton
from trackformer_sb.nnet.favor_triton import (
    can_use_triton,
    favor_attention_triton,
)

logger = get_logger(__name__)

# Set to 0 in the environment, no kernel is used or tried: what a faulty one
# does to the memory of a GPU ends the process, whatever is caught.
SWITCH = "TRACKFORMER_TRITON"

# Largest relative error of results and gradients in ``triton_agrees``, far
# above rounding and far below what a wrong kernel gives.
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 0.01}


def should_use_triton(query, key, value, projection):
    """Whether the kernels are made for such inputs and work here.

    Arguments
    ---------
    query, key, value, projection
        As for ``favor_attention_triton``.

    Returns
    -------
    bool
        False for everything that is not on a GPU, while compiling, and where
        the environment has TRACKFORMER_TRITON=0.
    """
    if (
        not can_use_triton(query, key, value, projection)
        or os.environ.get(SWITCH) == "0"
    ):
        return False
    sizes = query.shape[-1], value.shape[-1], projection.shape[0]
    try:
        return triton_agrees(value.device, value.dtype, *sizes)
    except torch.OutOfMemoryError:
        # a full GPU says nothing of the kernels: another time
        return False


def _results(attention, inputs, projection, hidden, weights):
    """Output and gradients of queries, keys and values, on the CPU."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = attention(*inputs, projection, hidden)
    gradients = torch.autograd.grad(output, inputs, weights.to(output))
    return [x.detach().double().cpu() for x in (output, *gradients)]


def _largest_error(device, dtype, head_dim, value_dim, n_features):
    """Largest relative error of two small problems, forward and backward.

    A short one with padding, and one without any whose sums over frames take
    several turns in each program: other kernels, and other ways through them.
    """
    errors = [
        _relative_error(
            device, dtype, head_dim, value_dim, n_features, frames, padded
        )
        for frames, padded in (
            (150, True),
            (_frames_of_several_turns(value_dim, n_features), False),
        )
    ]
    # unlike max() of Python, it does not pass over nan
    return float(torch.stack(errors).max())


def _frames_of_several_turns(value_dim, n_features, sequences=4):
    """At how many frames each program has three tiles or more to sum up."""
    # in bfloat16 the most programs are wanted, with the largest tiles
    options = favor_triton.launch_options(
        torch.empty(n_features, value_dim, dtype=torch.bfloat16), value_dim
    )
    splits = favor_triton.most_splits(sequences, options)
    return options["ROWS"] * 2 * splits + 22


def _relative_error(
    device, dtype, head_dim, value_dim, n_features, frames, padded
):
    """Largest error of output and gradients, relative to their norms."""
    generator = torch.Generator().manual_seed(0)
    projection = favor.draw_projection(n_features, head_dim, generator)
    # as far apart as SelfAttention lets queries and keys be
    query, key = 2**0.5 * torch.nn.functional.normalize(
        torch.randn(2, 2, 2, frames, head_dim, generator=generator), dim=-1
    )
    value, weights = torch.randn(
        2, 2, 2, frames, value_dim, generator=generator
    )
    hidden = None
    if padded:
        lengths = torch.tensor([[frames], [2 * frames // 3]])
        hidden = torch.arange(frames) >= lengths
    inputs = [x.to(dtype) for x in (query, key, value)]
    exact = _results(
        favor.favor_attention,
        [x.double() for x in inputs],
        projection.double(),
        hidden,
        weights,
    )
    found = _results(
        favor_attention_triton,
        [x.to(device) for x in inputs],
        projection.to(device),
        hidden.to(device) if padded else None,
        weights.to(device),
    )
    errors = [(x - y).norm() / y.norm() for x, y in zip(found, exact)]
    return torch.stack(errors).max()


def _in_new_thread(function, *args):
    """Result of a call that sees no state of this thread.

    Gradient mode, autocast, hooks on saved tensors (activation checkpoints),
    and function modes belong to a thread.
    """
    result = []

    def run():
        try:
            result.append(function(*args))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]


@functools.cache
def triton_agrees(device, dtype, head_dim=64, value_dim=64, n_features=256):
    """Whether the kernels work on this device, tried at the first call.

    Drivers, cards and versions of triton differ in what they compile. The
    first call takes the time of compiling, some seconds.

    Arguments
    ---------
    device : torch.device
        With its index.
    dtype : torch.dtype
        That of queries, keys and values.
    head_dim, value_dim, n_features : int
        Sizes, each of which has kernels of its own.

    Returns
    -------
    bool
        False, after a warning, if compiling fails or the results differ from
        those of the plain form by more than ``TOLERANCE``.

    Raises
    ------
    torch.OutOfMemoryError
        If there was no memory to try it; nothing is remembered then.
    """
    error = _in_new_thread(
        _largest_error, device, dtype, head_dim, value_dim, n_features
    )
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    # not the other way round: nan is no agreement
    if isinstance(error, float) and error <= TOLERANCE[dtype]:
        return True
    reason = error
    if isinstance(error, float):
        reason = f"relative error {error:.2g}, expected {TOLERANCE[dtype]:g}"
    logger.warning(
        "Triton kernels of FAVOR+ attention do not work on %s with %s and "
        "head_dim %d; using plain PyTorch, which is slower: %s",
        device,
        dtype,
        head_dim,
        reason,
    )
    return False
