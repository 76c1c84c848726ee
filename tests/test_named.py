"""Named stems: the loss, and the optimizer that trains them."""

import pytest
import torch

from trackformer_sb.objectives.named import absent_loss, named_loss
from trackformer_sb.training.optimization import MuonAdamW, orthogonalise

CLASSES, SLOTS, BATCH, FREQ, FRAMES = 3, 2, 4, 33, 6


def spectra(*shape):
    return torch.randn(*shape, dtype=torch.complex64)


def test_loss_equals_a_loop():
    masks = torch.rand(CLASSES * SLOTS, BATCH, FREQ, FRAMES)
    mix_w = spectra(BATCH, 2, FREQ, FRAMES)
    stems_w = spectra(BATCH, CLASSES, 2, FREQ, FRAMES)
    weights = [1 / (22050 * k / (FREQ - 1) + 300) for k in range(FREQ)]
    mean = sum(weights) / FREQ
    expected = torch.zeros(BATCH)
    for b in range(BATCH):
        for c in range(CLASSES):
            for f in range(FREQ):
                mask = masks[c * SLOTS, b, f] + masks[c * SLOTS + 1, b, f]
                estimate = mask * mix_w[b, :, f].abs()
                target = stems_w[b, c, :, f].abs()
                root = (estimate + 1e-6).sqrt() - (target + 1e-6).sqrt()
                both = 2 * root.abs() + 0.1 * (estimate - target).abs()
                expected[b] += weights[f] / mean * both.mean()
    found = named_loss(masks, mix_w, stems_w, 44100)
    torch.testing.assert_close(found, expected / CLASSES / FREQ)


def test_absent_classes_are_compared_with_silence():
    absent = torch.tensor([[True, False], [False, True], [False, False]])
    mix_w = spectra(3, 2, FREQ, FRAMES)
    # all is in class 0, which is right in the second item alone
    masks = torch.zeros(2, 3, FREQ, FRAMES)
    masks[0] = 1.0
    stems_w = torch.stack([torch.zeros_like(mix_w), mix_w], 1)
    found = absent_loss(masks, mix_w, absent, 44100)
    # half of what names of both classes would have found
    expected = named_loss(masks, mix_w, stems_w, 44100) / 2
    assert found.tolist() == pytest.approx([expected[0].item(), 0, 0])


def test_silence_has_finite_gradients():
    masks = torch.rand(4, 1, FREQ, FRAMES, requires_grad=True)
    zeros = torch.zeros(1, 2, 2, FREQ, FRAMES, dtype=torch.complex64)
    named_loss(masks, zeros.sum(1), zeros, 44100).sum().backward()
    assert masks.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(32, 100), (100, 32), (40, 40)], ids=str)
def test_orthogonalised_values_are_near_one(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    # a square random matrix has singular values near zero
    assert (values < 1.4).all()
    assert (values > 0.4).float().mean() > 0.9


def test_muon_steps_matrices_and_adamw_the_rest():
    weight = torch.nn.Parameter(torch.randn(32, 4, 3, 3))
    bias = torch.nn.Parameter(torch.randn(32))
    before = weight.detach().clone(), bias.detach().clone()
    optimizer = MuonAdamW([weight, bias], lr=1e-2, weight_decay=0.0)
    weight.grad, bias.grad = torch.randn_like(weight), torch.ones(32)
    optimizer.step()
    # AdamW's first step is the rate times the sign
    torch.testing.assert_close(bias.detach(), before[1] - 1e-2)
    step = (before[0] - weight.detach()).flatten(1)
    # 2 lr 0.2 sqrt(36) times singular values near 1
    values = torch.linalg.svdvals(step) / (2e-2 * 0.2 * 6)
    assert values.max() < 1.4
    assert weight.grad is not None


def test_muon_goes_on_from_its_state():
    def steps(optimizer, weight, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            weight.grad = torch.randn(32, 40, generator=generator)
            optimizer.step()

    first = torch.nn.Parameter(torch.zeros(32, 40))
    whole = MuonAdamW([first])
    steps(whole, first, range(4))
    second = torch.nn.Parameter(torch.zeros(32, 40))
    begun = MuonAdamW([second])
    steps(begun, second, range(2))
    third = torch.nn.Parameter(second.detach().clone())
    resumed = MuonAdamW([third])
    resumed.load_state_dict(begun.state_dict())
    steps(resumed, third, range(2, 4))
    torch.testing.assert_close(third, first)
