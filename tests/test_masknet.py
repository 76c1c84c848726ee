"""The masknet: SpeechBrain's contract, normalisation, silence, padding."""

import pytest
import torch
from speechbrain.lobes.models.dual_path import Decoder, Encoder

from trackformer_sb.nnet.features import (
    SPEC_NORMS,
    SpectrogramEncoder,
    normalise_spectrogram,
)
from trackformer_sb.nnet.masknet import MASK_ACTIVATIONS, PerformerMaskNet
from trackformer_sb.nnet.stft import STFTEncoder
from trackformer_sb.objectives.regularizers import mask_gram


def small_masknet(**kwargs):
    """33 channels, 3 sources, one layer, no dropout."""
    sizes = {
        "in_channels": 33,
        "num_spks": 3,
        "d_model": 16,
        "nhead": 2,
        "num_layers": 1,
        "n_features": 16,
        "dropout": 0.0,
    }
    return PerformerMaskNet(**{**sizes, **kwargs})


def spectra(batch=2, frames=20):
    """Complex noise with a spectral slope, [batch, 33, frames]."""
    slope = torch.logspace(1, -2, 33)[:, None]
    return slope * torch.randn(batch, 33, frames, dtype=torch.complex64)


# -- masks


@pytest.mark.parametrize("is_complex", [True, False])
@pytest.mark.parametrize("activation", MASK_ACTIVATIONS)
@pytest.mark.parametrize("spec_norm", SPEC_NORMS)
@pytest.mark.parametrize("frames", [1, 2, 20])
def test_masks_keep_the_contract(
    is_complex, activation, spec_norm, frames, device
):
    masknet = small_masknet(mask_activation=activation, spec_norm=spec_norm)
    mix_w = spectra(2, frames)
    mix_w = mix_w if is_complex else mix_w.abs()
    before = mix_w.clone()
    masks = masknet.to(device)(mix_w.to(device)).cpu()
    assert masks.shape == (3, 2, 33, frames)
    assert masks.dtype == torch.float32
    assert masks.isfinite().all()
    assert torch.equal(mix_w, before)
    assert (masks >= 0).all()
    if activation == "softmax":
        torch.testing.assert_close(masks.sum(0), torch.ones(2, 33, frames))
    elif activation == "sigmoid":
        assert (masks <= 1).all()
        assert (masks.sum(0) - 1).abs().max() > 0.1
    else:
        assert (masks == 0).any() and (masks > 0).any()


def test_each_source_has_weights_of_its_own():
    masknet = small_masknet(mask_activation="sigmoid")
    mix_w = spectra()
    before = masknet(mix_w)
    with torch.no_grad():
        # the second source's rows
        masknet.head.bias[33:66] += 1.0
    after = masknet(mix_w)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[2], before[2])
    torch.testing.assert_close(after[1].logit(), before[1].logit() + 1.0)


def test_masks_are_those_of_the_plain_linear_head():
    masknet = small_masknet(mask_activation="sigmoid").eval()
    mix_w = spectra()
    frames = masknet.encoder(masknet.embedding(masknet.spectrogram(mix_w)))
    # [batch, frames, num_spks, channels] -> [num_spks, batch, channels, frames]
    plain = masknet.head(frames).sigmoid().unflatten(-1, (3, 33))
    torch.testing.assert_close(masknet(mix_w), plain.permute(2, 0, 3, 1))


def test_every_weight_gets_a_gradient():
    masknet = small_masknet()
    masks = masknet(spectra())
    (masks * torch.randn_like(masks)).sum().backward()
    for name, parameter in masknet.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_redraw_reaches_the_encoder():
    masknet = small_masknet().eval()
    mix_w = spectra()
    before = masknet(mix_w)
    masknet.redraw_projections(torch.Generator().manual_seed(1))
    once = masknet(mix_w)
    masknet.redraw_projections(torch.Generator().manual_seed(1))
    assert not torch.equal(once, before)
    assert torch.equal(masknet(mix_w), once)


# -- what the network sees


@pytest.mark.parametrize("is_complex", [True, False])
def test_zscore_has_mean_zero_and_variance_one_per_item(is_complex):
    mix_w = spectra()
    mix_w[1] *= 100
    seen = small_masknet().spectrogram(mix_w if is_complex else mix_w.abs())
    assert seen.shape == (2, 20, 33)
    torch.testing.assert_close(
        seen.mean((1, 2)), torch.zeros(2), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        seen.square().mean((1, 2)), torch.ones(2), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("is_complex", [True, False])
def test_minmax_spans_zero_to_one_per_item(is_complex):
    mix_w = spectra()
    mix_w[1] *= 100
    masknet = small_masknet(spec_norm="minmax")
    seen = masknet.spectrogram(mix_w if is_complex else mix_w.abs())
    torch.testing.assert_close(seen.amin((1, 2)), torch.zeros(2))
    torch.testing.assert_close(seen.amax((1, 2)), torch.ones(2))


def test_complex_input_is_seen_as_a_logarithm():
    seen = small_masknet(spec_norm="none").spectrogram(spectra())
    louder = small_masknet(spec_norm="none").spectrogram(10 * spectra())
    mix_w = spectra()
    mix_w[:, 10, 5] = 100.0
    seen = small_masknet(spec_norm="none").spectrogram(mix_w)
    louder = small_masknet(spec_norm="none").spectrogram(10 * mix_w)
    torch.testing.assert_close(
        louder - seen, torch.full_like(seen, 10.0).log(), atol=1e-4, rtol=0
    )
    # 60 dB below the mean magnitude there is a floor
    assert float(seen[0, 5, 10]) == pytest.approx(4.605, abs=0.01)
    mix_w[:, 20] = 0.0
    floor = small_masknet(spec_norm="none").spectrogram(mix_w)[0, :, 20]
    expected = (1e-3 * mix_w[0].abs().mean()).log()
    torch.testing.assert_close(floor, expected.expand(20))


@pytest.mark.parametrize("spec_norm", ["zscore", "minmax"])
@pytest.mark.parametrize("gain", [1e-3, 30.0])
def test_masks_do_not_depend_on_the_gain(spec_norm, gain):
    masknet = small_masknet(spec_norm=spec_norm)
    mix_w = spectra()
    torch.testing.assert_close(
        masknet(gain * mix_w), masknet(mix_w), atol=1e-4, rtol=0
    )
    without = small_masknet(spec_norm="none")
    difference = without(gain * mix_w) - without(mix_w)
    assert difference.abs().max() > 0.01


def test_masks_do_not_depend_on_the_phase():
    masknet = small_masknet()
    mix_w = spectra()
    phase = torch.polar(torch.ones(33, 20), 6 * torch.rand(33, 20))
    torch.testing.assert_close(
        masknet(mix_w * phase), masknet(mix_w), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("spec_norm", ["zscore", "band_zscore", "minmax"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("level", [0.0, 1e-4, 300.0])
def test_normalisation_in_half_precision(spec_norm, dtype, level):
    """Squares of what a learned encoder gives may be 0 or infinite there."""
    x = level * torch.rand(2, 5, 40)
    x = x.to(dtype)
    found = normalise_spectrogram(x, spec_norm)
    assert found.isfinite().all()
    assert found.dtype == dtype
    expected = normalise_spectrogram(x.float(), spec_norm)
    torch.testing.assert_close(found, expected.to(dtype))


def test_normalisation_leaves_a_constant_at_zero():
    # of sizes whose mean is rounded
    x = torch.full((1, 513, 345), 7.3)
    assert normalise_spectrogram(x, "zscore").abs().max() < 0.01
    assert not normalise_spectrogram(x, "minmax").any()
    assert torch.equal(normalise_spectrogram(x, "none"), x)


@pytest.mark.parametrize("spec_norm", SPEC_NORMS)
def test_an_item_of_padding_alone_is_finite(spec_norm):
    spectrum = torch.randn(2, 65, 20, dtype=torch.complex64)
    padding = torch.zeros(2, 20, dtype=torch.bool)
    padding[1] = True
    features = SpectrogramEncoder(
        65, d_model=16, nhead=2, num_layers=1, spec_norm=spec_norm
    ).eval()
    found = features(spectrum, padding)
    assert found.isfinite().all()
    alone = features(spectrum[:1], padding[:1])
    torch.testing.assert_close(found[:1], alone, atol=1e-5, rtol=1e-5)


# -- silence, batches, padding


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
@pytest.mark.parametrize("spec_norm", SPEC_NORMS)
@pytest.mark.parametrize("frames", [1, 20])
def test_silence_gives_finite_masks_and_gradients(dtype, spec_norm, frames):
    masknet = small_masknet(spec_norm=spec_norm)
    mix_w = spectra(2, frames).to(dtype) if dtype.is_complex else None
    mix_w = spectra(2, frames).abs() if mix_w is None else mix_w
    mix_w[0] = 0.0
    # a learned encoder wants a gradient as well
    mix_w.requires_grad_()
    masks = masknet(mix_w)
    (masks * torch.randn_like(masks)).sum().backward()
    assert masks.isfinite().all()
    assert mix_w.grad.isfinite().all()
    for parameter in masknet.parameters():
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("spec_norm", SPEC_NORMS)
@pytest.mark.parametrize("attention", ["favor", "softmax"])
def test_batch_neighbours_do_not_matter(spec_norm, attention, device):
    masknet = small_masknet(spec_norm=spec_norm, attention=attention)
    masknet = masknet.to(device)
    mix_w = spectra(3).to(device)
    mix_w[1] *= 1e3
    mix_w[2] = 0.0
    together = masknet(mix_w)
    for i in range(3):
        alone = masknet(mix_w[i : i + 1])
        torch.testing.assert_close(
            together[:, i : i + 1], alone, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("is_complex", [True, False])
@pytest.mark.parametrize("spec_norm", SPEC_NORMS)
@pytest.mark.parametrize("filling", [0.0, 50.0])
def test_padding_equals_a_shorter_input(is_complex, spec_norm, filling, device):
    masknet = small_masknet(spec_norm=spec_norm).to(device)
    mix_w = spectra(2, 30).to(device)
    mix_w = mix_w if is_complex else mix_w.abs()
    mask = torch.zeros(2, 30, dtype=torch.bool, device=device)
    mask[0, 18:] = True
    mix_w[0, :, 18:] = filling
    masks = masknet(mix_w, mask)
    torch.testing.assert_close(
        masks[:, :1, :, :18], masknet(mix_w[:1, :, :18]), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        masks[:, 1:], masknet(mix_w[1:]), atol=1e-5, rtol=1e-4
    )


# -- in its places


def test_takes_the_masknets_place_in_a_stock_recipe():
    encoder = Encoder(kernel_size=16, out_channels=33)
    decoder = Decoder(
        in_channels=33, out_channels=1, kernel_size=16, stride=8, bias=False
    )
    masknet = small_masknet(mask_activation="relu")
    mix = torch.randn(2, 800)
    # as in speechbrain/recipes/WSJ0Mix/separation/train.py
    mix_w = encoder(mix)
    est_mask = masknet(mix_w)
    mix_w = torch.stack([mix_w] * 3)
    sep_h = mix_w * est_mask
    est_source = torch.cat(
        [decoder(sep_h[i]).unsqueeze(-1) for i in range(3)], dim=-1
    )
    assert est_source.shape == (2, 800, 3)
    est_source.square().sum().backward()
    assert encoder.conv1d.weight.grad.any()
    assert masknet.head.weight.grad.any()


def test_masks_are_flattened_without_a_copy():
    masks = small_masknet()(spectra())
    # sources outermost, frames before channels, as the network leaves them
    assert masks.transpose(2, 3).is_contiguous()
    assert masks.flatten(0, 1).data_ptr() == masks.data_ptr()
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: stored.append(x.untyped_storage().data_ptr()), lambda x: x
    ):
        gram = mask_gram(masks.transpose(0, 1))
    assert stored
    assert set(stored) == {masks.untyped_storage().data_ptr()}
    torch.testing.assert_close(
        gram, torch.einsum("ibct,jbct->bij", masks, masks)
    )


@pytest.mark.parametrize("activation", MASK_ACTIVATIONS)
def test_autocast_is_near_to_single_precision(activation, device):
    masknet = small_masknet(mask_activation=activation).to(device)
    mix_w = STFTEncoder(64, 16)(torch.randn(2, 800)).to(device)
    expected = masknet(mix_w)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        masks = masknet(mix_w)
        masks.float().square().sum().backward()
    torch.testing.assert_close(masks.float(), expected, atol=0.03, rtol=0)
    if activation == "softmax":
        # not within bfloat16's 0.4 %: the sources are to sum to the mixture
        total = masks.float().sum(0)
        torch.testing.assert_close(total, torch.ones_like(total))
    for parameter in masknet.parameters():
        assert parameter.grad.isfinite().all()


# -- compilation


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["favor", "softmax", "auto"])
@pytest.mark.parametrize("is_complex", [True, False])
def test_compiles_to_one_graph(attention, checkpointing, is_complex):
    masknet = small_masknet(
        attention=attention,
        num_layers=2,
        dropout=0.1,
        checkpointing=checkpointing,
    )
    mix_w = spectra() if is_complex else spectra().abs()
    torch._dynamo.reset()
    found = torch._dynamo.explain(masknet)(mix_w)
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1


# -- errors


@pytest.mark.parametrize("shape", [(2, 32, 5), (33, 5), (1, 2, 33, 5)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"\[batch, 33, frames\], got \["):
        small_masknet()(torch.zeros(shape))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (
            {"spec_norm": "log"},
            "spec_norm must be one of zscore, minmax, band_zscore, none",
        ),
        (
            {"mask_activation": "tanh"},
            "mask_activation must be one of softmax, sigmoid, relu, got 'tanh'",
        ),
        ({"nhead": 3}, "got nhead=3 with d_model=16"),
    ],
)
def test_unknown_options_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_masknet(**kwargs)
