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
with ``log d_i`` added to them. On a CPU, inputs too small to need any are found
out, and features are bare exponentials: ``exp(-|k_j|^2 / 2)`` goes with ``[v_j,
1]``, and ``1 / d_i`` with ``h_i``, which have fewer channels.
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
# Exponents and norms up to which no stabiliser is needed: sums of products of
# two features and exp(-|k_j|^2 / 2) stay far from both limits of float32.
MAX_BARE_EXPONENT, MAX_BARE_NORM = 30.0, 6.0


def _is_mirrored(projection):
    """Whether the second half of the directions is the first one negated."""
    half, odd = divmod(projection.shape[0], 2)
    # elsewhere the comparison would wait for the device, and gain little
    if odd or projection.device.type != "cpu":
        return False
    return torch.equal(projection[half:], -projection[:half])


def _are_small(rows, *inputs):
    """Whether no exponent of the inputs can be large."""
    # elsewhere the comparison would wait for the device
    if rows.device.type != "cpu" or not all(x.numel() for x in inputs):
        return False
    longest = max(torch.linalg.vector_norm(x, dim=-1).max() for x in inputs)
    exponent = longest * torch.linalg.vector_norm(rows, dim=-1).max()
    return bool(longest <= MAX_BARE_NORM and exponent <= MAX_BARE_EXPONENT)


def _take(x, block):
    """Frames of [batch, heads, frames, dim] as [sequences, block, dim]."""
    return None if x is None else x[:, :, block].flatten(0, 1)


def _pad(value, scale):
    """Values with a one, which sums up the weights, in a last channel."""
    padded = F.pad(value, (0, 1), value=1)
    return padded if scale is None else padded.mul_(scale)


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

    def features(self, exponent, offset=None):
        """exp(exponent - offset), [sequences, block, n_features]."""
        features = self.room(1, exponent, self.n_features)
        half = exponent.shape[-1]
        first, second = features[..., :half], features[..., half:]
        if offset is None:
            # in place: into half of each row it would take eight times as long
            first.copy_(exponent.exp_())
            if self.mirrored:
                torch.reciprocal(exponent, out=second)
            return features
        torch.sub(exponent, offset, out=first)
        if self.mirrored:
            torch.sub(-offset, exponent, out=second)
        return features.exp_()

    def to_inputs(self, features, grad, state):
        """Gradient of the inputs, from that of the result."""
        gradient = self.room(0, features, self.n_features)
        torch.bmm(grad, state, out=gradient)
        if not self.mirrored:
            return gradient.mul_(features) @ self.rows
        half = self.rows.shape[0]
        first = gradient[..., :half].mul_(features[..., :half])
        return (
            first.addcmul_(gradient[..., half:], features[..., half:], value=-1)
            @ self.rows
        )


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
        small = _are_small(rows, query, key)
        limits = torch.finfo(query.dtype)

        # what to subtract from exponents, or else what to multiply values with
        key_offset, key_scale = key.square().sum(-1, keepdim=True).div_(2), None
        if key_padding_mask is not None:
            mask = key_padding_mask[:, None, :, None]
            key_offset.masked_fill_(mask, torch.inf)
        if small:
            key_offset, key_scale = None, key_offset.neg_().exp_()
        channels = value.shape[-1] + 1
        state = query.new_zeros(sequences, channels, n_features)
        # not -inf, whose difference from itself is not a number
        largest = query.new_full((sequences, 1, 1), limits.min)
        for block in kernel.blocks(key):
            exponent = kernel.exponents(_take(key, block))
            offset = _take(key_offset, block)
            if not small:
                before = largest
                largest = kernel.largest(exponent) - offset
                largest = largest.amax(-2, keepdim=True).maximum(before)
                offset = offset + largest
                state.mul_((before - largest).exp())
            phi = kernel.features(exponent, offset)
            padded = _pad(_take(value, block), _take(key_scale, block))
            state.baddbmm_(padded.mT, phi)
        if not small:
            key_offset += largest.view(batch, heads, 1, 1)

        # frames before heads: a caller who joins the heads need not copy
        output = query.new_empty(batch, frames, heads, value.shape[-1])
        output = output.transpose(1, 2)
        # the like of queries, for the gradient of their output
        query_factor = query.new_empty(batch, heads, frames, 1)
        for block in kernel.blocks(query):
            exponent = kernel.exponents(_take(query, block))
            offset = None if small else kernel.largest(exponent)
            mixed = kernel.features(exponent, offset) @ state.mT
            weight = mixed[..., -1:]
            seen = weight >= limits.tiny
            # with no weight: zero, and a factor that makes psi zero
            weight = weight.where(seen, torch.inf)
            _put(output, block, mixed[..., :-1] / weight)
            part = weight.reciprocal() if small else offset + weight.log()
            _put(query_factor, block, part)
        ctx.save_for_backward(
            *(query, key, value, rows, output, state),
            *((None, query_factor) if small else (query_factor, None)),
            *(key_offset, key_scale),
        )
        ctx.mirrored = mirrored
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        """The equations of the module, block by block."""
        query, key, value, rows, output, state, *more = ctx.saved_tensors
        query_offset, query_scale, key_offset, key_scale = more
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
                if query_scale is not None:
                    grad.mul_(_take(query_scale, block))
                grad_state.baddbmm_(grad.mT, psi)
                _put(grad_query, block, kernel.to_inputs(psi, grad, state))
            for block in kernel.blocks(key):
                part = _take(key, block)
                exponent = kernel.exponents(part)
                phi = kernel.features(exponent, _take(key_offset, block))
                scale = _take(key_scale, block)
                padded = _pad(_take(value, block), scale)
                grad = phi @ grad_state.mT
                wanted = grad[..., :-1]
                wanted = wanted if scale is None else wanted * scale
                _put(grad_value, block, wanted)
                # the exponents of a key sum up to that of its norm
                inner = (grad * padded).sum(-1, keepdim=True)
                grad = kernel.to_inputs(phi, padded, grad_state)
                _put(grad_key, block, grad.addcmul_(part, inner, value=-1))
        return grad_query, grad_key, grad_value, None, None
