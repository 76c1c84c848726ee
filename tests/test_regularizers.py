"""Diversity and sparsity against loops, their bounds, and silence."""

import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st

from trackformer_sb.objectives.metrics import effective_mask_count
from trackformer_sb.objectives.regularizers import (
    diversity_loss,
    mask_cosines,
    mask_count_loss,
    mask_gram,
    sparsity_loss,
)

SEEDS = st.integers(0, 2**31)


@pytest.mark.parametrize("shape", [(2, 2, 5), (3, 4, 6, 7), (1, 3, 2, 3, 4)])
def test_diversity_equals_the_loop(shape, device):
    masks = torch.randn(shape)
    expected = references.diversity(masks).float()
    torch.testing.assert_close(
        diversity_loss(masks.to(device)).cpu(), expected, atol=1e-6, rtol=1e-4
    )


def test_diversity_takes_the_view_a_masknet_leaves():
    masks = torch.rand(4, 2, 7, 6).transpose(2, 3).transpose(0, 1)
    torch.testing.assert_close(
        diversity_loss(masks), references.diversity(masks).float()
    )
    torch.testing.assert_close(
        diversity_loss(masks), diversity_loss(masks.contiguous())
    )


@given(num=st.integers(2, 6), signed=st.booleans(), seed=SEEDS)
def test_diversity_is_between_zero_and_one(num, signed, seed):
    torch.manual_seed(seed)
    masks = torch.randn(2, num, 10) * torch.logspace(0, -3, num)[:, None]
    masks = masks if signed else masks.relu()
    value = diversity_loss(masks)
    assert (value >= 0).all() and (value <= 1 + 1e-6).all()


def test_diversity_of_known_masks():
    disjoint = torch.eye(4).unsqueeze(0)
    equal = torch.rand(1, 1, 9).expand(1, 4, 9)
    assert diversity_loss(disjoint).item() == 0.0
    assert diversity_loss(equal).item() == pytest.approx(1.0, abs=1e-5)
    # multiples of either sign are no more diverse
    multiples = equal * torch.tensor([1.0, 0.1, 5.0, -2.0])[:, None]
    assert diversity_loss(multiples).item() == pytest.approx(1.0, abs=1e-5)
    # one equal pair of three masks
    pair = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    assert diversity_loss(pair).item() == pytest.approx(1 / 3, abs=1e-6)


def test_diversity_does_not_depend_on_the_scale_of_a_mask():
    masks = torch.rand(2, 3, 20)
    scaled = masks * torch.tensor([1.0, 0.2, 10.0])[:, None]
    torch.testing.assert_close(
        diversity_loss(scaled), diversity_loss(masks), atol=1e-5, rtol=0
    )


def test_descending_on_diversity_separates_masks():
    logits = torch.randn(1, 3, 30, requires_grad=True)
    before = diversity_loss(logits.softmax(1)).item()
    for _ in range(100):
        (slope,) = torch.autograd.grad(
            diversity_loss(logits.softmax(1)).sum(), logits
        )
        logits = (logits - 10 * slope).detach().requires_grad_()
    assert diversity_loss(logits.softmax(1)).item() < 0.5 * before


@pytest.mark.parametrize("zeros", [slice(0, 1), slice(0, 3)])
def test_masks_of_zeros_are_orthogonal_and_have_finite_gradients(zeros):
    masks = torch.rand(1, 3, 4, 5)
    masks[:, zeros] = 0.0
    masks.requires_grad_()
    value = diversity_loss(masks)
    value.sum().backward()
    assert not mask_cosines(masks)[0, 0, 1:].any()
    assert value.isfinite().all()
    assert masks.grad.isfinite().all()


def test_gram_is_single_precision_under_autocast(device):
    masks = torch.rand(2, 3, 50, 40, device=device).to(torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        gram = mask_gram(masks)
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram, mask_gram(masks.float()))


def test_one_mask_is_refused():
    with pytest.raises(ValueError, match=r"at least 2 masks.*got 1"):
        diversity_loss(torch.ones(2, 1, 3))


# -- sparsity


def test_sparsity_equals_the_loop(device):
    est_source, mix = torch.randn(3, 4, 100), torch.randn(3, 100)
    torch.testing.assert_close(
        sparsity_loss(est_source.to(device), mix.to(device)).cpu(),
        references.sparsity(est_source, mix).float(),
    )
    torch.testing.assert_close(
        sparsity_loss(est_source.to(device)).cpu(),
        references.sparsity(est_source, est_source.sum(1)).float(),
    )


@given(num=st.integers(1, 8), seed=SEEDS)
def test_sparsity_of_sources_that_sum_to_the_mixture_is_at_least_one(num, seed):
    torch.manual_seed(seed)
    est_source = torch.randn(2, num, 30) * torch.rand(2, num, 1)
    assert (sparsity_loss(est_source) >= 1 - 1e-5).all()


def test_sparsity_of_known_sources():
    source = torch.randn(1, 1, 1000)
    alone = torch.cat([source, torch.zeros(1, 3, 1000)], 1)
    assert sparsity_loss(alone).item() == pytest.approx(1.0, abs=1e-4)
    # one source cut in parts of equal sign has the same sum of levels
    assert sparsity_loss(source.expand(1, 4, -1) / 4).item() == pytest.approx(
        1.0, abs=1e-4
    )
    # disjoint tones of equal level
    angle = torch.arange(1000) * 2 * torch.pi / 1000
    tones = torch.stack([torch.sin(k * angle) for k in (3, 5, 8, 13)])
    assert sparsity_loss(tones[None]).item() == pytest.approx(2.0, abs=1e-4)


def test_sparsity_does_not_depend_on_the_level():
    est_source = torch.randn(2, 3, 100)
    for gain in (1e-3, 100.0):
        torch.testing.assert_close(
            sparsity_loss(gain * est_source), sparsity_loss(est_source)
        )


@pytest.mark.parametrize("silence", ["one source", "mix", "everything"])
def test_silence_gives_finite_sparsity_and_gradients(silence):
    est_source, mix = torch.randn(2, 3, 50), torch.randn(2, 50)
    if silence == "one source":
        est_source[:, 0] = 0.0
    if silence in ("mix", "everything"):
        mix[0] = 0.0
    if silence == "everything":
        est_source[0] = 0.0
    est_source.requires_grad_()
    value = sparsity_loss(est_source, mix)
    value.sum().backward()
    assert value.isfinite().all()
    assert est_source.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_levels_are_summed_in_single(dtype):
    est_source = torch.randn(2, 3, 20000).to(dtype)
    mix = torch.randn(2, 20000).to(dtype)
    value = sparsity_loss(est_source, mix)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value, sparsity_loss(est_source.float(), mix.float())
    )


# -- number of masks


@given(num=st.integers(1, 6), seed=SEEDS)
def test_mask_count_is_the_measure_of_that_name(num, seed):
    torch.manual_seed(seed)
    masks = torch.rand(2, num, 7, 6) * torch.logspace(0, -3, num)[:, None, None]
    count = mask_count_loss(masks)
    torch.testing.assert_close(
        count, effective_mask_count(masks), atol=1e-4, rtol=1e-4
    )
    assert (count >= 1).all() and (count <= num + 1e-5).all()


def test_mask_count_sees_masks_that_sparsity_does_not():
    equal, single = torch.full((1, 4, 9), 0.25), torch.zeros(1, 4, 9)
    single[:, 0] = 1.0
    mix = torch.randn(1, 9)
    sparsity = [sparsity_loss(m * mix[:, None], mix) for m in (equal, single)]
    torch.testing.assert_close(*sparsity, atol=1e-4, rtol=0)
    assert mask_count_loss(equal).item() == pytest.approx(4)
    assert mask_count_loss(single).item() == pytest.approx(1, abs=1e-5)


def test_descending_on_the_mask_count_leaves_fewer_masks():
    logits = torch.randn(1, 6, 40, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    counts = []
    for _ in range(100):
        count = mask_count_loss(logits.softmax(1)).sum()
        counts.append(count.item())
        optimizer.zero_grad()
        count.backward()
        optimizer.step()
    assert counts[0] > 5 and counts[-1] < 1.5


@pytest.mark.parametrize("zeros", ["one mask", "all masks"])
def test_masks_of_zeros_have_a_count_and_finite_gradients(zeros):
    masks = torch.rand(2, 3, 5, 4)
    masks[:, : 1 if zeros == "one mask" else 3] = 0.0
    masks.requires_grad_()
    count = mask_count_loss(masks)
    count.sum().backward()
    assert count.isfinite().all() and masks.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_masks_are_counted_in_single(dtype):
    masks = torch.rand(2, 3, 200, 100).to(dtype)
    count = mask_count_loss(masks)
    assert count.dtype == torch.float32
    torch.testing.assert_close(count, mask_count_loss(masks.float()))


def test_inputs_are_left_alone():
    masks, est_source = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 50)
    before = masks.clone(), est_source.clone()
    diversity_loss(masks)
    sparsity_loss(est_source, est_source[:, 0])
    assert torch.equal(masks, before[0])
    assert torch.equal(est_source, before[1])
