"""FAVOR+ attention: linear in the number of frames.

Softmax attention weighs values by ``exp(q . k)``. FAVOR+ ("Rethinking
Attention with Performers", arXiv 2009.14794, lemma 1) writes that kernel as
the expectation of a product of positive features of ``q`` and of ``k``, so
that the sum over keys can be taken once for all queries.

All functions work on [batch, heads, frames, head_dim] and expect queries and
keys that already carry the softmax temperature: there is no division by
``sqrt(head_dim)`` in here. The variance of the estimate grows with
``exp(|q + k|^2)``: keep the norms small, see ``performer.SelfAttention``.
"""

import math

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trackformer_sb.nnet.favor_blocked import BlockedFavor


def draw_projection(n_features, head_dim, generator=None):
    """Draws the random directions of FAVOR+.

    Orthogonal directions lower the variance of the estimate (section 2.4 of
    the paper). Each block of ``head_dim`` rows is the orthogonal factor of a
    Gaussian matrix; rows are given the lengths of independent Gaussian rows,
    so that each row alone is a standard normal vector. The second half of the
    directions is the first one negated, which makes the features those with
    the hyperbolic cosine of lemma 1, of lower variance again.

    Arguments
    ---------
    n_features : int
        Number of directions, at least 1.
    head_dim : int
        Dimension of queries and keys.
    generator : torch.Generator, optional
        Source of randomness (CPU); the global one if not given.

    Returns
    -------
    torch.Tensor
        Directions, [n_features, head_dim].

    Raises
    ------
    ValueError
        If no features are asked for.

    Example
    -------
    >>> projection = draw_projection(8, 4, torch.Generator().manual_seed(0))
    >>> gram = projection @ projection.T
    >>> torch.allclose(gram[:4, :4], gram[:4, :4].diagonal().diag(), atol=1e-5)
    True
    >>> bool((projection[:4] == -projection[4:]).all())
    True
    """
    if n_features < 1:
        raise ValueError(f"n_features must be at least 1, got {n_features}")
    half = (n_features + 1) // 2
    rows = torch.randn(half, head_dim, generator=generator)
    lengths = rows.norm(dim=1, keepdim=True)
    blocks = []
    for start in range(0, half, head_dim):
        square = torch.randn(head_dim, head_dim, generator=generator)
        block, upper = torch.linalg.qr(square)
        # with these signs the block is uniform over rotations
        block = block * upper.diagonal().sign()
        blocks.append(block[: half - start])
    rows = torch.cat(blocks) * lengths
    return torch.cat([rows, -rows])[:n_features]


def positive_features(x, projection, stabiliser=None):
    """Positive random features, lemma 1 of arXiv 2009.14794.

    ``phi(x) = exp(W x - |x|^2 / 2 - c) / sqrt(n_features)``; the expectation
    of ``phi(q) . phi(k)`` is ``exp(q . k)`` up to the stabilisers ``c``: with
    "frame" the largest exponent of each frame, with "sequence" that of each
    sequence and head. Both cancel in normalised attention, the first for
    queries only, the second for keys too. Gives [batch, heads, frames,
    n_features].
    """
    exponent = x @ projection.T
    if stabiliser == "frame":
        # |x|^2 / 2 is one number a frame and goes with the stabiliser
        offset = exponent.detach().amax(-1, keepdim=True)
    else:
        offset = x.square().sum(-1, keepdim=True) / 2
    if stabiliser == "sequence":
        largest = exponent.detach().amax(-1, keepdim=True) - offset.detach()
        offset = offset + largest.amax(-2, keepdim=True)
    return (exponent - (offset + math.log(projection.shape[0]) / 2)).exp()


def _normalise(numerator, denominator):
    """Divides by the sum of weights; a frame that sees no key gives zero."""
    # by one rather than by something tiny, whose gradient would overflow
    tiny = torch.finfo(denominator.dtype).tiny
    denominator = denominator.where(denominator >= tiny, 1.0)
    return numerator / denominator.unsqueeze(-1)


def plain_favor_attention(query, key, value, projection, key_padding_mask=None):
    """Equation 4 of arXiv 2009.14794 as it is written, for autograd.

    Keeps features of all frames. ``favor_attention`` takes it where the blocked
    form cannot be: for a gradient of the directions, and while compiling or
    tracing. Inputs are of one type.
    """
    phi_q = positive_features(query, projection, "frame")
    phi_k = positive_features(key, projection, "sequence")
    if key_padding_mask is not None:
        phi_k = phi_k.masked_fill(key_padding_mask[:, None, :, None], 0.0)
    # a value of one in the last channel sums up the weights on the way
    mixed = phi_q @ (phi_k.transpose(-1, -2) @ F.pad(value, (0, 1), value=1))
    return _normalise(mixed[..., :-1], mixed[..., -1])


def favor_attention(query, key, value, projection, key_padding_mask=None):
    """Bidirectional FAVOR+ attention, equation 4 of arXiv 2009.14794.

    Time and memory are proportional to the number of frames; features are made
    for a block of frames at a time, see ``favor_blocked``. Computed in float32
    whatever the autocast state; the result has the values' type. Can be
    differentiated once.

    Arguments
    ---------
    query, key : torch.Tensor
        [batch, heads, frames, head_dim], carrying the temperature.
    value : torch.Tensor
        [batch, heads, frames, value_dim].
    projection : torch.Tensor
        Directions, [n_features, head_dim].
    key_padding_mask : torch.Tensor, optional
        Boolean, [batch, frames], True for frames nobody may attend to.

    Returns
    -------
    torch.Tensor
        [batch, heads, frames, value_dim].

    Example
    -------
    >>> generator = torch.Generator().manual_seed(0)
    >>> projection = draw_projection(1024, 16, generator)
    >>> query, key, value = torch.rand(3, 1, 2, 50, 16, generator=generator)
    >>> query, key = query / 4, key / 4
    >>> exact = softmax_attention(query, key, value)
    >>> estimate = favor_attention(query, key, value, projection)
    >>> bool((estimate - exact).norm() < 0.01 * exact.norm())
    True
    """
    # unrolled over blocks, a compiled graph would be of any size; only the
    # plain form has a gradient of the directions
    plain = torch.compiler.is_compiling() or torch.jit.is_tracing()
    plain |= projection.requires_grad
    with torch.autocast(query.device.type, enabled=False):
        dtype = value.dtype
        # float64 stays, for gradient checks
        query, key, value, projection = (
            x if x.dtype == torch.float64 else x.float()
            for x in (query, key, value, projection)
        )
        attend = plain_favor_attention if plain else BlockedFavor.apply
        mixed = attend(query, key, value, projection, key_padding_mask)
        return mixed.to(dtype)


def causal_favor_attention(
    query,
    key,
    value,
    projection,
    key_padding_mask=None,
    state=None,
    chunk_size=128,
    log_decay=None,
):
    """Causal FAVOR+ attention: a frame attends to itself and the past.

    Equation 5 of arXiv 2009.14794 in chunks: inside a chunk the weights are
    formed explicitly, all earlier frames are summed up in a state, which the
    call returns so that a stream can go on. It may fade, as in RetNet (arXiv
    2307.08621, equation 5), so that it stays the same over hours.

    Arguments
    ---------
    query, key, value, projection, key_padding_mask
        As for ``favor_attention``.
    state : torch.Tensor, optional
        What an earlier call returned: summed outer products of key features
        and values, the features themselves last, [batch, heads, n_features,
        value_dim + 1].
    chunk_size : int
        Frames whose weights are formed explicitly.
    log_decay : torch.Tensor, optional
        [heads], at most 0: the weight of a key n frames ago is multiplied by
        ``exp(n log_decay)``.

    Returns
    -------
    output : torch.Tensor
        [batch, heads, frames, value_dim].
    state : torch.Tensor
        To be passed with the frames that follow.

    Example
    -------
    >>> projection = draw_projection(32, 8)
    >>> q, k, v = torch.randn(3, 1, 2, 10, 8)
    >>> whole, _ = causal_favor_attention(q, k, v, projection)
    >>> past, state = causal_favor_attention(
    ...     q[:, :, :6], k[:, :, :6], v[:, :, :6], projection
    ... )
    >>> rest, _ = causal_favor_attention(
    ...     q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], projection, state=state
    ... )
    >>> torch.allclose(torch.cat([past, rest], 2), whole, atol=1e-5)
    True
    """
    with torch.autocast(query.device.type, enabled=False):
        dtype = value.dtype
        query, key, value, projection = (
            x if x.dtype == torch.float64 else x.float()
            for x in (query, key, value, projection)
        )
        # whose last channel sums up the weights
        value = F.pad(value, (0, 1), value=1.0)
        if state is None:
            sizes = *value.shape[:2], projection.shape[0], value.shape[-1]
            state = value.new_zeros(sizes)
        if log_decay is None:
            log_decay = query.new_zeros(query.shape[1])
        fixed = projection, log_decay.to(query.dtype)
        # the features of all chunks would be those of the whole: the backward
        # pass makes them again; while compiling, the compiler decides
        again = torch.is_grad_enabled() and any(
            x.requires_grad for x in (query, key, value, state)
        )
        again &= not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        outputs = []
        for start in range(0, max(1, query.shape[-2]), chunk_size):
            part = slice(start, start + chunk_size)
            hidden = None
            if key_padding_mask is not None:
                hidden = key_padding_mask[:, None, part, None]
            chunk = *(x[:, :, part] for x in (query, key, value)), hidden
            output, state = (
                checkpoint(
                    *(_causal_chunk, *chunk, *fixed, state),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                if again
                else _causal_chunk(*chunk, *fixed, state)
            )
            outputs.append(output)
        return torch.cat(outputs, dim=-2).to(dtype), state


def _causal_chunk(query, key, value, hidden, projection, log_decay, state):
    """Output of a chunk, and the state after it."""
    query = positive_features(query, projection, "frame")
    # a stabiliser over the sequence would look into the future
    key = positive_features(key, projection)
    if hidden is not None:
        key = key.masked_fill(hidden, 0.0)
    frames = query.shape[-2]
    if frames == 1:
        # what follows in a few operations, for streams
        state = state * log_decay.exp()[:, None, None]
        state = state + key.transpose(-1, -2) * value
        mixed = query @ state
    else:
        mixed = query @ key.transpose(-1, -2) * decay_weights(log_decay, query)
        # [heads, frames, 1]: what the state fades by until a frame
        steps = torch.arange(1, frames + 1, device=query.device)
        faded = (log_decay[:, None] * steps).exp().unsqueeze(-1)
        mixed = mixed @ value + query @ state * faded
        left = (log_decay[:, None] * (frames - steps)).exp().unsqueeze(-1)
        state = state * (log_decay * frames).exp()[:, None, None]
        state = state + (key * left).transpose(-1, -2) @ value
    return _normalise(mixed[..., :-1], mixed[..., -1]), state


def decay_weights(log_decay, query):
    """Weights [heads, queries, keys] of the past by its age."""
    steps = torch.arange(query.shape[-2], device=query.device)
    age = steps.unsqueeze(-1) - steps
    return (log_decay[:, None, None] * age).exp().tril()


def softmax_attention(query, key, value, key_padding_mask=None, log_decay=None):
    """Exact attention with the same temperature convention as FAVOR+.

    It is causal with a `log_decay`, see ``causal_favor_attention``.
    """
    mask = None
    if log_decay is not None:
        # minus infinity for the future
        mask = decay_weights(log_decay.to(query.dtype), query).log()
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, None, :]
        mask = ~hidden if mask is None else mask.masked_fill(hidden, -torch.inf)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=1.0
    )
