"""Bidirectional FAVOR+ in blocks of frames, with its own backward pass.

``favor.plain_favor_attention`` makes maps of [frames, n_features] for queries
and keys, and autograd keeps several of each. Here the features of a block of
frames are made, used and dropped, in the backward pass a second time, so that
a block stays in the cache of the processor and memory beyond that of inputs
and outputs is a few numbers a frame.

With features ``phi``, state ``S = sum_j phi(k_j) [v_j, 1]'`` and
``[n_i, d_i] = phi(q_i)' S`` the output is ``o_i = n_i / d_i``. For its gradient
``g_i`` let ``h_i = [g_i, -g_i . o_i]`` and ``psi_i = phi(q_i) / d_i``. Then

- gradient of the exponents of ``q_i``: ``psi_i * (S h_i)``
- gradient of the state: ``dS = sum_i psi_i h_i'``
- gradient of ``v_j``: ``dS' phi(k_j)`` without its last channel
- gradient of the exponents of ``k_j``: ``phi(k_j) * (dS [v_j, 1])``.

Stabilisers, subtracted from exponents, are the largest one of a frame for
queries, of the sequence for keys. They cancel in ``o_i``; ``psi`` is ``phi``
with ``log d_i`` added to them.
"""

import itertools

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Features a block has over all its sequences and heads, about: 4 MB in float32.
# On 2 CPU cores a fourth of that is about 10 % slower and twice as much no
# faster. GPUs want large products, and have the memory; theirs is a guess.
BLOCK_FEATURES = {"cpu": 2**20, "cuda": 2**26}
MIN_BLOCK = 64


def _blocks(x, n_features):
    """Slices of the frames, as equal as can be."""
    batch, heads, frames, _ = x.shape
    most = BLOCK_FEATURES.get(x.device.type, BLOCK_FEATURES["cuda"])
    size = max(MIN_BLOCK, most // max(1, batch * heads * n_features))
    number = max(1, round(frames / size))
    bounds = [frames * i // number for i in range(number + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


class BlockedFavor(torch.autograd.Function):
    """Bidirectional FAVOR+ attention without maps of all features.

    ``apply`` takes what ``plain_favor_attention`` does, queries, keys and
    values of one type, float32 or float64; the projection gets no gradient.

    Example
    -------
    >>> q, k, v = torch.randn(3, 1, 2, 7, 4)
    >>> ones = BlockedFavor.apply(q, k, torch.ones_like(v), v[0, 0], None)
    >>> torch.allclose(ones, torch.ones_like(v))
    True
    """

    @staticmethod
    def forward(ctx, query, key, value, projection, key_padding_mask):
        """Sums up the keys, then asks for each query."""
        batch, heads, frames, _ = query.shape
        n_features, channels = projection.shape[0], value.shape[-1]
        limits = torch.finfo(query.dtype)

        key_offset = key.square().sum(-1, keepdim=True).div_(2)
        if key_padding_mask is not None:
            mask = key_padding_mask[:, None, :, None]
            key_offset.masked_fill_(mask, torch.inf)
        state = query.new_zeros(batch, heads, n_features, channels + 1)
        # not -inf, whose difference from itself is not a number
        largest = query.new_full((batch, heads, 1, 1), limits.min)
        for block in _blocks(key, n_features):
            exponent = key[:, :, block] @ projection.T
            exponent.sub_(key_offset[:, :, block])
            before = largest
            largest = exponent.amax((-2, -1), keepdim=True).maximum(before)
            phi = exponent.sub_(largest).exp_()
            state.mul_((before - largest).exp())
            # a last channel of ones sums up the weights
            state += phi.mT @ F.pad(value[:, :, block], (0, 1), value=1)
        key_offset += largest

        # frames before heads: a caller who joins the heads need not copy
        output = query.new_empty(batch, frames, heads, channels)
        output = output.transpose(1, 2)
        query_offset = query.new_empty(batch, heads, frames, 1)
        for block in _blocks(query, n_features):
            exponent = query[:, :, block] @ projection.T
            offset = exponent.amax(-1, keepdim=True)
            mixed = exponent.sub_(offset).exp_() @ state
            weight = mixed[..., -1:]
            # with no weight: zero, and an offset that makes psi zero
            weight = weight.where(weight >= limits.tiny, torch.inf)
            output[:, :, block] = mixed[..., :-1] / weight
            query_offset[:, :, block] = offset + weight.log()
        ctx.save_for_backward(
            *(query, key, value, projection, output, state),
            *(query_offset, key_offset),
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        """The equations of the module, block by block."""
        query, key, value, projection, output, state, *offsets = (
            ctx.saved_tensors
        )
        query_offset, key_offset = offsets
        n_features = projection.shape[0]
        grad_query, grad_key, grad_value = (
            torch.empty_like(x) for x in (query, key, value)
        )
        grad_state = torch.zeros_like(state)
        # backward may be called where autocast is on
        with torch.autocast(query.device.type, enabled=False):
            for block in _blocks(query, n_features):
                exponent = query[:, :, block] @ projection.T
                psi = exponent.sub_(query_offset[:, :, block]).exp_()
                grad = grad_output[:, :, block]
                inner = (grad * output[:, :, block]).sum(-1, keepdim=True)
                grad = torch.cat([grad, -inner], -1)
                grad_state += psi.mT @ grad
                grad = (grad @ state.mT).mul_(psi) @ projection
                grad_query[:, :, block] = grad
            for block in _blocks(key, n_features):
                part = key[:, :, block]
                padded = F.pad(value[:, :, block], (0, 1), value=1)
                exponent = part @ projection.T
                phi = exponent.sub_(key_offset[:, :, block]).exp_()
                grad = phi @ grad_state
                grad_value[:, :, block] = grad[..., :-1]
                # the exponents of a key sum up to that of its norm
                inner = (grad * padded).sum(-1, keepdim=True)
                grad = (padded @ grad_state.mT).mul_(phi) @ projection
                grad_key[:, :, block] = grad.addcmul_(part, inner, value=-1)
        return grad_query, grad_key, grad_value, None, None
