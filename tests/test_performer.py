"""The Performer: one set of weights for exact and estimated attention."""

import math

import pytest
import torch

from trackformer_sb.nnet import performer
from trackformer_sb.nnet.performer import (
    PerformerEncoder,
    SelfAttention,
    sinusoidal_positions,
)

SIZES = {"d_model": 32, "nhead": 4, "num_layers": 2, "n_features": 64}


def encoders(*kinds, **kwargs):
    """Encoders of several kinds of attention with the same weights."""
    made = [
        PerformerEncoder(**SIZES, attention=kind, **kwargs).eval()
        for kind in kinds
    ]
    for encoder in made[1:]:
        encoder.load_state_dict(made[0].state_dict())
    return made


def buffers(encoder):
    return [buffer.clone() for buffer in encoder.buffers()]


# -- kinds of attention


def test_favor_estimates_softmax_with_the_same_weights(device):
    favored, exact = (x.to(device) for x in encoders("favor", "softmax"))
    x = torch.randn(2, 50, 32, device=device)
    estimate, expected = favored(x), exact(x)
    assert not torch.equal(estimate, expected)
    assert (estimate - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("causal", [False, True])
def test_auto_is_exact_up_to_a_length(monkeypatch, causal):
    monkeypatch.setattr(performer, "auto_max_exact_frames", lambda *_: 20)
    auto, favored, exact = encoders("auto", "favor", "softmax", causal=causal)
    for frames, same, other in ((20, exact, favored), (21, favored, exact)):
        x = torch.randn(1, frames, 32)
        assert torch.equal(auto(x), same(x))
        assert not torch.equal(auto(x), other(x))


def test_attention_is_that_of_the_formula():
    attention = SelfAttention(32, 4, attention="softmax")
    with torch.no_grad():
        attention.temperature.normal_()
    x = torch.randn(1, 6, 32)
    query, key, value = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        cosine = torch.cosine_similarity(
            query[:, :, None, part], key[:, None, :, part], dim=-1
        )
        temperature = 2 / (1 + (-attention.temperature[head]).exp())
        weights = (temperature * cosine).softmax(-1)
        heads.append(weights @ value[..., part])
    expected = attention.out(torch.cat(heads, -1))
    torch.testing.assert_close(attention(x), expected, atol=1e-6, rtol=1e-5)


# -- random features


def test_equal_generators_redraw_equal_features():
    first, second = PerformerEncoder(**SIZES), PerformerEncoder(**SIZES)
    before = buffers(first)
    first.redraw_projections(torch.Generator().manual_seed(7))
    torch.rand(3)
    second.redraw_projections(torch.Generator().manual_seed(7))
    for old, new, other in zip(before, buffers(first), buffers(second)):
        assert torch.equal(new, other)
        assert not torch.equal(new, old)
    # layers have features of their own
    assert not torch.equal(*buffers(first))


# -- frames


@pytest.mark.parametrize("kind", ["favor", "softmax"])
def test_later_inputs_do_not_change_earlier_outputs(kind, device):
    (encoder,) = encoders(kind, causal=True)
    encoder = encoder.to(device)
    x = torch.randn(2, 150, 32, device=device)
    changed = x.clone()
    changed[:, 100:] = torch.randn_like(changed[:, 100:])
    before, after = encoder(x), encoder(changed)
    torch.testing.assert_close(
        after[:, :100], before[:, :100], atol=1e-5, rtol=0
    )
    assert not torch.allclose(after[:, 100:], before[:, 100:], atol=1e-2)


def test_positions_are_added_to_the_frames():
    (encoder,) = encoders("softmax")
    x, without = torch.randn(1, 30, 32), torch.zeros(30, 32)
    moved = x + sinusoidal_positions(30, 32)
    torch.testing.assert_close(encoder(moved, positions=without), encoder(x))
    assert not torch.allclose(encoder(x, positions=without), encoder(x))


def test_positions_are_sines_and_cosines_from_one_to_10000_radians():
    positions = sinusoidal_positions(5, 8)
    for frame in range(5):
        for channel in range(4):
            angle = frame / 10000 ** (2 * channel / 8)
            assert positions[frame, channel] == pytest.approx(
                math.sin(angle), abs=1e-6
            )
            assert positions[frame, channel + 4] == pytest.approx(
                math.cos(angle), abs=1e-6
            )


@pytest.mark.parametrize("kind", ["favor", "softmax"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_equals_a_shorter_input(kind, causal, device):
    (encoder,) = encoders(kind, causal=causal)
    encoder = encoder.to(device)
    x = torch.randn(2, 30, 32, device=device)
    mask = torch.zeros(2, 30, dtype=torch.bool, device=device)
    mask[0, 17:] = True
    result = encoder(x, mask)
    torch.testing.assert_close(
        result[:1, :17], encoder(x[:1, :17]), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(result[1:], encoder(x[1:]), atol=1e-5, rtol=1e-4)
    assert result.isfinite().all()


# -- training


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["favor", "softmax"])
def test_checkpointing_changes_no_loss_and_no_gradient(kind, autocast, device):
    plain, saving = (
        PerformerEncoder(
            **SIZES, attention=kind, dropout=0.3, checkpointing=checkpointing
        ).to(device)
        for checkpointing in (False, True)
    )
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 40, 32, device=device)
    mask = torch.arange(40, device=device) >= torch.tensor(
        [[40], [25]], device=device
    )
    losses = []
    for encoder in (plain, saving):
        # dropout, the same in both and when a layer is computed again
        torch.manual_seed(1)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = encoder(x, mask).square().mean()
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for one, other in zip(plain.parameters(), saving.parameters()):
        assert one.grad.any()
        torch.testing.assert_close(other.grad, one.grad, atol=1e-7, rtol=1e-5)


# -- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "linear"}, "favor, softmax, auto, got 'linear'"),
        ({"nhead": 5}, "got nhead=5 with d_model=32"),
        ({"d_model": 33, "nhead": 1}, "d_model must be even, got 33"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PerformerEncoder(**{**SIZES, **options}).positions(4)
