"""Streams: rates, seams, orders and batches."""

import io
import itertools

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.functional import lowpass_biquad

from trackformer_sb.inference.overlap_add import best_order, separate_stream


def halves(mix):
    """Two outputs of half of the mixture each."""
    return torch.stack([mix / 2, mix / 2], dim=1)


def identity(mix):
    """One output, which is the mixture."""
    return mix.unsqueeze(1)


def low_and_high(mix, sample_rate=8000):
    """Splits at 1 kHz."""
    low = lowpass_biquad(mix, sample_rate, 1000.0)
    return torch.stack([low, mix - low], dim=1)


def opened(sig, rate, subtype="FLOAT"):
    """An open file that holds sig [channels, time]."""
    file = io.BytesIO()
    soundfile.write(file, sig.T.numpy(), rate, subtype, format="WAV")
    return soundfile.SoundFile(io.BytesIO(file.getvalue()))


def separated(sig, rate, separator, sample_rate, **options):
    """All blocks of a stream, [sources, channels, time]."""
    reader = opened(sig, rate)
    blocks = separate_stream(reader, separator, sample_rate, **options)
    return torch.cat(list(blocks), dim=-1)


def noise(channels, frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, frames, generator=generator) * 0.2


def sine(frequency, rate, frames):
    """A tone, [1, time]."""
    phase = 2 * torch.pi * frequency / rate * torch.arange(frames).double()
    return phase.sin().float().unsqueeze(0)


@given(
    frames=st.integers(1, 500),
    chunk=st.integers(1, 120),
    overlap=st.sampled_from([0.0, 0.1, 0.25, 0.49, 0.5]),
    channels=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_identity_at_one_rate_returns_the_input_bit_by_bit(
    frames, chunk, overlap, channels
):
    sig = noise(channels, frames)
    est_source = separated(
        sig, 100, identity, 100, chunk_seconds=chunk / 100, overlap=overlap
    )
    assert torch.equal(est_source, sig.unsqueeze(0))


@pytest.mark.parametrize("rate", [8000, 96000])
def test_resampling_there_and_back_keeps_the_band(rate):
    """A tone both rates can represent comes back where and as it was."""
    tone = sine(1000, rate, 2 * rate)

    def first_of_four(mix):
        return torch.stack([mix, 0 * mix, 0 * mix, 0 * mix], dim=1)

    est_source = separated(tone, rate, first_of_four, 44100, chunk_seconds=0.5)
    edge = rate // 50
    inner = est_source[:, 0, edge:-edge]
    assert torch.allclose(inner[0], tone[0, edge:-edge], atol=1e-5)
    assert inner[1:].abs().max() < 1e-5


def test_what_the_model_rate_cannot_represent_is_shared_evenly():
    tone = sine(15000, 44100, 44100)

    def first_of_two(mix):
        return torch.stack([mix, 0 * mix], dim=1)

    est_source = separated(tone, 44100, first_of_two, 16000)
    inner = slice(441, -441)
    for source in est_source:
        assert torch.allclose(source[:, inner], tone[:, inner] / 2, atol=1e-4)


def test_best_order_minimises_the_difference_relative_to_the_level():
    window = torch.hann_window(60, periodic=False)
    for seed in range(20):
        gains = torch.tensor([1.0, 0.1, 1.0, 0.03])[:, None, None]
        previous = noise(4, 60, seed).unsqueeze(1) * gains
        current = noise(4, 60, seed + 100).unsqueeze(1) * gains.flip(0)

        def cost(order, previous=previous, current=current):
            total = 0.0
            for p, c in zip(previous, current[list(order)]):
                difference = (window * (p - c).square()).sum()
                energy = (window * (p.square() + c.square())).sum()
                total += float(difference / energy)
            return total

        best = min(itertools.permutations(range(4)), key=cost)
        assert best_order(previous, current).tolist() == list(best)


def test_best_order_keeps_what_cannot_be_told_apart():
    sources = noise(1, 100).expand(5, 1, 100)
    assert best_order(sources, sources).tolist() == [0, 1, 2, 3, 4]
    empty = torch.zeros(3, 2, 0)
    assert best_order(empty, empty).tolist() == [0, 1, 2]
    # one loud output, the others silent
    silent = torch.cat([noise(1, 100).unsqueeze(0), torch.zeros(3, 1, 100)])
    assert best_order(silent, silent * 0.1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("level", [1.0, 1e-6])
@pytest.mark.parametrize("frames", [10000, 12345])
def test_a_separator_that_swaps_its_outputs_is_aligned(frames, level):
    generator = torch.Generator().manual_seed(3)
    swapped = []

    def shuffling(mix):
        est_source = low_and_high(mix)
        swapped.append(bool(torch.rand(1, generator=generator) < 0.5))
        return est_source.flip(1) if swapped[-1] else est_source

    sig = noise(2, frames) * level
    options = {"chunk_seconds": 0.25, "overlap": 0.25}
    steady = separated(sig, 8000, low_and_high, 8000, **options)
    shuffled = separated(sig, 8000, shuffling, 8000, **options)
    assert len(set(swapped)) == 2
    if swapped[0]:
        shuffled = shuffled.flip(0)
    assert torch.allclose(shuffled, steady, atol=1e-6 * level)


def test_chunks_leave_no_seam():
    """Outputs that jump between chunks are joined by a smooth fade."""
    gains = itertools.cycle([0.2, 0.8])

    def jumping(mix):
        gain = next(gains)
        return torch.stack([gain * mix, (1 - gain) * mix * 1e-3], dim=1)

    sig = torch.ones(1, 8000)
    est_source = separated(
        sig, 1000, jumping, 1000, chunk_seconds=2.0, overlap=0.25
    )
    # the fade takes 100 samples, a cut would be a step of 0.3
    assert est_source[0].max() - est_source[0].min() > 0.2
    assert est_source[0].diff().abs().max() < 1.02 * 0.3 * np.pi / 2 / 100


def bad_at_edges(mix, edge=0.09):
    """A fixed split, undecided near the edges of what it sees."""
    gain = torch.full(mix.shape[-1:], 0.8)
    bad = int(edge * len(gain))
    gain[:bad] = gain[-bad:] = 0.5
    return torch.stack([gain * mix, (1 - gain) * mix], dim=1)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("frames", [8000, 20001])
def test_context_keeps_bad_edges_out(frames, batch_size):
    """Only at the ends of the file there is no context."""
    sig = noise(2, frames)
    est_source = separated(
        sig,
        8000,
        bad_at_edges,
        8000,
        chunk_seconds=1.0,
        overlap=0.25,
        batch_size=batch_size,
    )
    inner = slice(720, -720)
    assert torch.allclose(est_source[0, :, inner], 0.8 * sig[:, inner])
    assert torch.allclose(est_source[0, :, :720], 0.5 * sig[:, :720])


@pytest.mark.parametrize("batch_size", [2, 100])
@pytest.mark.parametrize("rate", [8000, 11025])
def test_batches_change_nothing(rate, batch_size):
    sizes = []

    def recorded(mix):
        sizes.append(len(mix))
        return low_and_high(mix)

    sig = noise(2, 5 * rate + 321)
    options = {"chunk_seconds": 0.5, "overlap": 0.3}
    expected = separated(sig, rate, recorded, 8000, **options)
    assert set(sizes) == {1}
    chunks = len(sizes)
    sizes.clear()
    est_source = separated(
        sig, rate, recorded, 8000, batch_size=batch_size, **options
    )
    assert torch.allclose(est_source, expected, atol=1e-6)
    assert sum(sizes) == chunks
    assert max(sizes) == min(batch_size, chunks)


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_seconds": 0.0},
        {"overlap": 0.51},
        {"batch_size": 0},
    ],
)
def test_options_out_of_range(options):
    expected = r"expected (chunk_seconds > 0 and|batch_size from 1 up)"
    with pytest.raises(ValueError, match=expected):
        separated(noise(1, 100), 8000, identity, 8000, **options)


def test_outputs_that_are_no_numbers():
    def broken(mix):
        return halves(mix) / 0 * 0

    with pytest.raises(ValueError, match="the model returned NaN"):
        separated(noise(1, 100), 8000, broken, 8000)


def test_outputs_of_another_shape():
    with pytest.raises(ValueError, match=r"expected .*\[1, sources, 2, 800\]"):
        separated(noise(2, 800), 8000, lambda mix: mix, 8000)
    with pytest.raises(ValueError, match=r"got \[1, 2, 2, 799\]"):
        separated(noise(2, 800), 8000, lambda mix: halves(mix)[..., 1:], 8000)
