"""STFT and inverse: a perfect pair, at any length, with known physics."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder

# overlaps from the least to the most, odd hops, no power of two
SIZES = [(1024, 256), (64, 32), (64, 4), (48, 16), (6, 3), (10, 1), (2, 1)]


@given(
    length=st.integers(1, 400), size=st.sampled_from(SIZES), seed=st.integers(0)
)
def test_decoding_an_encoded_signal_gives_it_back(device, length, size, seed):
    generator = torch.Generator().manual_seed(seed % 2**32)
    sig = torch.randn(2, length, generator=generator).to(device)
    encoder = STFTEncoder(*size).to(device)
    decoder = STFTDecoder(*size).to(device)
    spectrum = encoder(sig)
    frames = math.ceil(length / size[1])
    assert spectrum.shape == (2, size[0] // 2 + 1, frames)
    decoded = decoder(spectrum)
    assert decoded.shape == (2, frames * size[1])
    torch.testing.assert_close(decoded[:, :length], sig, atol=1e-5, rtol=0)
    assert (decoded[:, length:].abs() < 1e-5).all()
    assert torch.equal(decoder(spectrum, length), decoded[:, :length])


@pytest.mark.parametrize("n_fft, hop_length", [(1024, 256), (64, 32), (64, 4)])
def test_frames_are_those_of_torch_half_a_hop_later(n_fft, hop_length, device):
    sig = torch.randn(2, 20 * n_fft, device=device)
    spectrum = STFTEncoder(n_fft, hop_length).to(device)(sig)
    expected = torch.stft(
        sig[:, hop_length // 2 :],
        n_fft,
        hop_length,
        window=torch.hann_window(n_fft, device=device),
        center=True,
        return_complex=True,
    )
    edge = n_fft // hop_length
    inner = slice(edge, expected.shape[-1] - 2 * edge)
    torch.testing.assert_close(
        spectrum[..., inner], expected[..., inner], atol=1e-4, rtol=0
    )


def test_tone_lies_in_its_bin_and_leaks_into_the_two_beside_it():
    n_fft, amplitude, tone_bin = 512, 0.5, 40
    time = torch.arange(20 * n_fft)
    tone = amplitude * torch.sin(2 * torch.pi * tone_bin * time / n_fft)
    spectrum = STFTEncoder(n_fft, n_fft // 4)(tone.unsqueeze(0))
    magnitude = spectrum[0, :, 10:-10].abs()
    # the sum of a Hann window is n_fft / 2, half of it for each sign
    peak = amplitude * n_fft / 4
    expected = torch.zeros(n_fft // 2 + 1, 1)
    expected[tone_bin - 1 : tone_bin + 2, 0] = peak * torch.tensor(
        [0.5, 1.0, 0.5]
    )
    torch.testing.assert_close(
        magnitude, expected.expand_as(magnitude), atol=1e-3 * peak, rtol=0
    )


@pytest.mark.parametrize("overlap", [3, 4, 8])
def test_energy_is_kept_up_to_the_energy_of_the_window(overlap):
    n_fft = 96
    sig = torch.randn(1, 4000)
    sig[:, :n_fft] = sig[:, -n_fft:] = 0.0
    energy = STFTEncoder(n_fft, n_fft // overlap)(sig).abs().square()
    # inner bins stand for a negative frequency as well
    energy[:, 1:-1] *= 2
    # the mean of a squared Hann window is 3/8
    expected = sig.square().sum() * n_fft * overlap * 3 / 8
    torch.testing.assert_close(energy.sum(), expected, rtol=1e-4, atol=0)


def test_decoder_takes_any_leading_dimensions():
    encoder, decoder = STFTEncoder(64, 16), STFTDecoder(64, 16)
    sig = torch.randn(6, 200)
    spectrum = encoder(sig)
    decoded = decoder(spectrum, 200)
    several = decoder(spectrum.unflatten(0, (3, 2)).unsqueeze(1), 200)
    assert several.shape == (3, 1, 2, 200)
    torch.testing.assert_close(several.flatten(0, 2), decoded)
    torch.testing.assert_close(decoder(spectrum[0], 200), decoded[0])


@pytest.mark.parametrize("n_fft, hop_length", [(8, 2), (6, 3), (4, 1)])
def test_gradients_of_the_decoder_are_right(n_fft, hop_length):
    decoder = STFTDecoder(n_fft, hop_length).double()
    spectrum = torch.randn(2, n_fft // 2 + 1, 5, dtype=torch.complex128)
    spectrum.requires_grad_()
    assert torch.autograd.gradcheck(decoder, (spectrum,))
    assert torch.autograd.gradgradcheck(decoder, (spectrum,))
    assert not decoder.state_dict()  # the window is no weight


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_the_decoder_has_gradients_item_by_item():
    decoder = STFTDecoder(8, 2)
    spectrum = torch.randn(3, 5, 6, dtype=torch.complex64)
    each = torch.func.vmap(torch.func.grad(lambda x: decoder(x).square().sum()))
    leaf = spectrum.clone().requires_grad_()
    decoder(leaf).square().sum().backward()
    torch.testing.assert_close(each(spectrum), leaf.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_transformed_in_single_precision(dtype):
    sig = torch.randn(1, 100).to(dtype)
    spectrum = STFTEncoder(64, 16)(sig)
    assert spectrum.dtype == torch.complex64
    assert torch.equal(spectrum, STFTEncoder(64, 16)(sig.float()))


@pytest.mark.parametrize("module", [STFTEncoder, STFTDecoder])
@pytest.mark.parametrize(
    "n_fft, hop_length, message",
    [
        (63, 21, "n_fft must be even and at least 2, got 63"),
        (0, 1, "n_fft must be even and at least 2, got 0"),
        (64, 0, "got hop_length=0 with n_fft=64"),
        (64, 24, "got hop_length=24 with n_fft=64"),
        (64, 64, "must divide n_fft at least twice"),
    ],
)
def test_sizes_that_do_not_tile_are_refused(module, n_fft, hop_length, message):
    with pytest.raises(ValueError, match=message):
        module(n_fft, hop_length)


@pytest.mark.parametrize("shape", [(100,), (2, 1, 100), (2, 0)])
def test_encoder_names_the_shape_it_refuses(shape):
    with pytest.raises(ValueError, match=r"\[batch, time\] of at least one"):
        STFTEncoder(64, 16)(torch.zeros(shape))


def test_decoder_names_the_bins_it_refuses():
    spectrum = torch.zeros(1, 32, 5, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"33 bins.*got \[1, 32, 5\]"):
        STFTDecoder(64, 16)(spectrum)
