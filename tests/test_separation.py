"""Encode, mask, decode: sums, shapes, stereo, SpeechBrain's own loop."""

import io

import pytest
import torch
from speechbrain.lobes.models.dual_path import Decoder, Encoder
from torch.nn import functional as F

from trackformer_sb.inference.separation import separate
from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder

SIZES = {"d_model": 16, "nhead": 2, "num_layers": 1, "n_features": 16}


def stft_modules(activation="softmax", num_spks=4):
    masknet = PerformerMaskNet(
        33, num_spks, **SIZES, mask_activation=activation
    )
    return STFTEncoder(64, 16), masknet.eval(), STFTDecoder(64, 16)


def learned_modules(num_spks=3):
    """SpeechBrain's learned encoder and decoder, kernel 16, stride 8."""
    encoder = Encoder(kernel_size=16, out_channels=20)
    masknet = PerformerMaskNet(20, num_spks, **SIZES, mask_activation="relu")
    decoder = Decoder(20, 1, kernel_size=16, stride=8, bias=False)
    return encoder, masknet.eval(), decoder


def stock_loop(mix, encoder, masknet, decoder, num_spks):
    """As in SpeechBrain's SepformerSeparation.separate_batch."""
    mix_w = encoder(mix)
    est_mask = masknet(mix_w)
    mix_w = torch.stack([mix_w] * num_spks)
    sep_h = mix_w * est_mask
    est_source = torch.cat(
        [decoder(sep_h[i]).unsqueeze(-1) for i in range(num_spks)], dim=-1
    )
    t_origin, t_est = mix.size(1), est_source.size(1)
    if t_origin > t_est:
        est_source = F.pad(est_source, (0, 0, 0, t_origin - t_est))
    return est_source[:, :t_origin, :]


@pytest.mark.parametrize("shape", [(2, 500), (1, 1), (3, 2, 500), (1, 1, 7)])
def test_softmax_masks_give_sources_that_sum_to_the_mixture(shape, device):
    modules = [module.to(device) for module in stft_modules()]
    mix = torch.randn(shape, device=device)
    before = mix.clone()
    est_source, est_mask = separate(mix, *modules)
    assert est_source.shape == (shape[0], 4, *shape[1:])
    assert est_mask.shape[:3] == (4, shape[0], 33)
    torch.testing.assert_close(est_source.sum(1), mix, atol=1e-5, rtol=0)
    assert torch.equal(mix, before)
    # and not each of them a quarter
    if shape[-1] > 1:
        assert not torch.allclose(est_source[:, 0], mix / 4, atol=1e-2)


@pytest.mark.parametrize(
    "make", [lambda: stft_modules("relu", 3), learned_modules]
)
@pytest.mark.parametrize("shape", [(2, 503), (2, 2, 503)])
def test_consistency_makes_any_sources_sum_to_the_mixture(make, shape):
    modules = make()
    mix = torch.randn(shape)
    plain, _ = separate(mix, *modules)
    est_source, _ = separate(mix, *modules, mixture_consistency=True)
    assert not torch.allclose(plain.sum(1), mix, atol=0.1)
    torch.testing.assert_close(est_source.sum(1), mix, atol=1e-5, rtol=0)
    # every source is moved by the same
    moved = est_source - plain
    torch.testing.assert_close(moved[:, 0], moved[:, 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "make, num_spks", [(stft_modules, 4), (learned_modules, 3)]
)
@pytest.mark.parametrize("time", [500, 504, 507])
def test_equals_the_stock_loop(make, num_spks, time):
    modules = make()
    mix = torch.randn(2, time)
    est_source, _ = separate(mix, *modules)
    expected = stock_loop(mix, *modules, num_spks)
    torch.testing.assert_close(est_source.mT, expected)
    # SpeechBrain's decoder squeezes a batch of one away, ours does not
    alone, _ = separate(mix[:1], *modules)
    torch.testing.assert_close(alone, est_source[:1])


# -- channels


def test_each_source_keeps_its_place_between_the_channels():
    """A low tone to the left and a high one to the right, split by bins."""

    def split(mix_w):
        low = torch.zeros(mix_w.shape)
        low[:, :10] = 1.0
        return torch.stack([low, 1 - low])

    time = torch.arange(2000) * 2 * torch.pi / 64
    low, high = torch.sin(4 * time), torch.sin(20 * time)
    mix = torch.stack([low + 0.1 * high, 0.1 * low + high]).unsqueeze(0)
    encoder, _, decoder = stft_modules()
    est_source, est_mask = separate(mix, encoder, split, decoder)
    assert est_source.shape == (1, 2, 2, 2000)
    assert est_mask.shape == (2, 1, 33, 125)
    expected = torch.stack(
        [torch.stack([low, 0.1 * low]), torch.stack([0.1 * high, high])]
    )
    # away from the borders, where tones begin and end
    inner = slice(100, -100)
    torch.testing.assert_close(
        est_source[0, ..., inner], expected[..., inner], atol=1e-3, rtol=0
    )


# -- training and errors


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "relu"])
def test_transforms_are_single_precision_under_autocast(activation, device):
    encoder, masknet, decoder = (
        module.to(device) for module in stft_modules(activation)
    )
    mix = torch.randn(2, 500, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        est_source, est_mask = separate(mix, encoder, masknet, decoder)
        mix_w = encoder(mix)
        half = encoder(mix.bfloat16())
    # sigmoid and relu stay in the precision of the network
    expected = torch.float32 if activation == "softmax" else torch.bfloat16
    assert est_mask.dtype == expected
    assert mix_w.dtype == half.dtype == torch.complex64
    assert est_source.dtype == torch.float32
    assert torch.equal(mix_w, encoder(mix))
    assert torch.equal(
        est_source[:, 0], decoder(mix_w * est_mask[0].float(), 500)
    )
    if activation == "softmax":
        torch.testing.assert_close(est_source.sum(1), mix, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_separator_can_be_traced():
    class Separator(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = torch.nn.ModuleList(stft_modules())

        def forward(self, mix):
            return separate(mix, *self.parts)[0]

    model, mix = Separator().eval(), torch.randn(1, 800)
    with torch.no_grad():
        traced, file = torch.jit.trace(model, mix), io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        traced = torch.jit.load(file)
        torch.testing.assert_close(traced(mix), model(mix))


@pytest.mark.parametrize("shape", [(300,), (1, 2, 3, 300)])
def test_another_number_of_dimensions_is_refused(shape):
    with pytest.raises(ValueError, match=r"\[batch, channels, time\], got"):
        separate(torch.zeros(shape), *stft_modules())
