"""What benchmarks/favor.py calls: ours, its peers and their inputs."""

import functools
import warnings

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from trackformer_sb.nnet.favor import (
    draw_projection,
    favor_attention,
    softmax_attention,
)

OURS, PEER, EXACT = "trackformer_sb", "performer-pytorch", "exact"
FLASH = "exact, flash"
HEAD_DIM, N_FEATURES = 64, 256


def setting(args):
    """Kind of device and type of the inputs."""
    return torch.device(args.device).type, args.dtype


def allow_tf32(args):
    """On a GPU float32 is multiplied as TF32, as recipes do by default."""
    if setting(args)[0] == "cuda":
        torch.set_float32_matmul_precision("high")


def import_peer():
    """The module of performer-pytorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from performer_pytorch import performer_pytorch
    return performer_pytorch


def make_inputs(frames, args):
    """Queries, keys and values [batch, heads, frames, head_dim]."""
    generator = torch.Generator().manual_seed(0)
    shape = 3, args.batch_size, args.nhead, frames, HEAD_DIM
    query, key, value = torch.randn(shape, generator=generator)
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    dtype = getattr(torch, args.dtype)
    return [
        x.to(args.device, dtype).requires_grad_() for x in (query, key, value)
    ]


def make_projection(args):
    """Our directions, the same in all places."""
    generator = torch.Generator().manual_seed(0)
    return draw_projection(N_FEATURES, HEAD_DIM, generator).to(args.device)


def flash_attention(query, key, value):
    """Exact attention by the flash kernel, an error where it cannot."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return softmax_attention(query, key, value)


def make_attention(who, args):
    """A function of queries, keys and values."""
    if who == EXACT:
        return softmax_attention
    if who == FLASH:
        return flash_attention
    if who == PEER:
        peer = import_peer().FastAttention(HEAD_DIM, N_FEATURES)
        return peer.to(args.device, getattr(torch, args.dtype))
    return functools.partial(favor_attention, projection=make_projection(args))


def forward_backward(attention, inputs, grad_output, weights=()):
    """One call; returns the gradients of inputs and weights.

    Leaves would copy gradients whose layout is not theirs, as no gradient
    inside of a network is.
    """
    output = attention(*inputs)
    return torch.autograd.grad(output, [*inputs, *weights], grad_output)


def gradients_apart(frames, args):
    """Relative differences of the gradients of queries, keys, values."""
    peer = import_peer()
    projection = make_projection(args)

    def theirs(query, key, value):
        features = functools.partial(
            peer.softmax_kernel,
            projection_matrix=projection.double(),
            normalize_data=False,
            eps=0.0,
        )
        phi_q = features(query, is_query=True)
        return peer.linear_attention(
            phi_q, features(key, is_query=False), value
        )

    ours = make_attention(OURS, args)
    inputs = make_inputs(frames, args)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(inputs[2].shape, generator=generator).to(inputs[2])
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    found = forward_backward(ours, inputs, weights)
    expected = forward_backward(theirs, doubles, weights.double())
    return [
        float((x - y).norm() / y.norm())
        for x, y in zip(found, expected, strict=True)
    ]
