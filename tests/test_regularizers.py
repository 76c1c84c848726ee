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
    before = masks.clone()
    expected = references.diversity(masks).float()
    # a view, as a masknet leaves it
    view = masks.transpose(-1, -2).contiguous().transpose(-1, -2)
    for each in (masks, view if len(shape) > 3 else masks):
        torch.testing.assert_close(
            diversity_loss(each.to(device)).cpu(),
            expected,
            atol=1e-6,
            rtol=1e-4,
        )
    assert torch.equal(masks, before)


@given(num=st.integers(2, 6), signed=st.booleans(), seed=SEEDS)
def test_bounds_of_the_losses(num, signed, seed):
    torch.manual_seed(seed)
    masks = torch.randn(2, num, 10) * torch.logspace(0, -3, num)[:, None]
    masks = masks if signed else masks.relu()
    value = diversity_loss(masks)
    assert (value >= 0).all() and (value <= 1 + 1e-6).all()
    # of sources that sum to the mixture
    assert (sparsity_loss(masks) >= 1 - 1e-5).all()
    count = mask_count_loss(masks)
    assert (count >= 1).all() and (count <= num + 1e-5).all()
    torch.testing.assert_close(
        count, effective_mask_count(masks), atol=1e-4, rtol=1e-4
    )


def test_diversity_of_known_masks():
    disjoint = torch.eye(4).unsqueeze(0)
    equal = torch.rand(1, 1, 9).expand(1, 4, 9)
    assert diversity_loss(disjoint).item() == 0.0
    # multiples of either sign are no more diverse
    multiples = equal * torch.tensor([1.0, 0.1, 5.0, -2.0])[:, None]
    assert diversity_loss(multiples).item() == pytest.approx(1.0, abs=1e-5)
    # one equal pair of three masks
    pair = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    assert diversity_loss(pair).item() == pytest.approx(1 / 3, abs=1e-6)
    with pytest.raises(ValueError, match=r"at least 2 masks.*got 1"):
        diversity_loss(torch.ones(2, 1, 3))


def test_sparsity_equals_the_loop(device):
    est_source, mix = torch.randn(3, 4, 100), torch.randn(3, 100)
    for each in (mix, est_source.sum(1)):
        expected = references.sparsity(est_source, each).float()
        value = sparsity_loss(est_source.to(device), each.to(device))
        torch.testing.assert_close(value.cpu(), expected)
        # at any level
        louder = sparsity_loss(100 * est_source, 100 * each)
        torch.testing.assert_close(louder, expected)
    torch.testing.assert_close(sparsity_loss(est_source), expected)


def test_sparsity_of_known_sources():
    source = torch.randn(1, 1, 1000)
    alone = torch.cat([source, torch.zeros(1, 3, 1000)], 1)
    assert sparsity_loss(alone).item() == pytest.approx(1.0, abs=1e-4)
    # disjoint tones of equal level
    angle = torch.arange(1000) * 2 * torch.pi / 1000
    tones = torch.stack([torch.sin(k * angle) for k in (3, 5, 8, 13)])
    assert sparsity_loss(tones[None]).item() == pytest.approx(2.0, abs=1e-4)


def test_mask_count_sees_masks_that_sparsity_does_not():
    equal, single = torch.full((1, 4, 9), 0.25), torch.zeros(1, 4, 9)
    single[:, 0] = 1.0
    mix = torch.randn(1, 9)
    sparsity = [sparsity_loss(m * mix[:, None], mix) for m in (equal, single)]
    torch.testing.assert_close(*sparsity, atol=1e-4, rtol=0)
    assert mask_count_loss(equal).item() == pytest.approx(4)
    assert mask_count_loss(single).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("loss", [diversity_loss, mask_count_loss])
def test_descending_tells_masks_apart(loss):
    logits = torch.randn(1, 6, 40, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    values = []
    for _ in range(100):
        value = loss(logits.softmax(1)).sum()
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize(
    "loss", [diversity_loss, mask_count_loss, sparsity_loss]
)
@pytest.mark.parametrize("zeros", [1, 3])
def test_silence_gives_finite_losses_and_gradients(loss, zeros):
    x = torch.rand(2, 3, 50)
    x[0, :zeros] = 0.0
    x.requires_grad_()
    value = loss(x)
    value.sum().backward()
    assert value.isfinite().all() and x.grad.isfinite().all()
    if loss is diversity_loss:
        assert not mask_cosines(x)[0, 0, 1:].any()
    if loss is sparsity_loss:
        silent = torch.zeros(2, 50)
        assert sparsity_loss(x, silent).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [mask_gram, mask_count_loss, sparsity_loss])
def test_half_precision_is_summed_in_single(loss, dtype, device):
    x = torch.rand(2, 3, 20000, device=device).to(dtype)
    more = [x[:, 0]] if loss is sparsity_loss else []
    with torch.autocast(device.type, dtype=torch.bfloat16):
        value = loss(x, *more)
    assert value.dtype == torch.float32
    single = [each.float() for each in (x, *more)]
    torch.testing.assert_close(value, loss(*single))
