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
        projection = draw_projection(
            n_features, HEAD_DIM, generator, orthogonal
        )
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


# -- exact attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_softmax_attention_equals_the_loop(causal, padded, device):
    query, key, value, _ = random_frames(frames=9)
    mask = None
    if padded:
        mask = torch.zeros(2, 9, dtype=torch.bool)
        mask[0, 6:] = mask[1, 4] = True
    expected = references.softmax_attention(query, key, value, mask, causal)
    result = softmax_attention(
        *(x.to(device) for x in (query, key, value)),
        None if mask is None else mask.to(device),
        causal,
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
    assert orthogonal < 0.8 * independent


def test_unnormalised_queries_cannot_be_estimated():
    """Why SelfAttention normalises: standard deviation 1 is out of reach."""
    errors = {}
    for deviation in (1.0, 0.25):
        total = 0.0
        for draw in range(4):
            generator = torch.Generator().manual_seed(draw)
            query, key, value = torch.randn(
                3, 1, 2, 200, HEAD_DIM, generator=generator
            )
            # the usual 1 / sqrt(head_dim), half of it for each
            scale = deviation * HEAD_DIM**-0.25
            query, key = scale * query, scale * key
            projection = draw_projection(256, HEAD_DIM, generator)
            total += relative_error(
                favor_attention(query, key, value, projection),
                softmax_attention(query, key, value),
            )
        errors[deviation] = total / 4
    assert errors[1.0] > 0.8
    assert errors[0.25] < 0.1


@pytest.mark.parametrize("orthogonal", [True, False])
def test_kernel_is_unbiased(orthogonal):
    generator = torch.Generator().manual_seed(1)
    query, key = 0.8 * F.normalize(
        torch.randn(2, 5, 8, generator=generator), dim=-1
    )
    draws = torch.stack(
        [
            positive_features(query, projection)
            @ positive_features(key, projection).T
            for projection in (
                draw_projection(16, 8, generator, orthogonal)
                for _ in range(2000)
            )
        ]
    )
    standard_error = draws.std(0) / 2000**0.5
    deviation = (draws.mean(0) - (query @ key.T).exp()) / standard_error
    assert deviation.abs().max() < 4
    assert standard_error.max() < 0.03


def test_causal_error_falls_with_the_features():
    errors = []
    for n_features in (64, 256, 1024):
        total = 0.0
        for draw in range(12):
            generator = torch.Generator().manual_seed(draw)
            query, key, value = clustered_frames(generator)
            projection = draw_projection(n_features, HEAD_DIM, generator)
            result, _ = causal_favor_attention(query, key, value, projection)
            exact = softmax_attention(query, key, value, causal=True)
            total += relative_error(result, exact)
        errors.append(total / 12)
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.8 * errors[1]
    assert errors[1] < 0.12


def test_causal_favor_equals_its_own_quadratic_form(device):
    query, key, value, projection = random_frames(frames=300)
    weights = (
        positive_features(query, projection)
        @ positive_features(key, projection).mT
    ).tril()
    expected = weights @ value / weights.sum(-1, keepdim=True)
    result, _ = causal_favor_attention(
        *(x.to(device) for x in (query, key, value, projection))
    )
    torch.testing.assert_close(result.cpu(), expected, atol=1e-5, rtol=1e-4)


def test_stabilisers_cancel(device):
    query, key, value, projection = random_frames()
    weights = (
        positive_features(query, projection)
        @ positive_features(key, projection).mT
    )
    expected = weights @ value / weights.sum(-1, keepdim=True)
    result = favor_attention(
        *(x.to(device) for x in (query, key, value, projection))
    )
    torch.testing.assert_close(result.cpu(), expected, atol=1e-5, rtol=1e-4)


def test_large_queries_and_keys_do_not_overflow():
    query, key, value, projection = random_frames()
    result = favor_attention(60 * query, 60 * key, value, projection)
    assert result.isfinite().all()
    # a convex combination of the values
    assert (result.abs() <= value.abs().amax(-2, keepdim=True) + 1e-4).all()


# -- the directions


def test_directions_have_the_lengths_of_gaussian_rows():
    generator = torch.Generator().manual_seed(0)
    projection = draw_projection(4096, HEAD_DIM, generator)
    squares = projection.square().sum(1)
    assert float(squares.mean()) == pytest.approx(HEAD_DIM, rel=0.02)
    assert float(squares.var()) == pytest.approx(2 * HEAD_DIM, rel=0.1)
    covariance = projection.T @ projection / 4096
    torch.testing.assert_close(
        covariance, torch.eye(HEAD_DIM), atol=0.12, rtol=0
    )


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


def test_directions_depend_on_the_generator_only():
    first = draw_projection(32, 8, torch.Generator().manual_seed(3))
    torch.rand(5)
    again = draw_projection(32, 8, torch.Generator().manual_seed(3))
    other = draw_projection(32, 8, torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_features_are_refused():
    with pytest.raises(ValueError, match="n_features must be at least 1, got"):
        draw_projection(0, 8)


# -- what must hold exactly


@pytest.mark.parametrize("causal", [False, True])
def test_padding_equals_dropping_the_frames(causal, device):
    query, key, value, projection = (
        x.to(device) for x in random_frames(frames=12)
    )
    mask = torch.zeros(2, 12, dtype=torch.bool, device=device)
    mask[:, 3] = mask[:, 9:] = True
    keep = ~mask[0]

    def attend(*args):
        result = (causal_favor_attention if causal else favor_attention)(*args)
        return result[0] if causal else result

    expected = attend(*(x[:, :, keep] for x in (query, key, value)), projection)
    # whatever is in the padding
    key[:, :, ~keep], value[:, :, ~keep] = 0.5, 100.0
    result = attend(query, key, value, projection, mask)[:, :, keep]
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_later_inputs_do_not_change_earlier_outputs():
    query, key, value, projection = random_frames(frames=300)
    before, _ = causal_favor_attention(query, key, value, projection)
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[:, :, 200:] = 3 * torch.randn_like(x[:, :, 200:])
    after, _ = causal_favor_attention(*changed, projection)
    assert torch.equal(after[:, :, :200], before[:, :, :200])
    assert not torch.allclose(after[:, :, 200:], before[:, :, 200:])


@given(
    cuts=st.lists(st.integers(0, 70), max_size=5),
    chunk_size=st.integers(1, 80),
)
def test_a_stream_in_any_pieces_equals_one_call(cuts, chunk_size):
    torch.manual_seed(0)
    query, key, value, projection = random_frames(frames=70)
    expected, final = causal_favor_attention(query, key, value, projection)
    pieces, state = [], None
    bounds = [0, *sorted(cuts), 70]
    for start, end in itertools.pairwise(bounds):
        piece, state = causal_favor_attention(
            *(x[:, :, start:end] for x in (query, key, value)),
            projection,
            state=state,
            chunk_size=chunk_size,
        )
        pieces.append(piece)
    torch.testing.assert_close(
        torch.cat(pieces, 2), expected, atol=1e-5, rtol=1e-4
    )
    for part, whole in zip(state, final):
        torch.testing.assert_close(part, whole, atol=1e-4, rtol=1e-4)


def test_size_of_the_chunks_does_not_matter():
    query, key, value, projection = random_frames(frames=130)
    expected, _ = causal_favor_attention(query, key, value, projection)
    for chunk_size in (1, 64, 65, 1000):
        result, _ = causal_favor_attention(
            query, key, value, projection, chunk_size=chunk_size
        )
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


def test_permuted_frames_give_permuted_outputs():
    query, key, value, projection = random_frames()
    order = torch.randperm(query.shape[2])
    expected = favor_attention(query, key, value, projection)[:, :, order]
    result = favor_attention(
        *(x[:, :, order] for x in (query, key, value)), projection
    )
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_batch_neighbours_do_not_matter(causal):
    query, key, value, projection = random_frames(batch=3)
    # a common stabiliser would be far from that of the louder item
    query[1], key[1], value[1] = 40 * query[1], 40 * key[1], 1e3 * value[1]
    attend = causal_favor_attention if causal else favor_attention
    together = attend(query, key, value, projection)
    together = together[0] if causal else together
    for i in range(2):
        item = slice(i, i + 1)
        alone = attend(query[item], key[item], value[item], projection)
        alone = alone[0] if causal else alone
        torch.testing.assert_close(together[item], alone, atol=1e-6, rtol=1e-5)
    assert causal or together[1].any()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_causal_favor_can_be_traced():
    projection = draw_projection(16, 8)
    query, key, value = torch.randn(3, 1, 2, 300, 8)

    def attend(query):
        return causal_favor_attention(query, key, value, projection)[0]

    traced = torch.jit.trace(attend, query)
    other = torch.randn_like(query)
    assert torch.allclose(traced(other), attend(other), atol=1e-6)


def test_causal_training_keeps_no_features():
    """What the backward pass keeps is less than the features of the frames."""
    projection = draw_projection(64, 8)
    inputs = torch.randn(3, 1, 2, 1024, 8, requires_grad=True)
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        output, _ = causal_favor_attention(*inputs, projection)
    features = 4 * 2 * 1024 * 64
    assert inputs.nbytes <= sum(kept.values()) < inputs.nbytes + features
    output.sum().backward()
    assert bool((inputs.grad[2] > 0).all())


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_equal_difference_quotients(causal):
    *inputs, projection = random_frames(
        frames=5, value_dim=3, batch=1, dtype=torch.float64
    )
    inputs = [x.requires_grad_() for x in inputs]
    mask = torch.tensor([[False, False, True, False, False]])

    def attend(query, key, value):
        if causal:
            return causal_favor_attention(
                query, key, value, projection, mask, chunk_size=2
            )[0]
        return favor_attention(query, key, value, projection, mask)

    assert attend(*inputs).dtype == torch.float64
    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_frames_without_any_key_give_zeros_and_no_gradient(causal):
    query, key, value, projection = random_frames()
    inputs = [x.requires_grad_() for x in (query, key, value)]
    mask = torch.zeros(2, 20, dtype=torch.bool)
    # the first item sees nothing; the second, if causal, nothing at first
    mask[0], mask[1, :4] = True, True
    if causal:
        result, _ = causal_favor_attention(*inputs, projection, mask)
        assert not result[1, :, :4].any()
    else:
        result = favor_attention(*inputs, projection, mask)
    assert not result[0].any()
    assert result[1, :, 4:].all()
    (1e3 * result).sum().backward()
    for x in inputs:
        assert x.grad.isfinite().all()
        assert not x.grad[0].any()


@pytest.mark.parametrize("causal", [False, True])
def test_kernel_is_single_precision_under_autocast(causal, device):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        x.to(device, torch.bfloat16) for x in clustered_frames(generator, 2.0)
    ]
    projection = draw_projection(256, HEAD_DIM, generator).to(device)
    attend = causal_favor_attention if causal else favor_attention

    def unpack(result):
        return result[0] if causal else result

    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = unpack(attend(*inputs, projection))
    expected = unpack(attend(*(x.float() for x in inputs), projection))
    assert result.dtype == torch.bfloat16
    # only the result is rounded
    assert torch.equal(result, expected.to(torch.bfloat16))
    # a bfloat16 kernel errs more than that
    query, key, value = inputs
    rounded = projection.to(torch.bfloat16)
    weights = (
        positive_features(query, rounded) @ positive_features(key, rounded).mT
    )
    weights = weights.tril() if causal else weights
    coarse = weights @ value / weights.sum(-1, keepdim=True)
    assert relative_error(coarse.float(), expected) > 1.7 * relative_error(
        result.float(), expected
    )


@pytest.mark.parametrize("causal", [False, True])
def test_inputs_are_left_alone(causal):
    inputs = random_frames()
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[:, 15:] = True
    before = [x.clone() for x in (*inputs, mask)]
    (causal_favor_attention if causal else favor_attention)(*inputs, mask)
    for x, y in zip((*inputs, mask), before):
        assert torch.equal(x, y)


# -- in blocks of frames


def padded_frames(frames, n_features=16, dtype=torch.float64):
    """Queries, keys, values that need a gradient, directions and a mask."""
    *inputs, _ = random_frames(frames=frames, dtype=dtype)
    mask = torch.zeros(2, frames, dtype=torch.bool)
    mask[1, : frames // 3] = True
    projection = draw_projection(n_features, 8).to(dtype)
    return [x.requires_grad_() for x in inputs], projection, mask


def with_gradients(attend, inputs, *args):
    result = attend(*inputs, *args)
    weights = torch.linspace(-1, 1, result.numel(), device=result.device)
    loss = (result * weights.view(result.shape)).sum()
    return result, *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("n_features", [1, 16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("frames", [1, 64, 97, 200])
def test_blocks_equal_the_plain_form(
    monkeypatch, frames, padded, n_features, device
):
    # blocks of the smallest size: 1 frame to 3 unequal blocks
    monkeypatch.setattr(favor_blocked, "BLOCK_FEATURES", {"cuda": 1})
    inputs, *args = padded_frames(frames, n_features)
    args = [x.to(device) for x in (args if padded else args[:1])]
    inputs = [x.detach().to(device).requires_grad_() for x in inputs]
    expected = with_gradients(plain_favor_attention, inputs, *args)
    result = with_gradients(favor_attention, inputs, *args)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-9)


def test_gradients_of_several_blocks_equal_difference_quotients(monkeypatch):
    monkeypatch.setattr(favor_blocked, "BLOCK_FEATURES", {"cuda": 1})
    monkeypatch.setattr(favor_blocked, "MIN_BLOCK", 3)
    inputs, projection, mask = padded_frames(8, n_features=5)
    assert torch.autograd.gradcheck(
        lambda *inputs: favor_attention(*inputs, projection, mask), inputs
    )


def test_queries_and_keys_may_differ_in_number(monkeypatch):
    monkeypatch.setattr(favor_blocked, "BLOCK_FEATURES", {"cuda": 1})
    (query, key, value), projection, mask = padded_frames(150)
    for part in (slice(0, 1), slice(0, 70)):
        inputs = query[:, :, part], key, value
        expected = with_gradients(
            plain_favor_attention, inputs, projection, mask
        )
        result = with_gradients(favor_attention, inputs, projection, mask)
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_blocks_in_single_precision_follow_the_plain_form(monkeypatch, scale):
    """Also where the stabilisers of blocks differ by hundreds."""
    monkeypatch.setattr(favor_blocked, "BLOCK_FEATURES", {"cuda": 1})
    inputs, projection, mask = padded_frames(300)
    loud = torch.linspace(0, scale, 300, dtype=torch.float64)[:, None]
    (query, key, value) = inputs
    inputs = [loud.flip(0) * query, loud * key, value]
    expected = with_gradients(plain_favor_attention, inputs, projection, mask)
    single = [x.detach().float().requires_grad_() for x in inputs]
    result = with_gradients(favor_attention, single, projection.float(), mask)
    for x, y in zip(result, expected):
        assert x.isfinite().all()
        # a float32 exponent of 500 is good to 3e-5
        assert relative_error(x.double(), y) < (1e-5 if scale == 1 else 1e-3)


def test_inputs_may_be_views_of_any_strides():
    inputs, projection, mask = padded_frames(50)
    expected = with_gradients(favor_attention, inputs, projection, mask)
    # as in SelfAttention, and of every second frame
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    sparse = [x.repeat_interleave(2, 2)[:, :, ::2] for x in inputs]
    for views in (turned, sparse):
        assert not any(x.is_contiguous() for x in views)
        result = with_gradients(favor_attention, views, projection, mask)
        torch.testing.assert_close(result, expected)


def test_backward_is_single_precision_under_autocast_too(device):
    inputs, projection, mask = padded_frames(50, dtype=torch.float32)
    inputs = [x.detach().to(device).requires_grad_() for x in inputs]
    args = projection.to(device), mask.to(device)
    expected = with_gradients(favor_attention, inputs, *args)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = with_gradients(favor_attention, inputs, *args)
    for x, y in zip(result, expected):
        assert torch.equal(x, y)


def test_gradient_of_directions_is_that_of_the_plain_form():
    inputs, projection, mask = padded_frames(6)
    inputs.append(projection.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda *inputs: favor_attention(*inputs, mask), inputs
    )


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


def largest_tensor(attend, frames, backward):
    *inputs, _ = random_frames(frames=frames)
    inputs = [x.requires_grad_(backward) for x in inputs]
    projection = draw_projection(256, 8)
    with LargestTensor() as largest, torch.set_grad_enabled(backward):
        result = attend(*inputs, projection)
        result = result[0] if isinstance(result, tuple) else result
        if backward:
            result.sum().backward()
    return largest.numbers


@pytest.mark.parametrize("backward", [False, True])
def test_no_tensor_holds_the_features_of_all_frames(monkeypatch, backward):
    monkeypatch.setattr(favor_blocked, "BLOCK_FEATURES", {"cuda": 1})
    frames, sequences = 5000, 4
    features = sequences * frames * 256
    for attend in (favor_attention, causal_favor_attention):
        # queries, keys and values have 8 numbers a frame
        largest = largest_tensor(attend, frames, backward)
        assert largest < 0.08 * features
    # the measure sees those of the plain form
    plain = largest_tensor(plain_favor_attention, frames, backward)
    assert plain >= features


@pytest.mark.slow
def test_compiled_attention_is_one_graph():
    inputs, projection, mask = padded_frames(40, dtype=torch.float32)
    expected = with_gradients(favor_attention, inputs, projection, mask)
    compiled = torch.compile(
        favor_attention, fullgraph=True, backend="aot_eager"
    )
    result = with_gradients(compiled, inputs, projection, mask)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)
