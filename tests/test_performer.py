"""The Performer: one set of weights for exact and estimated attention."""

import math

import pytest
import torch

from trackformer_sb.nnet import favor, performer
from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.nnet.performer import (
    PerformerEncoder,
    PerformerLayer,
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


def test_kinds_share_keys_and_shapes():
    shapes = [
        {key: value.shape for key, value in encoder.state_dict().items()}
        for encoder in encoders("favor", "softmax", "auto")
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    assert "layers.0.attention.projection" in shapes[0]


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


def test_queries_and_keys_keep_to_the_norms_favor_can_estimate(monkeypatch):
    norms = []

    def spy(query, key, *args):
        norms.append(torch.stack([query.norm(dim=-1), key.norm(dim=-1)]))
        return favor_attention(query, key, *args)

    favor_attention = favor.favor_attention
    monkeypatch.setattr(favor, "favor_attention", spy)
    attention = SelfAttention(32, 4, n_features=16)
    attention(1e3 * torch.randn(1, 10, 32))
    torch.testing.assert_close(norms[0], torch.ones_like(norms[0]))
    with torch.no_grad():
        attention.temperature.fill_(50.0)
    attention(torch.randn(1, 10, 32))
    torch.testing.assert_close(
        norms[1], torch.full_like(norms[1], performer.MAX_TEMPERATURE**0.5)
    )


@pytest.mark.parametrize("kind", ["favor", "softmax"])
def test_temperature_is_learned(kind):
    attention = SelfAttention(32, 4, attention=kind)
    attention(torch.randn(1, 10, 32)).square().sum().backward()
    assert attention.temperature.grad.all()


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


def test_features_change_by_an_explicit_call_only():
    encoder = PerformerEncoder(**SIZES).train()
    before = buffers(encoder)
    for _ in range(2):
        encoder(torch.randn(1, 10, 32)).sum().backward()
    encoder.eval().train()
    for old, new in zip(before, encoder.buffers()):
        assert torch.equal(old, new)
        assert not new.requires_grad


def test_features_are_saved_with_the_weights():
    first, second = PerformerEncoder(**SIZES), PerformerEncoder(**SIZES)
    x = torch.randn(1, 10, 32)
    first, second = first.eval(), second.eval()
    assert not torch.allclose(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


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


@pytest.mark.parametrize("kind", ["favor", "softmax"])
def test_without_causal_later_inputs_do_matter(kind):
    (encoder,) = encoders(kind)
    x = torch.randn(1, 30, 32)
    changed = x.clone()
    changed[:, 20:] = torch.randn_like(changed[:, 20:])
    assert not torch.allclose(
        encoder(changed)[:, :20], encoder(x)[:, :20], atol=1e-3
    )


def test_positions_tell_frames_apart():
    (encoder,) = encoders("softmax")
    x, order = torch.randn(1, 30, 32), torch.randperm(30)
    without = torch.zeros(30, 32)
    torch.testing.assert_close(
        encoder(x[:, order], positions=without),
        encoder(x, positions=without)[:, order],
        atol=1e-5,
        rtol=1e-4,
    )
    assert not torch.allclose(
        encoder(x[:, order]), encoder(x)[:, order], atol=0.1
    )
    torch.testing.assert_close(
        encoder(x), encoder(x, positions=encoder.positions(30))
    )


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


def test_positions_go_on_where_a_stream_stopped():
    whole = sinusoidal_positions(5168, 16)
    rest = sinusoidal_positions(68, 16, start=5100)
    torch.testing.assert_close(rest, whole[5100:])


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


def test_dropout_acts_in_training_only():
    x = torch.randn(1, 10, 32)
    encoder = PerformerEncoder(**SIZES, dropout=0.5)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))
    encoder = PerformerEncoder(**SIZES, dropout=0.0)
    trained = encoder(x)
    assert torch.equal(trained, encoder.eval()(x))


def test_every_weight_gets_a_gradient():
    encoder = PerformerEncoder(**SIZES)
    encoder(torch.randn(2, 10, 32)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# -- activation checkpointing


def kept_by_autograd(call):
    """What a call returns, and the bytes it leaves for the backward pass."""
    stored = {}

    def note(x):
        storage = x.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = call()
    return result, sum(stored.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["favor", "softmax"])
def test_checkpointing_changes_no_loss_and_no_gradient(
    kind, padded, autocast, device
):
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
            loss = encoder(x, mask if padded else None).square().mean()
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for one, other in zip(plain.parameters(), saving.parameters()):
        assert one.grad.any()
        torch.testing.assert_close(other.grad, one.grad, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", ["favor", "softmax"])
def test_checkpointing_keeps_inputs_of_layers_only(kind):
    x = torch.randn(2, 200, 32)
    kept = {}
    for layers in (2, 6):
        for checkpointing in (False, True):
            encoder = PerformerEncoder(
                **{**SIZES, "num_layers": layers},
                attention=kind,
                checkpointing=checkpointing,
            )
            _, kept[layers, checkpointing] = kept_by_autograd(
                lambda encoder=encoder: encoder(x)
            )
    # a layer more keeps its input and no more
    frames = x.numel() * x.element_size()
    assert kept[6, True] - kept[2, True] == 4 * frames
    assert kept[6, False] - kept[2, False] > 4 * 8 * frames
    assert kept[6, True] < kept[6, False] / 8


def test_checkpointing_acts_in_training_with_gradients_only(monkeypatch):
    calls = []

    def spy(layer, *args, **kwargs):
        calls.append(layer)
        return layer(*args)

    monkeypatch.setattr(performer, "checkpoint", spy)
    masknet = PerformerMaskNet(33, 3, **SIZES, dropout=0.0, checkpointing=True)
    mix_w = torch.randn(1, 33, 10)
    with torch.no_grad():
        expected = masknet(mix_w)
    assert torch.equal(masknet.eval()(mix_w), expected)
    assert not calls
    assert torch.equal(masknet.train()(mix_w), expected)
    assert calls == list(masknet.encoder.layers)


def test_layer_is_the_identity_with_blocks_of_zeros():
    layer = PerformerLayer(32, 4, d_ffn=64)
    for linear in (layer.attention.out, layer.ffn[2]):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    x = torch.randn(1, 5, 32)
    assert torch.equal(layer(x), x)


def test_inputs_are_left_alone():
    (encoder,) = encoders("favor")
    x = torch.randn(1, 10, 32)
    before = x.clone()
    encoder(x)
    assert torch.equal(x, before)


# -- errors


def test_unknown_attention_is_refused():
    with pytest.raises(
        ValueError, match="one of favor, softmax, auto, got 'linear'"
    ):
        PerformerEncoder(32, 4, 1, attention="linear")


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="got nhead=5 with d_model=32"):
        SelfAttention(32, 5)


def test_odd_d_model_is_refused():
    with pytest.raises(ValueError, match="d_model must be even, got 33"):
        sinusoidal_positions(4, 33)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16]
)
def test_vectors_of_zeros_stay_zeros_in_any_precision(dtype):
    vectors = torch.zeros(2, 3, 8, dtype=dtype)
    vectors[0] = 0.5
    scaled = performer._to_norm(vectors, torch.tensor(1.25))
    assert scaled.dtype == dtype
    assert not scaled[1].any()
    norms = scaled[0].float().norm(dim=-1)
    torch.testing.assert_close(norms, torch.full((3,), 1.25), rtol=1e-2, atol=0)
