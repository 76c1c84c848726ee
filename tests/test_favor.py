"""FAVOR+ against exact attention: how near, and what must hold exactly."""

import itertools

import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trackformer_sb.nnet import favor_blocked
from trackformer_sb.nnet.favor import (
    causal_favor_attention,
    draw_projection,
    favor_attention,
    plain_favor_attention,
    positive_features,
    softmax_attention,
)

HEAD_DIM = 64
# of two heads, which forget all but 1/e in 4 and in 50 frames
DECAY = -torch.tensor([1 / 4, 1 / 50])


def clustered_frames(generator, temperature=1.0, frames=160, groups=8):
    """Queries, keys and values of frames that sound like one of 8 chords.

    Queries and keys have the norms that SelfAttention gives them. The mean of
    all values is wrong everywhere, that of the same chord is about right.
    """
    owner = torch.randint(groups, (frames,), generator=generator)
    centre = torch.randn(groups, HEAD_DIM, generator=generator)[owner]
    noise = torch.randn(3, 1, 2, frames, HEAD_DIM, generator=generator)
    query, key = temperature**0.5 * F.normalize(
        centre + 0.5 * noise[:2], dim=-1
    )
    value = torch.randn(groups, HEAD_DIM, generator=generator)[owner]
    return query, key, value + 0.5 * noise[2]


def relative_error(estimate, exact):
    return float((estimate - exact).detach().norm() / exact.detach().norm())


def mean_errors(n_features, temperature, orthogonal=True, **kwargs):
    """Errors of FAVOR+ and of averaging all values, over 30 draws."""
    errors = []
    for draw in range(30):
        generator = torch.Generator().manual_seed(draw)
        query, key, value = clustered_frames(generator, temperature, **kwargs)
        projection = draw_projection(n_features, HEAD_DIM, generator)
        if not orthogonal:
            rows = torch.randn(n_features // 2, HEAD_DIM, generator=generator)
            projection = torch.cat([rows, -rows])
        exact = softmax_attention(query, key, value)
        errors.append(
            (
                relative_error(
                    favor_attention(query, key, value, projection), exact
                ),
                relative_error(value.mean(-2, keepdim=True), exact),
            )
        )
    return torch.tensor(errors).mean(0).tolist()


def random_frames(frames=20, value_dim=6, batch=2, dtype=torch.float32):
    """Small unstructured queries, keys, values and a projection."""
    query, key = torch.randn(2, batch, 2, frames, 8, dtype=dtype) * 0.3
    value = torch.randn(batch, 2, frames, value_dim, dtype=dtype)
    return query, key, value, draw_projection(16, 8).to(dtype)


def favor(causal):
    """The attention, without the state that the causal one returns."""
    if not causal:
        return favor_attention
    return lambda *args, **more: causal_favor_attention(*args, **more)[0]


# -- exact attention


@pytest.mark.parametrize("log_decay", [None, 0 * DECAY, DECAY])
@pytest.mark.parametrize("padded", [False, True])
def test_softmax_attention_equals_the_loop(log_decay, padded, device):
    causal = log_decay is not None
    query, key, value, _ = random_frames(frames=9)
    mask = None
    if padded:
        mask = torch.zeros(2, 9, dtype=torch.bool)
        mask[0, 6:] = mask[1, 4] = True
    expected = references.softmax_attention(
        *(query, key, value, mask, causal, log_decay)
    )
    result = softmax_attention(
        *(x.to(device) for x in (query, key, value)),
        None if mask is None else mask.to(device),
        None if log_decay is None else log_decay.to(device),
    )
    torch.testing.assert_close(result.cpu(), expected, atol=1e-5, rtol=1e-5)


# -- the estimate


@pytest.mark.parametrize(
    "temperature, measured, averaging",
    [
        (1.0, {64: 0.20, 256: 0.085, 1024: 0.058}, 0.35),
        (2.0, {64: 0.38, 256: 0.23, 1024: 0.18}, 0.65),
    ],
)
def test_error_falls_with_the_features_and_is_below_averaging(
    temperature, measured, averaging
):
    errors = {}
    for n_features in measured:
        errors[n_features], mean = mean_errors(n_features, temperature)
    assert errors == pytest.approx(measured, rel=0.15)
    assert mean == pytest.approx(averaging, rel=0.1)
    assert errors[256] < 0.7 * errors[64]
    assert errors[1024] < 0.8 * errors[256]
    assert errors[256] < 0.5 * mean


def test_orthogonal_directions_beat_independent_ones():
    # every frame for itself: the estimate of each single weight matters
    kwargs = {"frames": 200, "groups": 200}
    orthogonal, _ = mean_errors(256, 1.0, **kwargs)
    independent, _ = mean_errors(256, 1.0, False, **kwargs)
    assert orthogonal == pytest.approx(0.09, rel=0.15)
    assert independent == pytest.approx(0.134, rel=0.15)


@pytest.mark.parametrize(
    ("causal", "log_decay"), [(False, None), (True, None), (True, DECAY)]
)
def test_favor_equals_its_own_quadratic_form(causal, log_decay, device):
    inputs = random_frames(frames=300)
    query, key, value, projection = inputs
    weights = (
        positive_features(query, projection)
        @ positive_features(key, projection).mT
    )
    weights = weights.tril() if causal else weights
    more = {}
    if log_decay is not None:
        frames = torch.arange(300)
        age = (frames[:, None] - frames).clamp(min=0)
        weights = weights * (log_decay[:, None, None] * age).exp()
        more = {"log_decay": log_decay.to(device)}
    expected = weights @ value / weights.sum(-1, keepdim=True)
    result = favor(causal)(*(x.to(device) for x in inputs), **more)
    torch.testing.assert_close(result.cpu(), expected, atol=1e-5, rtol=1e-4)


# -- the directions


@pytest.mark.parametrize("n_features", [1, 7, 8, 100, 256])
def test_directions_are_orthogonal_in_blocks_and_mirrored(n_features):
    projection = draw_projection(n_features, 16)
    half = (n_features + 1) // 2
    assert projection.shape == (n_features, 16)
    assert torch.equal(projection[half:], -projection[: n_features - half])
    for start in range(0, half, 16):
        block = projection[start : min(start + 16, half)]
        gram = block @ block.T
        torch.testing.assert_close(
            gram, gram.diagonal().diag(), atol=1e-4, rtol=0
        )
    with pytest.raises(ValueError, match="n_features must be at least 1, got"):
        draw_projection(0, 16)


# -- what must hold exactly


@pytest.mark.parametrize("causal", [False, True])
def test_padding_and_batch_neighbours_do_not_matter(causal, device):
    inputs = random_frames(frames=12, batch=3)
    query, key, value, projection = (x.to(device) for x in inputs)
    # a common stabiliser would be far from that of the louder item
    query[1], key[1], value[1] = 40 * query[1], 40 * key[1], 1e3 * value[1]
    mask = torch.zeros(3, 12, dtype=torch.bool, device=device)
    mask[:, 3] = mask[:, 9:] = True
    keep = ~mask[0]
    attend = favor(causal)
    alone = [
        attend(
            *(x[i : i + 1, :, keep] for x in (query, key, value)), projection
        )
        for i in range(3)
    ]
    # whatever is in the padding
    key[:, :, ~keep], value[:, :, ~keep] = 0.5, 100.0
    result = attend(query, key, value, projection, mask)[:, :, keep]
    torch.testing.assert_close(result, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_frames_without_any_key_give_zeros_and_no_gradient(causal):
    query, key, value, projection = random_frames()
    inputs = [x.requires_grad_() for x in (query, key, value)]
    mask = torch.zeros(2, 20, dtype=torch.bool)
    # the first item sees nothing; the second, if causal, nothing at first
    mask[0], mask[1, :4] = True, True
    result = favor(causal)(*inputs, projection, mask)
    assert not result[0].any() and result[1, :, 4:].all()
    if causal:
        assert not result[1, :, :4].any()
    (1e3 * result).sum().backward()
    for x in inputs:
        assert x.grad.isfinite().all() and not x.grad[0].any()


@pytest.mark.parametrize(
    "causal, with_directions", [(False, False), (True, False), (False, True)]
)
def test_gradients_equal_difference_quotients(
    monkeypatch, causal, with_directions
):
    # of several blocks, and in the plain form that directions need
    monkeypatch.setattr(favor_blocked, "BLOCK_FEATURES", {"cuda": 1})
    monkeypatch.setattr(favor_blocked, "MIN_BLOCK", 3)
    frames = 3 if with_directions else 5
    inputs, projection, mask = padded_frames(frames, n_features=5)
    projection.requires_grad_(with_directions)
    more = {"chunk_size": 3, "log_decay": DECAY} if causal else {}
    assert torch.autograd.gradcheck(
        lambda *inputs: favor(causal)(*inputs, mask, **more),
        [*inputs, projection],
    )


@pytest.mark.parametrize("causal", [False, True])
def test_kernel_is_single_precision_under_autocast(causal, device):
    generator = torch.Generator().manual_seed(0)
    frames = clustered_frames(generator, 2.0)
    projection = draw_projection(256, HEAD_DIM, generator).to(device)
    inputs = [x.to(device, torch.bfloat16).requires_grad_() for x in frames]
    single = [x.detach().float().requires_grad_() for x in inputs]
    expected = with_gradients(favor(causal), single, projection)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = with_gradients(favor(causal), inputs, projection)
    # only the result is rounded
    assert torch.equal(result[0], expected[0].to(torch.bfloat16))
    for x, y in zip(result[1:], expected[1:], strict=True):
        assert relative_error(x.float(), y) < 0.01


@given(
    cuts=st.lists(st.integers(0, 70), max_size=5),
    chunk_size=st.integers(1, 80),
    log_decay=st.sampled_from([None, DECAY]),
)
def test_a_stream_in_any_pieces_equals_one_call(cuts, chunk_size, log_decay):
    torch.manual_seed(0)
    query, key, value, projection = random_frames(frames=70)
    expected, final = causal_favor_attention(
        query, key, value, projection, log_decay=log_decay
    )
    pieces, state = [], None
    bounds = [0, *sorted(cuts), 70]
    for start, end in itertools.pairwise(bounds):
        piece, state = causal_favor_attention(
            *(x[:, :, start:end] for x in (query, key, value)),
            projection,
            state=state,
            chunk_size=chunk_size,
            log_decay=log_decay,
        )
        pieces.append(piece)
    torch.testing.assert_close(
        torch.cat(pieces, 2), expected, atol=1e-5, rtol=1e-4
    )
    for part, whole in zip(state, final):
        torch.testing.assert_close(part, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_causal_favor_can_be_traced():
    projection = draw_projection(16, 8)
    query, key, value = torch.randn(3, 1, 2, 300, 8)

    def attend(query):
        return causal_favor_attention(query, key, value, projection)[0]

    traced = torch.jit.trace(attend, query)
    other = torch.randn_like(query)
    assert torch.allclose(traced(other), attend(other), atol=1e-6)


# -- in blocks of frames


def padded_frames(frames, n_features=16):
    """Queries, keys, values that need a gradient, directions and a mask."""
    *inputs, _ = random_frames(frames=frames, dtype=torch.float64)
    mask = torch.zeros(2, frames, dtype=torch.bool)
    mask[1, : frames // 3] = True
    projection = draw_projection(n_features, 8).double()
    return [x.requires_grad_() for x in inputs], projection, mask


def with_gradients(attend, inputs, *args):
    result = attend(*inputs, *args)
    weights = torch.linspace(-1, 1, result.numel(), device=result.device)
    loss = (result * weights.view(result.shape)).sum()
    return result, *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("frames", [1, 64, 97, 200])
def test_blocks_equal_the_plain_form(monkeypatch, frames, device):
    # blocks of the smallest size: 1 frame to 3 unequal blocks
    monkeypatch.setattr(favor_blocked, "BLOCK_FEATURES", {"cuda": 1})
    inputs, *args = padded_frames(frames)
    args = [x.to(device) for x in args]
    inputs = [x.detach().to(device).requires_grad_() for x in inputs]
    expected = with_gradients(plain_favor_attention, inputs, *args)
    result = with_gradients(favor_attention, inputs, *args)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-9)


def test_blocks_in_single_precision_follow_the_plain_form(monkeypatch):
    """Where the stabilisers of blocks differ by hundreds."""
    monkeypatch.setattr(favor_blocked, "BLOCK_FEATURES", {"cuda": 1})
    inputs, projection, mask = padded_frames(300)
    loud = torch.linspace(0, 60, 300, dtype=torch.float64)[:, None]
    (query, key, value) = inputs
    inputs = [loud.flip(0) * query, loud * key, value]
    expected = with_gradients(plain_favor_attention, inputs, projection, mask)
    single = [x.detach().float().requires_grad_() for x in inputs]
    result = with_gradients(favor_attention, single, projection.float(), mask)
    for x, y in zip(result, expected):
        assert x.isfinite().all()
        # a float32 exponent of 500 is good to 3e-5
        assert relative_error(x.double(), y) < 1e-3


class LargestTensor(TorchDispatchMode):
    """Notes the largest memory among the results of all operations."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                stored = x.untyped_storage().nbytes() // x.element_size()
                self.numbers = max(self.numbers, stored)
        return result


@pytest.mark.parametrize(
    ("attend", "least", "most"),
    [
        # queries, keys and values have 8 numbers a frame
        (favor(causal=False), 0, 0.08),
        (favor(causal=True), 0, 0.08),
        # the measure sees those of the plain form
        (plain_favor_attention, 1, 10),
    ],
)
def test_no_tensor_holds_the_features_of_all_frames(
    monkeypatch, attend, least, most
):
    monkeypatch.setattr(favor_blocked, "BLOCK_FEATURES", {"cuda": 1})
    *inputs, _ = random_frames(frames=5000)
    inputs = [x.requires_grad_() for x in inputs]
    with LargestTensor() as largest:
        attend(*inputs, draw_projection(256, 8)).sum().backward()
    # of 4 sequences
    assert least <= largest.numbers / (4 * 5000 * 256) < most
