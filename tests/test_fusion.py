"""FusionMaskNet: masks of any length, of mono and stereo."""

import pytest
import torch

from trackformer_sb.inference.separation import separate
from trackformer_sb.nnet.fusion import (
    FusionMaskNet,
    fusion_features,
    local_mean,
)
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder

SMALL = {"channels": (8, 8, 16), "d_model": 16, "num_layers": 1}


def make_net(**options):
    return FusionMaskNet(257, 4, **{**SMALL, **options}).eval()


def spectra(*shape):
    return torch.randn(*shape, dtype=torch.complex64)


@pytest.mark.parametrize("frames", [1, 5, 130])
@pytest.mark.parametrize("channels", [(), (1,), (2,)])
def test_masks_sum_to_one_at_any_length(frames, channels):
    masks = make_net()(spectra(3, *channels, 257, frames))
    assert masks.shape == (4, 3, 257, frames)
    assert (masks >= 0).all()
    torch.testing.assert_close(masks.sum(0), torch.ones(3, 257, frames))


@pytest.mark.parametrize(
    "options",
    [{"num_layers": 0}, {"skips": False}, {"upsampling": "nearest"}],
    ids=str,
)
def test_ablations_train_all_that_they_have(options):
    net = make_net(**options)
    net(spectra(2, 2, 257, 9))[0].sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_mono_and_two_equal_channels_are_the_same():
    net, mono = make_net(), spectra(2, 257, 20)
    both = mono.unsqueeze(1).expand(-1, 2, -1, -1)
    torch.testing.assert_close(net(mono), net(both))


def test_the_level_does_not_matter():
    net, mix_w = make_net(), spectra(1, 2, 257, 20)
    torch.testing.assert_close(net(mix_w), net(mix_w * 1e-3), atol=1e-4, rtol=0)


def test_an_item_does_not_depend_on_its_neighbours():
    net, mix_w = make_net(), spectra(3, 2, 257, 20)
    torch.testing.assert_close(net(mix_w)[:, 1:2], net(mix_w[1:2]))


def test_sides_are_told_apart():
    sound = spectra(1, 257, 8)
    silence = torch.zeros_like(sound)
    left = fusion_features(torch.stack([sound, silence], 1))[:, 4]
    right = fusion_features(torch.stack([silence, sound], 1))[:, 4]
    assert left.mean() > 0.9
    torch.testing.assert_close(left, -right)


def test_masks_are_steadied_where_the_mixture_sounds():
    net, steady = make_net(), make_net(steady_share=0.5)
    steady.load_state_dict(net.state_dict())
    mix_w = spectra(1, 1, 257, 9)
    mix_w[..., 1:] *= 1e-6  # all that sounds is the first frame
    found, plain = steady(mix_w)[:, 0], net(mix_w)[:, 0]
    # halves of logarithms: geometric means
    expected = (plain * plain[..., :1]).sqrt()
    torch.testing.assert_close(found, expected / expected.sum(0))


def test_silence_is_finite():
    mix_w = torch.zeros(1, 2, 257, 8, dtype=torch.complex64)
    net = make_net(steady_share=0.3)
    masks = net(mix_w)
    masks[0].sum().backward()
    assert masks.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("shape", [(2, 2, 256, 8), (2, 3, 257, 8)], ids=str)
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="expected a complex spectrum"):
        make_net()(spectra(*shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 513 - 8}, "512 divides, got 505"),
        ({"upsampling": "cubic"}, "transposed, nearest, got 'cubic'"),
    ],
)
def test_wrong_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FusionMaskNet(**{"in_channels": 257, "num_spks": 4, **options})


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("time", [1, 5000])
def test_sources_sum_to_the_mixture(channels, time):
    mix = torch.randn(2, channels, time)
    est_source, _ = separate(
        mix, STFTEncoder(512, 256), make_net(), STFTDecoder(512, 256)
    )
    assert est_source.shape == (2, 4, channels, time)
    torch.testing.assert_close(est_source.sum(1), mix, atol=1e-4, rtol=0)


def test_local_mean_equals_a_loop():
    x = torch.randn(7, 30, 9)
    expected = [x[:, max(0, k - 2) : k + 3].mean(1) for k in range(30)]
    torch.testing.assert_close(local_mean(x, 5, 1), torch.stack(expected, 1))
