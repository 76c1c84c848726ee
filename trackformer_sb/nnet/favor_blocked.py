"""Bidirectional FAVOR+ in blocks of frames, with its own backward pass.

``favor.plain_favor_attention`` makes maps of [frames, n_features] for queries
and keys, and autograd keeps several of each. Here the features of a block of
frames are made, used and overwritten, in the backward pass a second time, so
that a block stays in the cache of the processor and memory beyond that of
inputs and outputs is a few numbers a frame.

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
import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Features a block has over all its sequences and heads, about: 4 MB in float32.
# On 2 CPU cores a fourth of that is about 10 % slower and twice as much no
# faster. GPUs want large products, and have the memory; theirs is a guess.
BLOCK_FEATURES = {"cpu": 2**20, "cuda": 2**26}
MIN_BLOCK = 64


def _is_mirrored(projection):
    """Whether the second half of the directions is the first one negated."""
    half, odd = divmod(projection.shape[0], 2)
    # elsewhere the comparison would wait for the device, and gain little
    if odd or projection.device.type != "cpu":
        return False
    return torch.equal(projection[half:], -projection[:half])


def _take(x, block):
    """Frames of [batch, heads, frames, dim] as [sequences, block, dim]."""
    return x[:, :, block].flatten(0, 1)


def _put(x, block, part):
    """Writes frames as `_take` reads them."""
    x[:, :, block] = part.view(*x.shape[:2], *part.shape[1:])


class _Features:
    """Makes features of blocks, in memory that the next block takes again.

    Fresh memory for each would cost as much as the exponential does.
    """

    def __init__(self, query, key, rows, mirrored):
        self.rows, self.mirrored = rows, mirrored
        self.n_features = rows.shape[0] * (2 if mirrored else 1)
        width = query.shape[0] * query.shape[1] * self.n_features
        most = BLOCK_FEATURES.get(query.device.type, BLOCK_FEATURES["cuda"])
        self.size = max(MIN_BLOCK, most // max(1, width))
        longest = max(
            block.stop - block.start
            for x in (query, key)
            for block in self.blocks(x)
        )
        self.memory = query.new_empty(2, longest * width).unbind()

    def blocks(self, x):
        """Slices of the frames, as equal as can be."""
        frames = x.shape[2]
        number = max(1, round(frames / self.size))
        bounds = [frames * i // number for i in range(number + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(bounds)]

    def room(self, i, x, width):
        """Memory as [sequences, block, width] for a block of inputs."""
        shape = *x.shape[:-1], width
        return self.memory[i][: math.prod(shape)].view(shape)

    def exponents(self, x):
        """Of the directions or, if they are mirrored, of the first half."""
        room = self.room(0, x, self.rows.shape[0])
        torch.mm(x.flatten(0, 1), self.rows.T, out=room.flatten(0, 1))
        return room

    def largest(self, exponent):
        """The largest exponent of each frame, [sequences, block, 1]."""
        largest = exponent.amax(-1, keepdim=True)
        if self.mirrored:
            largest = largest.maximum(-exponent.amin(-1, keepdim=True))
        return largest

    def features(self, exponent, offset):
        """exp(exponent - offset), [sequences, block, n_features]."""
        features = self.room(1, exponent, self.n_features)
        half = exponent.shape[-1]
        torch.sub(exponent, offset, out=features[..., :half])
        if self.mirrored:
            torch.sub(-offset, exponent, out=features[..., half:])
        return features.exp_()

    def to_exponents(self, features, grad, state):
        """Gradient of the exponents, from that of the result."""
        room = self.room(0, features, self.n_features)
        return torch.bmm(grad, state, out=room).mul_(features)

    def to_inputs(self, gradient):
        """Gradient of the inputs, from that of the exponents."""
        if self.mirrored:
            half = self.rows.shape[0]
            gradient = gradient[..., :half].sub_(gradient[..., half:])
        return gradient @ self.rows


class BlockedFavor(torch.autograd.Function):
    """Bidirectional FAVOR+ attention without maps of all features.

    Arguments of ``apply``
    ----------------------
    query, key, value : torch.Tensor
        [batch, heads, frames, head_dim or value_dim], of one type, float32
        or float64.
    projection : torch.Tensor
        Directions, [n_features, head_dim]; gets no gradient.
    key_padding_mask : torch.Tensor or None
        Boolean, [batch, key frames], True for frames nobody may attend to.

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
        sequences, n_features = batch * heads, projection.shape[0]
        mirrored = _is_mirrored(projection)
        rows = projection[: n_features // 2] if mirrored else projection
        kernel = _Features(query, key, rows, mirrored)
        limits = torch.finfo(query.dtype)

        key_offset = key.square().sum(-1, keepdim=True).div_(2)
        if key_padding_mask is not None:
            mask = key_padding_mask[:, None, :, None]
            key_offset.masked_fill_(mask, torch.inf)
        channels = value.shape[-1] + 1
        state = query.new_zeros(sequences, channels, n_features)
        # not -inf, whose difference from itself is not a number
        largest = query.new_full((sequences, 1, 1), limits.min)
        for block in kernel.blocks(key):
            exponent = kernel.exponents(_take(key, block))
            offset = _take(key_offset, block)
            before = largest
            largest = kernel.largest(exponent) - offset
            largest = largest.amax(-2, keepdim=True).maximum(before)
            phi = kernel.features(exponent, offset + largest)
            state.mul_((before - largest).exp())
            # a value of one in the last channel sums up the weights
            padded = F.pad(_take(value, block), (0, 1), value=1)
            state.baddbmm_(padded.mT, phi)
        key_offset += largest.view(batch, heads, 1, 1)

        # frames before heads: a caller who joins the heads need not copy
        output = query.new_empty(batch, frames, heads, value.shape[-1])
        output = output.transpose(1, 2)
        query_offset = query.new_empty(batch, heads, frames, 1)
        for block in kernel.blocks(query):
            exponent = kernel.exponents(_take(query, block))
            offset = kernel.largest(exponent)
            mixed = kernel.features(exponent, offset) @ state.mT
            weight = mixed[..., -1:]
            seen = weight >= limits.tiny
            # with no weight: zero, and an offset that makes psi zero
            weight = weight.where(seen, torch.inf)
            _put(output, block, mixed[..., :-1] / weight)
            _put(query_offset, block, offset + weight.log())
        ctx.save_for_backward(
            *(query, key, value, rows, output, state),
            *(query_offset, key_offset),
        )
        ctx.mirrored = mirrored
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        """The equations of the module, block by block."""
        query, key, value, rows, output, state, *offsets = ctx.saved_tensors
        query_offset, key_offset = offsets
        grad_query, grad_key, grad_value = (
            torch.empty_like(x) for x in (query, key, value)
        )
        grad_state = torch.zeros_like(state)
        # backward may be called where autocast is on
        with torch.autocast(query.device.type, enabled=False):
            kernel = _Features(query, key, rows, ctx.mirrored)
            for block in kernel.blocks(query):
                exponent = kernel.exponents(_take(query, block))
                psi = kernel.features(exponent, _take(query_offset, block))
                grad = _take(grad_output, block)
                inner = (grad * _take(output, block)).sum(-1, keepdim=True)
                grad = torch.cat([grad, -inner], -1)
                grad_state.baddbmm_(grad.mT, psi)
                grad = kernel.to_exponents(psi, grad, state)
                _put(grad_query, block, kernel.to_inputs(grad))
            for block in kernel.blocks(key):
                part = _take(key, block)
                exponent = kernel.exponents(part)
                phi = kernel.features(exponent, _take(key_offset, block))
                padded = F.pad(_take(value, block), (0, 1), value=1)
                grad = phi @ grad_state.mT
                _put(grad_value, block, grad[..., :-1])
                # the exponents of a key sum up to that of its norm
                inner = (grad * padded).sum(-1, keepdim=True)
                grad = kernel.to_exponents(phi, padded, grad_state)
                grad = kernel.to_inputs(grad).addcmul_(part, inner, value=-1)
                _put(grad_key, block, grad)
        return grad_query, grad_key, grad_value, None, None
