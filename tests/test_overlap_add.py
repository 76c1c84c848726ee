"""Streams: sums, seams, orders, memory, and files that are no music."""

import io
import itertools

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.functional import lowpass_biquad

from trackformer_sb.inference import overlap_add, writing
from trackformer_sb.inference.overlap_add import (
    best_order,
    crossfade_weights,
    distribute_residual,
    joining_weights,
    separate_stream,
)
from trackformer_sb.inference.writing import write_sources

MINUS_80_DB = 1e-4


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


@pytest.mark.parametrize("bitrate_mode", ["CONSTANT", "VARIABLE"])
def test_mp3_of_few_bits_is_read_as_a_whole(tmp_path, bitrate_mode):
    """Its first frames after a seek, which need earlier ones, are wrong."""
    rate, path = 44100, tmp_path / "song.mp3"
    sig = noise(2, 6 * rate)
    sig[:, ::4] *= 2
    sig *= torch.linspace(0, 20, 6 * rate).sin() ** 4
    options = {"bitrate_mode": bitrate_mode, "compression_level": 0.9}
    soundfile.write(path, sig.T.numpy(), rate, **options)
    expected = soundfile.read(path, dtype="float32")[0].T
    with soundfile.SoundFile(path) as reader:
        blocks = list(separate_stream(reader, halves, rate, chunk_seconds=1.0))
    assert len(blocks) > 4
    est_source = torch.cat(blocks, dim=-1)
    assert est_source.shape == (2, *expected.shape)
    found = est_source.sum(0).numpy()
    assert np.abs(found - expected).max() < 1e-6
    # which read by read it would not be
    with soundfile.SoundFile(path) as reader:
        parts = [reader.read(rate, dtype="float32") for _ in range(6)]
    found = np.concatenate(parts).T
    assert np.abs(found - expected[:, : 6 * rate]).max() > 2e-5


def test_long_chunks_cost_no_more_than_the_file(monkeypatch):
    lengths = []

    def noting(shared, weights=overlap_add.joining_weights):
        lengths.append(shared)
        return weights(shared)

    monkeypatch.setattr(overlap_add, "joining_weights", noting)
    sig = noise(1, 4000)
    whole = separated(sig, 8000, halves, 8000, chunk_seconds=1e5, overlap=0.5)
    assert torch.allclose(whole.sum(0), sig, atol=1e-6)
    assert lengths == [6000]


@pytest.mark.parametrize("length", [0, 1, 2, 7, 1000])
def test_crossfade_rises_and_sums_to_one(length):
    weights = crossfade_weights(length)
    assert len(weights) == length
    assert torch.equal(weights + (1 - weights), torch.ones(length))
    # faded out is faded in, seen backwards
    assert torch.allclose(weights.flip(0), 1 - weights, atol=1e-6)
    assert bool((weights.diff() > 0).all())


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


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000])
def test_outputs_sum_to_the_file_at_any_rate(rate, channels):
    sig = noise(channels, rate + 123)
    est_source = separated(
        sig, rate, low_and_high, 44100, chunk_seconds=0.4, overlap=0.25
    )
    assert est_source.shape == (2, channels, rate + 123)
    error = (est_source.sum(0) - sig).norm() / sig.norm()
    # far below the -80 dB that are promised: rounding is all that is left
    assert error < MINUS_80_DB / 100


@pytest.mark.parametrize("rate", [8000, 22050, 48000, 96000])
def test_resampling_there_and_back_keeps_the_band(rate):
    """A tone both rates can represent comes back where and as it was."""
    tone = sine(1000, rate, 2 * rate)

    def first_of_four(mix):
        return torch.stack([mix, 0 * mix, 0 * mix, 0 * mix], dim=1)

    est_source = separated(tone, rate, first_of_four, 44100, chunk_seconds=0.5)
    edge = rate // 100
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


def test_almost_equal_rates_take_no_giant_filter(monkeypatch):
    asked = []
    resample = overlap_add.resample

    def counted(sig, orig_freq, new_freq, **options):
        asked.append((orig_freq, new_freq))
        return resample(sig, orig_freq, new_freq, **options)

    monkeypatch.setattr(overlap_add, "resample", counted)
    sig = noise(1, 4400)
    est_source = separated(sig, 11026, halves, 44100)
    assert max(max(pair) for pair in asked) <= 4 * overlap_add.MAX_RATIO_TERM
    assert torch.allclose(est_source.sum(0), sig, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 2, 99, 399, 400, 401, 1000])
def test_short_files(frames):
    sig = noise(2, frames)
    est_source = separated(sig, 8000, low_and_high, 16000, chunk_seconds=0.05)
    assert est_source.shape == (2, 2, frames)
    assert torch.allclose(est_source.sum(0), sig, atol=1e-6)


def test_short_chunks_are_padded_for_learned_encoders():
    lengths = []

    def recorded(mix):
        lengths.append(mix.shape[-1])
        return halves(mix)

    separated(noise(1, 1), 8000, recorded, 8000)
    assert lengths == [800]


def test_silence_gives_silence():
    est_source = separated(
        torch.zeros(2, 3000), 8000, low_and_high, 16000, chunk_seconds=0.1
    )
    assert torch.equal(est_source, torch.zeros(2, 2, 3000))


def test_best_order_undoes_every_permutation():
    sources = noise(8, 150).view(4, 2, 150)
    for permutation in itertools.permutations(range(4)):
        shuffled = sources[list(permutation)]
        order = best_order(sources, shuffled)
        assert torch.equal(shuffled[order], sources)


def test_best_order_minimises_the_difference_relative_to_the_level():
    window = torch.hann_window(60, periodic=False)
    told_apart = 0
    for seed in range(20):
        gains = torch.tensor([1.0, 0.1, 1.0, 0.03])[:, None, None]
        previous = noise(4, 60, seed).unsqueeze(1) * gains
        current = noise(4, 60, seed + 100).unsqueeze(1) * gains.flip(0)

        def cost(order, previous=previous, current=current, level=True):
            total = 0.0
            for p, c in zip(previous, current[list(order)]):
                difference = (window * (p - c).square()).sum()
                energy = (window * (p.square() + c.square())).sum()
                total += float(difference / energy if level else difference)
            return total

        orders = list(itertools.permutations(range(4)))
        best = min(orders, key=cost)
        assert best_order(previous, current).tolist() == list(best)
        told_apart += best != min(orders, key=lambda x: cost(x, level=False))
    # the plain squared difference would have chosen otherwise
    assert told_apart > 5


def test_a_quiet_instrument_is_followed_beside_a_loud_one():
    """Its share of the squared error is nothing beside that of the leaks."""
    loud, quiet = noise(1, 4000), noise(1, 4000, seed=1) * 1e-3
    other = noise(1, 4000, seed=2) * 1e-3
    previous = torch.stack([loud, quiet, other + 1e-4 * loud])
    current = torch.stack([loud, quiet + 1e-4 * loud, other])
    for order in itertools.permutations(range(3)):
        shuffled = current[list(order)]
        assert torch.equal(shuffled[best_order(previous, shuffled)], current)


def test_best_order_keeps_what_cannot_be_told_apart():
    sources = noise(1, 100).expand(5, 1, 100)
    assert best_order(sources, sources).tolist() == [0, 1, 2, 3, 4]
    empty = torch.zeros(3, 2, 0)
    assert best_order(empty, empty).tolist() == [0, 1, 2]
    # one loud output, the others silent
    silent = torch.cat([noise(1, 100).unsqueeze(0), torch.zeros(3, 1, 100)])
    assert best_order(silent, silent * 0.1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("level", [1.0, 1e-6])
@pytest.mark.parametrize("frames", [10000, 10007, 12345])
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


@pytest.mark.parametrize("shared", [0, 1, 2, 3, 10, 250])
def test_joined_chunks_use_only_the_middle_of_what_they_share(shared):
    weights = joining_weights(shared)
    assert len(weights) == shared
    assert bool((weights.diff() >= 0).all())
    assert torch.allclose(weights.flip(0), 1 - weights, atol=1e-6) or (
        # an odd sample is context on one side only
        abs(int((weights == 0).sum()) - int((weights == 1).sum())) == 1
    )
    if shared == 250:
        assert bool((weights[:100] == 0).all() and (weights[150:] == 1).all())
        assert torch.equal(weights[100:150], crossfade_weights(50))


def bad_at_edges(mix, edge=0.09):
    """A fixed split, undecided near the edges of what it sees."""
    gain = torch.full(mix.shape[-1:], 0.8)
    bad = int(edge * len(gain))
    gain[:bad] = gain[-bad:] = 0.5
    return torch.stack([gain * mix, (1 - gain) * mix], dim=1)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("frames", [8000, 20000, 20001, 41234])
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
    # without a context the edges are heard
    est_source = separated(
        sig, 8000, bad_at_edges, 8000, chunk_seconds=1.0, overlap=0.0
    )
    heard = not torch.allclose(est_source[0, :, inner], 0.8 * sig[:, inner])
    assert heard == (frames > 8000)


def test_level_at_seams_is_that_of_elsewhere():
    """Each chunk is off in its own way, as with a real model."""
    generator = torch.Generator().manual_seed(0)

    def noisy(mix):
        error = 0.1 * torch.randn(mix.shape, generator=generator)
        first = 0.7 * mix + error * mix.std()
        return torch.stack([first, mix - first], dim=1)

    rate, frames = 1000, 400_000
    sig = noise(1, frames)
    est_source = separated(
        sig, rate, noisy, rate, chunk_seconds=2.0, overlap=0.25
    )[:, 0]
    # fades of 100 samples begin 1700 samples after the beginning of a chunk,
    # and every 1500 samples
    offset = (torch.arange(frames) - 1700) % 1500
    at_seam = (offset < 100) & (torch.arange(frames) > 1600)
    for source in est_source:
        seam, rest = source[at_seam].std(), source[~at_seam].std()
        assert abs(20 * torch.log10(seam / rest)) < 0.15


@pytest.mark.parametrize("batch_size", [2, 3, 100])
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


@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_fixed_shares_stay_as_they_are(chunks, extra):
    """At exactly so many chunks, and a sample beside it."""
    shares = torch.tensor([0.5, 0.3, 0.2])

    def split(mix):
        return torch.stack([share * mix for share in shares], dim=1)

    sig = noise(2, 800 + (chunks - 1) * 600 + extra)
    est_source = separated(
        sig, 8000, split, 8000, chunk_seconds=0.1, overlap=0.25
    )
    for source, share in zip(est_source, shares):
        assert torch.allclose(source, share * sig, atol=1e-7)


def test_chunks_equal_the_whole_for_a_local_separator():
    sig = noise(2, 30000)
    whole = separated(sig, 8000, low_and_high, 8000, chunk_seconds=10.0)
    parts = separated(sig, 8000, low_and_high, 8000, chunk_seconds=1.0)
    # the filter forgets within a chunk's fade
    assert torch.allclose(parts, whole, atol=2e-3)


@pytest.mark.parametrize("seconds", [3, 30])
def test_memory_does_not_depend_on_the_length(seconds, tmp_path):
    """No block read, separated or written is longer than a chunk."""
    separated_lengths, written_lengths = [], []

    def recorded(mix):
        separated_lengths.append(mix.shape[-1])
        return halves(mix)

    def blocks(reader):
        for block in separate_stream(reader, recorded, 4000, 1.0, 0.25):
            written_lengths.append(block.shape[-1])
            yield block

    with opened(noise(1, seconds * 8000 + 17), 8000) as reader:
        write_sources(blocks(reader), reader, tmp_path, "long")
        assert reader.tell() == seconds * 8000 + 17
    assert max(separated_lengths) == 4000
    assert max(written_lengths) <= 8000
    assert len(separated_lengths) >= seconds
    assert sum(written_lengths) == seconds * 8000 + 17


def test_last_chunk_is_as_long_as_the_others():
    lengths = []

    def recorded(mix):
        lengths.append(mix.shape[-1])
        return identity(mix)

    # 8000 + 2 * 6000 samples and a single one
    separated(noise(1, 20001), 8000, recorded, 8000, chunk_seconds=1.0)
    assert lengths == [8000] * 4


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_seconds": 0.0},
        {"chunk_seconds": -1.0},
        {"overlap": -0.1},
        {"overlap": 0.51},
        {"overlap": float("nan")},
        {"batch_size": 0},
    ],
)
def test_options_out_of_range(options):
    expected = r"expected (chunk_seconds > 0 and|batch_size from 1 up)"
    with pytest.raises(ValueError, match=expected):
        separated(noise(1, 100), 8000, identity, 8000, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(tmp_path, value):
    sig = noise(2, 20000).numpy().T.copy()
    sig[15000, 1] = value
    path = tmp_path / "broken.wav"
    soundfile.write(path, sig, 8000, "FLOAT")
    with (
        soundfile.SoundFile(path) as reader,
        pytest.raises(ValueError, match=r"broken\.wav: NaN or infinite"),
    ):
        list(separate_stream(reader, identity, 8000, chunk_seconds=0.5))


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


def test_empty_file():
    with pytest.raises(ValueError, match="holds no samples"):
        separated(torch.zeros(1, 0), 8000, identity, 8000)


def test_file_shorter_than_its_header_says():
    class Truncated(soundfile.SoundFile):
        @property
        def frames(self):
            return super().frames + 500

    file = io.BytesIO()
    soundfile.write(file, np.zeros(300), 8000, format="WAV")
    reader = Truncated(io.BytesIO(file.getvalue()))
    with pytest.raises(ValueError, match="truncated, 300 of 800 samples"):
        list(separate_stream(reader, identity, 8000))


def test_distribute_residual_leaves_its_arguments():
    mix, est_source = noise(2, 50), noise(6, 50, seed=1).view(3, 2, 50)
    before = mix.clone(), est_source.clone()
    total = distribute_residual(mix, est_source).sum(0)
    assert torch.allclose(total, mix, atol=1e-6)
    assert torch.equal(mix, before[0])
    assert torch.equal(est_source, before[1])


def test_write_sources_is_all_or_nothing(tmp_path):
    def interrupted():
        yield torch.zeros(2, 1, 100)
        assert len(list(tmp_path.glob(".*/streams/?.wav"))) == 2
        assert not list(tmp_path.glob("song*"))
        raise KeyboardInterrupt

    with opened(noise(1, 200), 8000) as reader:
        with pytest.raises(KeyboardInterrupt):
            write_sources(interrupted(), reader, tmp_path, "song")
        assert list(tmp_path.iterdir()) == []
        paths = write_sources([torch.ones(2, 1, 9)], reader, tmp_path, "song")
    assert [path.name for path in paths] == [
        "song_source0.wav",
        "song_source1.wav",
    ]
    assert sorted(tmp_path.iterdir()) == paths
    assert soundfile.info(paths[1]).subtype == "FLOAT"
    assert soundfile.read(paths[1])[0].tolist() == [1.0] * 9


def test_wav_beyond_4_gb_becomes_rf64():
    # three hours of 6 channels at 44.1 kHz are 11 GB
    assert writing._wav_format(3 * 3600 * 44100, 6) == "RF64"
    assert writing._wav_format(overlap_add.UNKNOWN_FRAMES, 1) == "RF64"
    assert writing._wav_format(3600 * 44100, 2) == "WAV"


def test_written_rf64_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MAX_WAV_BYTES", 10)
    sig = noise(2, 100)
    with opened(sig, 8000) as reader:
        paths = write_sources([sig.unsqueeze(0)], reader, tmp_path, "long")
    assert soundfile.info(paths[0]).format == "RF64"
    read, _ = soundfile.read(paths[0], dtype="float32")
    assert torch.equal(torch.from_numpy(read).T, sig)
