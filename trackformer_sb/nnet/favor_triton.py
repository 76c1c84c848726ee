"""FAVOR+ attention on NVIDIA GPUs in five fused kernels.

The plain form writes the features of all queries and keys to memory, several
times the size of its input, and reads them again backward. Here they never
leave a multiprocessor: forward and backward read queries, keys and values,
write results, and make the features anew where needed (the kernels are in
``favor_kernels``).

Stabilisers cancel, so every program subtracts the largest exponent that it
has met so far and corrects its sums when it meets a larger one. That costs no
pass over the keys of its own and, unlike a bound from the norms, it cannot
underflow by itself.

Precision: products of bfloat16 inputs are of bfloat16, with sums in float32.
All other inputs are multiplied as TensorFloat-32, exponents as three such
products, which is near float32: gradients of float32 inputs are within 1e-3
of the plain form's, relative to their norm, those of bfloat16 within 2e-2.
The state is kept less the mean of the values, so that rounding is relative to
what differs between frames.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from trackformer_sb.nnet import favor_kernels, favor_kernels_backward

# Programs wanted for a sum over frames: a few for each of some 130
# multiprocessors. A constant, so that results depend on shapes alone.
WANTED_PROGRAMS = 512

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128)


def can_use_triton(query, key, value, projection):
    """Whether the kernels are made for such inputs.

    False while torch.compile or torch.export trace, which fuse the plain form
    on their own.

    Arguments
    ---------
    query, key, value, projection
        As for ``favor_attention_triton``.

    Returns
    -------
    bool
        True for CUDA tensors on one device of compute capability 8.0 or
        higher, none of float64, queries, keys and values of one type, head
        dimensions of 16, 32, 64 or 128 and features in multiples of 16.
    """
    tensors = (query, key, value, projection)
    return (
        favor_kernels.triton is not None
        and not torch.compiler.is_compiling()
        and torch.version.hip is None
        and all(x.is_cuda and x.device == query.device for x in tensors)
        and all(x.dtype in DTYPES for x in tensors)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] in HEAD_DIMS
        and value.shape[-1] in HEAD_DIMS
        and projection.shape[0] % 16 == 0
        and min(query.numel(), key.numel(), projection.numel()) > 0
        # the second axis of a CUDA grid ends there
        and query.shape[0] * query.shape[1] <= 65535
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def favor_attention_triton(
    query, key, value, projection, key_padding_mask=None
):
    """Bidirectional FAVOR+ attention, equation 4 of arXiv 2009.14794.

    For inputs that ``can_use_triton`` accepts. Differentiable once, in
    queries, keys and values. Last dimensions should be contiguous, others may
    have any strides.

    Arguments
    ---------
    query, key : torch.Tensor
        [batch, heads, frames, head_dim], carrying the temperature.
    value : torch.Tensor
        [batch, heads, frames, value_dim].
    projection : torch.Tensor
        Directions, [n_features, head_dim], without gradient.
    key_padding_mask : torch.Tensor, optional
        Boolean, [batch, frames], True for frames nobody may attend to.

    Returns
    -------
    torch.Tensor
        [batch, heads, frames, value_dim], of the values' type; zero where no
        key is visible.
    """
    return _FavorAttention.apply(
        query, key, value, projection, key_padding_mask
    )


def _unit_stride(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x):
    """Empty tensor of this shape, the heads of a frame beside each other.

    Merging the gradients of the heads then moves no data.
    """
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


class _FavorAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, projection, key_padding_mask):
        query, key, value = map(_unit_stride, (query, key, value))
        reduced = {query.dtype, key.dtype, value.dtype} == {torch.bfloat16}
        product = torch.bfloat16 if reduced else torch.float32
        projection = projection.detach().to(product).contiguous()
        hidden = key_padding_mask
        if hidden is not None:
            if hidden.dtype != torch.bool:
                raise ValueError(
                    f"key_padding_mask: expected torch.bool, got {hidden.dtype}"
                )
            # the kernels would read beyond the end of a smaller one
            hidden = hidden.expand(key.shape[0], key.shape[2])
            hidden = hidden.contiguous().view(torch.uint8)
        ctx.options = launch_options(projection, value.shape[-1])
        with torch.cuda.device_of(query):
            state, weight, bound = _sum_keys(
                key, value, hidden, projection, ctx.options
            )
            total = weight.sum(-1, keepdim=True)
            # 1 where no key is visible, and everything is zero
            total = total.where(total > 0, 1.0)
            centre = state.sum(1) / total
            state = state - weight[..., None] * centre[:, None]
            state = state.to(product)
            batch, heads, frames, _ = query.shape
            output = value.new_empty(batch, frames, heads, value.shape[-1])
            # merging the heads then moves no data
            output = output.transpose(1, 2)
            log_sum = weight.new_empty(batch * heads, frames)
            favor_kernels.attend[_grid(query, ctx.options)](
                query,
                projection,
                state,
                weight,
                centre,
                output,
                log_sum,
                *query.stride()[:3],
                *output.stride()[:3],
                heads,
                frames,
                **ctx.options,
            )
        ctx.save_for_backward(
            query,
            key,
            value,
            projection,
            hidden,
            state,
            weight,
            bound,
            centre,
            log_sum,
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (
            query,
            key,
            value,
            projection,
            hidden,
            state,
            weight,
            bound,
            centre,
            log_sum,
        ) = ctx.saved_tensors
        grad_output = _unit_stride(grad_output)
        grad_query, grad_key, grad_value = map(_like, (query, key, value))
        heads, frames = query.shape[1:3]
        delta = torch.empty_like(log_sum)
        with torch.cuda.device_of(query):
            favor_kernels_backward.query_gradient[_grid(query, ctx.options)](
                query,
                projection,
                state,
                weight,
                grad_output,
                log_sum,
                grad_query,
                delta,
                *query.stride()[:3],
                *grad_output.stride()[:3],
                *grad_query.stride()[:3],
                heads,
                frames,
                **ctx.options,
            )
            if any(ctx.needs_input_grad[1:3]):
                grad_state, grad_weight = _sum_queries(
                    query, grad_output, projection, log_sum, delta, ctx.options
                )
                favor_kernels_backward.key_value_gradient[
                    _grid(key, ctx.options)
                ](
                    key,
                    value,
                    hidden,
                    projection,
                    grad_state,
                    grad_weight,
                    centre,
                    bound,
                    grad_key,
                    grad_value,
                    *key.stride()[:3],
                    *value.stride()[:3],
                    *grad_key.stride()[:3],
                    *grad_value.stride()[:3],
                    heads,
                    key.shape[2],
                    **ctx.options,
                )
        return grad_query, grad_key, grad_value, None, None


def launch_options(projection, value_dim):
    """Compile-time constants of the kernels and how to compile them.

    The largest tiles that compute capability 9.0 keeps in registers, but for
    tens of bytes, and that fit the 99 KB of shared memory of 8.6 and 8.9.
    """
    n_features, head_dim = projection.shape
    wide = max(head_dim, value_dim) > 64
    reduced = projection.dtype == torch.bfloat16
    columns = 64 if reduced else 32
    return {
        "FEATURES": n_features,
        "D": head_dim,
        "VALUE_D": value_dim,
        "ROWS": 32 if wide and not reduced else 64,
        # with a power of two in the features no tile is cut
        "COLUMNS": min(columns, n_features & -n_features),
        "num_warps": 8 if wide else 4,
        "num_stages": 2 if wide or not reduced else 3,
    }


def _grid(x, options):
    """A program for each block of frames of each sequence and head."""
    return math.ceil(x.shape[2] / options["ROWS"]), x.shape[0] * x.shape[1]


def most_splits(sequences, options):
    """Into how many parts a sum over frames is split at most."""
    blocks = options["FEATURES"] // options["COLUMNS"]
    return math.ceil(WANTED_PROGRAMS / (sequences * blocks))


def _partial(x, frames, value_dim, options):
    """Grid, splits and empty partial sums for a sum over frames."""
    sequences = x.shape[0] * x.shape[1]
    blocks = options["FEATURES"] // options["COLUMNS"]
    tiles = math.ceil(frames / options["ROWS"])
    splits = min(tiles, most_splits(sequences, options))
    per_split = math.ceil(tiles / splits)
    splits = math.ceil(tiles / per_split)
    shape = (sequences, splits, options["FEATURES"])
    state = x.new_empty((*shape, value_dim), dtype=torch.float32)
    weight = x.new_empty(shape, dtype=torch.float32)
    return (
        (splits * blocks, sequences),
        per_split * options["ROWS"],
        state,
        weight,
    )


def _sum_keys(key, value, hidden, projection, options):
    """State, weights and the largest exponent of each sequence and head."""
    heads, frames = key.shape[1:3]
    grid, per_split, state, weight = _partial(
        key, frames, value.shape[-1], options
    )
    bound = torch.empty_like(weight)
    favor_kernels.accumulate_keys[grid](
        key,
        value,
        hidden,
        projection,
        state,
        weight,
        bound,
        *key.stride()[:3],
        *value.stride()[:3],
        heads,
        frames,
        per_split,
        **options,
    )
    largest = bound.amax((1, 2))
    shrink = (bound - largest[:, None, None]).exp()
    state = (state * shrink[..., None]).sum(1)
    return state, (weight * shrink).sum(1), largest


def _sum_queries(query, grad_output, projection, log_sum, delta, options):
    """Gradients of the state and of the weights."""
    heads, frames = query.shape[1:3]
    grid, per_split, state, weight = _partial(
        query, frames, grad_output.shape[-1], options
    )
    favor_kernels_backward.state_gradient[grid](
        query,
        grad_output,
        projection,
        log_sum,
        delta,
        state,
        weight,
        *query.stride()[:3],
        *grad_output.stride()[:3],
        heads,
        frames,
        per_split,
        **options,
    )
    return state.sum(1).to(projection.dtype), weight.sum(1)
