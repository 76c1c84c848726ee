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

Stabilisers are numbers subtracted from exponents: the largest one of a frame
for queries, of the sequence for keys. They cancel in ``o_i``. ``psi`` comes from
the same code as ``phi`` with ``log d_i`` added to the stabiliser.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Features a block may have over all its sequences and heads: 2 MB in float32,
# what stays in cache (measured, 2 cores with 1 MB each). GPUs want large
# products, and have the memory for them.
BLOCK_FEATURES = {"cpu": 2**19, "cuda": 2**26}
MIN_BLOCK = 64


def _is_mirrored(projection):
    """Whether the second half of the directions is the first one negated."""
    half, odd = divmod(projection.shape[0], 2)
    # elsewhere the comparison would wait for the device, and gain little
    if odd or projection.device.type != "cpu":
        return False
    return torch.equal(projection[half:], -projection[:half])


def _blocks(frames, sequences, n_features, device):
    """Slices of frames, as equal as can be."""
    most = BLOCK_FEATURES.get(device.type, BLOCK_FEATURES["cuda"])
    size = max(MIN_BLOCK, most // max(1, sequences * n_features))
    number = max(1, -(-frames // size))
    bounds = [frames * i // number for i in range(number + 1)]
    return [slice(a, b) for a, b in zip(bounds, bounds[1:])]


def _take(x, block):
    """Frames of [batch, heads, frames, dim] as [sequences, block, dim]."""
    return x[:, :, block].flatten(0, 1)


def _put(x, block, part):
    """Writes frames as `_take` reads them."""
    x[:, :, block] = part.view(*x.shape[:2], *part.shape[1:])


def _largest(exponent, mirrored):
    """The largest exponent of each frame, [sequences, block, 1]."""
    largest = exponent.amax(-1, keepdim=True)
    if mirrored:
        largest = largest.maximum(-exponent.amin(-1, keepdim=True))
    return largest


def _features(exponent, offset, mirrored):
    """exp(exponent - offset), of mirrored directions both halves."""
    if not mirrored:
        return exponent.sub_(offset).exp_()
    half = exponent.shape[-1]
    features = exponent.new_empty(*exponent.shape[:-1], 2 * half)
    torch.sub(exponent, offset, out=features[..., :half])
    torch.sub(-offset, exponent, out=features[..., half:])
    return features.exp_()


def _to_inputs(gradient, rows, mirrored):
    """Gradient of x from that of the exponents, which is overwritten."""
    if mirrored:
        half = rows.shape[0]
        gradient = gradient[..., :half].sub_(gradient[..., half:])
    return gradient @ rows


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
        sizes = sequences, n_features, query.device
        limits = torch.finfo(query.dtype)

        key_offset = key.square().sum(-1, keepdim=True).div_(2)
        if key_padding_mask is not None:
            mask = key_padding_mask[:, None, :, None]
            key_offset.masked_fill_(mask, torch.inf)
        state = query.new_zeros(sequences, n_features, value.shape[-1] + 1)
        # not -inf, whose difference from itself is not a number
        largest = query.new_full((sequences, 1, 1), limits.min)
        for block in _blocks(key.shape[2], *sizes):
            exponent = _take(key, block) @ rows.T
            offset = _take(key_offset, block)
            before = largest
            largest = _largest(exponent, mirrored) - offset
            largest = largest.amax(-2, keepdim=True).maximum(before)
            phi = _features(exponent, offset + largest, mirrored)
            state.mul_((before - largest).exp())
            # a value of one in the last channel sums up the weights
            padded = F.pad(_take(value, block), (0, 1), value=1)
            state.baddbmm_(phi.mT, padded)
        key_offset += largest.view(batch, heads, 1, 1)

        # frames before heads: a caller who joins the heads need not copy
        output = query.new_empty(batch, frames, heads, value.shape[-1])
        output = output.transpose(1, 2)
        query_offset = query.new_empty(batch, heads, frames, 1)
        for block in _blocks(frames, *sizes):
            exponent = _take(query, block) @ rows.T
            offset = _largest(exponent, mirrored)
            mixed = _features(exponent, offset, mirrored) @ state
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
        ctx.mirrored, ctx.sizes = mirrored, sizes
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        """The equations of the module, block by block."""
        query, key, value, rows, output, state, *offsets = ctx.saved_tensors
        query_offset, key_offset = offsets
        mirrored = ctx.mirrored
        grad_query, grad_key, grad_value = (
            torch.empty_like(x) for x in (query, key, value)
        )
        grad_state = torch.zeros_like(state)
        # backward may be called where autocast is on
        with torch.autocast(query.device.type, enabled=False):
            for block in _blocks(query.shape[2], *ctx.sizes):
                exponent = _take(query, block) @ rows.T
                offset = _take(query_offset, block)
                psi = _features(exponent, offset, mirrored)
                grad = _take(grad_output, block)
                inner = (grad * _take(output, block)).sum(-1, keepdim=True)
                grad = torch.cat([grad, -inner], -1)
                grad_state.baddbmm_(psi.mT, grad)
                psi *= grad @ state.mT
                _put(grad_query, block, _to_inputs(psi, rows, mirrored))
            for block in _blocks(key.shape[2], *ctx.sizes):
                part = _take(key, block)
                offset = _take(key_offset, block)
                phi = _features(part @ rows.T, offset, mirrored)
                padded = F.pad(_take(value, block), (0, 1), value=1)
                grad = phi @ grad_state
                _put(grad_value, block, grad[..., :-1])
                # the exponents of a key sum up to that of its norm
                inner = (grad * padded).sum(-1, keepdim=True)
                phi *= padded @ grad_state.mT
                grad = _to_inputs(phi, rows, mirrored)
                _put(grad_key, block, grad.addcmul_(part, inner, value=-1))
        return grad_query, grad_key, grad_value, None, None
