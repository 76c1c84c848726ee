"""The bridge: Asteroid's masker in our path, our masknet in its models."""

import pytest
import torch

pytest.importorskip("asteroid")

from asteroid.masknn.convolutional import TDConvNet
from asteroid.models.base_models import BaseEncoderMaskerDecoder
from asteroid_filterbanks import make_enc_dec
from speechbrain.lobes.models.conv_tasnet import MaskNet
from speechbrain.lobes.models.dual_path import Decoder, Encoder

from trackformer_sb.asteroid import AsteroidMasker, AsteroidMaskNet
from trackformer_sb.inference.separation import separate
from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder

CHANNELS = 32


def td_conv_net(channels, num_spks=3):
    return TDConvNet(
        channels,
        num_spks,
        n_blocks=2,
        n_repeats=1,
        bn_chan=8,
        hid_chan=16,
        skip_chan=8,
        mask_act="relu",
    )


def performer(num_spks=3):
    return PerformerMaskNet(
        CHANNELS,
        num_spks,
        d_model=16,
        nhead=2,
        num_layers=1,
        n_features=8,
        dropout=0.0,
    )


def model_with(masker):
    """Asteroid's own model around a masker."""
    encoder, decoder = make_enc_dec(
        "free", n_filters=CHANNELS, kernel_size=16, stride=8
    )
    return BaseEncoderMaskerDecoder(
        encoder, masker, decoder, encoder_activation="relu"
    )


def check_gradients(loss, module, unused=()):
    """The loss reaches every other parameter, with finite numbers."""
    loss.backward()
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[0] in unused:
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert any(p.grad.abs().sum() > 0 for p in module.parameters())


# --- Asteroid's masker here --------------------------------------------------


@pytest.mark.parametrize("num_spks", (1, 3))
def test_their_masker_in_our_path(num_spks):
    masknet = AsteroidMaskNet(td_conv_net(CHANNELS, num_spks))
    encoder = Encoder(kernel_size=16, out_channels=CHANNELS)
    decoder = Decoder(CHANNELS, 1, kernel_size=16, stride=8, bias=False)
    modules = encoder, masknet, decoder
    mix = torch.randn(2, 1003)
    est_source, est_mask = separate(mix, *modules)
    assert est_source.shape == (2, num_spks, 1003)
    assert est_mask.shape[:3] == (num_spks, 2, CHANNELS)
    # Asteroid makes but does not use the residual of the last block
    unused = ("masker.TCN.1.res_conv",)
    check_gradients(est_source[:, 0].square().mean(), masknet, unused)
    est_source, _ = separate(mix, *modules, mixture_consistency=True)
    torch.testing.assert_close(est_source.sum(1), mix, atol=1e-5, rtol=1e-5)


def test_sources_and_batch_change_places_and_nothing_else():
    masker = td_conv_net(CHANNELS).eval()
    mix_w = torch.rand(2, CHANNELS, 40)
    theirs, ours = masker(mix_w), AsteroidMaskNet(masker)(mix_w)
    assert ours.shape == (3, 2, CHANNELS, 40)
    for source in range(3):
        for item in range(2):
            assert torch.equal(ours[source, item], theirs[item, source])


def test_their_masker_on_the_magnitude_of_an_stft():
    masknet = AsteroidMaskNet(td_conv_net(33)).eval()
    mix = torch.randn(2, 500)
    est_source, _ = separate(
        mix,
        STFTEncoder(64, 16),
        lambda mix_w: masknet(mix_w.abs()),
        STFTDecoder(64, 16),
    )
    assert est_source.shape == (2, 3, 500)
    assert torch.isfinite(est_source).all()


# --- our masknet there -------------------------------------------------------


@pytest.mark.parametrize("num_spks", (1, 4))
def test_our_masknet_in_their_model(num_spks):
    model = model_with(AsteroidMasker(performer(num_spks)))
    mix = torch.randn(2, 1003)
    est_source = model(mix)
    assert est_source.shape == (2, num_spks, 1003)
    check_gradients(est_source[:, 0].square().mean(), model)


def test_shapes_that_their_model_takes():
    model = model_with(AsteroidMasker(performer())).eval()
    mix = torch.randn(2, 1, 800)
    est_source = model(mix)
    assert est_source.shape == (2, 3, 800)
    torch.testing.assert_close(model(mix[:, 0]), est_source)
    alone = model(mix[1, 0])
    assert alone.shape == (3, 800)
    torch.testing.assert_close(alone, est_source[1], atol=1e-5, rtol=1e-4)


def test_softmax_masks_sum_to_what_was_encoded():
    model = model_with(AsteroidMasker(performer())).eval()
    mix = torch.randn(2, 800)
    encoded = model.forward_encoder(mix.unsqueeze(1))
    whole = model.forward_decoder(encoded)
    est_source = model(mix)
    length = min(whole.shape[-1], 800)
    torch.testing.assert_close(
        est_source.sum(1)[..., :length],
        whole.reshape(2, -1)[..., :length],
        atol=1e-5,
        rtol=1e-4,
    )


def test_speechbrain_masknet_in_their_model():
    masknet = MaskNet(
        *(CHANNELS, 8, 16),
        P=3,
        X=2,
        R=1,
        C=3,
        norm_type="gLN",
        causal=False,
        mask_nonlinear="relu",
    )
    model = model_with(AsteroidMasker(masknet))
    est_source = model(torch.randn(2, 1000))
    assert est_source.shape == (2, 3, 1000)
    check_gradients(est_source[:, 1].square().mean(), masknet)


def test_both_bridges_cancel():
    masknet = performer().eval()
    mix_w = torch.rand(2, CHANNELS, 30)
    there_and_back = AsteroidMaskNet(AsteroidMasker(masknet))
    assert torch.equal(there_and_back(mix_w), masknet(mix_w))
