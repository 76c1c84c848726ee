"""The bridge: Asteroid's masker in our path, our masknet in its models."""

import pytest
import torch

pytest.importorskip("asteroid")

import asteroid
from asteroid.masknn.convolutional import TDConvNet
from asteroid.models import BaseModel
from asteroid.models.base_models import BaseEncoderMaskerDecoder
from asteroid_filterbanks import make_enc_dec
from separators import mixtures, performer
from speechbrain.lobes.models.dual_path import Decoder, Encoder

from trackformer_sb.asteroid import (
    AsteroidMasker,
    AsteroidMaskNet,
    SeparatorModel,
)
from trackformer_sb.inference.separation import separate
from trackformer_sb.nnet.masknet import PerformerMaskNet

CHANNELS = 32


def check_gradients(loss, module, unused=()):
    """The loss reaches every other parameter, with finite numbers."""
    loss.backward()
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[0] not in unused:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    assert any(p.grad.abs().sum() > 0 for p in module.parameters())


def test_their_masker_in_our_path():
    sizes = {"n_blocks": 2, "n_repeats": 1, "bn_chan": 8, "hid_chan": 16}
    masker = TDConvNet(CHANNELS, 3, skip_chan=8, mask_act="relu", **sizes)
    masknet = AsteroidMaskNet(masker)
    mix_w = torch.rand(2, CHANNELS, 40)
    # sources and batch change places, and nothing else
    assert torch.equal(masknet(mix_w)[2, 1], masker(mix_w)[1, 2])
    encoder = Encoder(kernel_size=16, out_channels=CHANNELS)
    decoder = Decoder(CHANNELS, 1, kernel_size=16, stride=8, bias=False)
    mix = torch.randn(2, 1003)
    est_source, est_mask = separate(
        mix, encoder, masknet, decoder, mixture_consistency=True
    )
    assert est_mask.shape[:3] == (3, 2, CHANNELS)
    torch.testing.assert_close(est_source.sum(1), mix, atol=1e-5, rtol=1e-5)
    # Asteroid makes but does not use the residual of the last block
    unused = ("masker.TCN.1.res_conv",)
    check_gradients(est_source[:, 0].square().mean(), masknet, unused)


@pytest.mark.parametrize("num_spks", (1, 4))
def test_our_masknet_in_their_model(num_spks):
    sizes = {"d_model": 16, "nhead": 2, "num_layers": 1, "n_features": 8}
    masknet = PerformerMaskNet(CHANNELS, num_spks, dropout=0.0, **sizes)
    encoder, decoder = make_enc_dec(
        "free", n_filters=CHANNELS, kernel_size=16, stride=8
    )
    model = BaseEncoderMaskerDecoder(
        encoder, AsteroidMasker(masknet), decoder, encoder_activation="relu"
    )
    est_source = model(torch.randn(2, 1003))
    assert est_source.shape == (2, num_spks, 1003)
    check_gradients(est_source[:, 0].square().mean(), model)


# --- a trained separator there -----------------------------------------------


@pytest.fixture
def model(tmp_path):
    """A separator of ours with dropout, as their model."""
    performer(dropout=0.5).save_pretrained(tmp_path / "separator")
    return SeparatorModel.from_pretrained(tmp_path / "separator")


def test_shapes_of_waveforms(model):
    mix = mixtures(700)
    expected = model(mix)
    assert expected.shape == (2, 3, 700) and model.sample_rate == 8000
    assert torch.equal(expected, model.separator(mix))
    assert torch.equal(model(mix.unsqueeze(1)), expected)
    assert torch.equal(model(mix.numpy()), expected)
    alone = model(mix[1])
    assert alone.shape == (3, 700)
    torch.testing.assert_close(alone, expected[1], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"got \[2, 2, 350\]"):
        model(mix.view(2, 2, 350))


def test_serialized_file_loads_in_their_class(model, tmp_path):
    path = str(tmp_path / "model.pth")
    torch.save(model.serialize(), path)
    # torch.load with weights_only, the default of today's torch
    again = BaseModel.from_pretrained(path).eval()
    assert type(again) is SeparatorModel
    assert torch.equal(again(mixtures()), model(mixtures()))
    again = SeparatorModel.from_pretrained(model.serialize())
    assert torch.equal(again(mixtures()), model(mixtures()))


def test_their_separate(model):
    mix = mixtures(900)[:1, None]
    est_source = asteroid.separate.separate(model, mix)
    expected = model(mix)
    # it scales the outputs
    scale = mix.abs().sum() / expected.abs().sum()
    torch.testing.assert_close(est_source, expected * scale)
