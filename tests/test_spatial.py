"""Places of stems: the Wiener filter, images, surround sound."""

import itertools
import json

import numpy as np
import pytest
import soundfile
import torch
from references import decibel
from separators import RATE, close, named, read, write_noise

from trackformer_sb.cli import main
from trackformer_sb.ffmpeg import read_tags
from trackformer_sb.inference import spatial
from trackformer_sb.inference.separation import separate
from trackformer_sb.inference.spatial import LFE, wiener
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder

ENCODER, DECODER = STFTEncoder(1024, 256), STFTDecoder(1024, 256)


def slow_wiener(masks, mix_w):
    """Bin by bin, of [sources, freq, frames] and [channels, freq, frames]."""
    channels, freq, frames = mix_w.shape
    bins, places = range(freq), []
    delays = torch.arange(2 - freq, freq - 1)[:, None]
    turns = -1j * torch.pi * delays * torch.arange(freq) / (freq - 1)
    turns = turns.exp()
    for mask in masks:
        found = torch.zeros(freq, channels, channels, dtype=mix_w.dtype)
        for f in bins:
            for m, x in zip(mask[f], mix_w[:, f].T):
                found[f] += m**4 * torch.outer(x, x.conj()) / x.norm()
            found[f] /= sum(x.norm() for x in mix_w[:, f].T)
        # the turn of each channel by a delay, which makes it early as the first
        steer = torch.ones(freq, channels, dtype=mix_w.dtype)
        for a in range(channels):
            steer[:, a] = max(
                turns, key=lambda x: torch.fft.irfft(found[:, a, 0] / x)[0]
            )
        place = torch.zeros_like(found)
        for f, g in itertools.product(bins, bins):
            if abs(f - g) <= freq // 16:
                turn = steer[f] / steer[g]
                place[f] += found[g] * torch.outer(turn, turn.conj())
        place = torch.stack([channels * x / x.trace() for x in place])
        places.append(0.99 * place + 0.01 * torch.eye(channels))
    separated = torch.zeros(len(masks), *mix_w.shape, dtype=mix_w.dtype)
    for f, t in itertools.product(bins, range(frames)):
        total = sum(m[f, t] * place[f] for m, place in zip(masks, places))
        for j, place in enumerate(places):
            gain = masks[j, f, t] * place[f] @ total.inverse()
            separated[j, :, f, t] = gain @ mix_w[:, f, t]
    return separated


def spectra(channels, freq=33, frames=20, batch=1):
    masks = torch.rand(3, batch, freq, frames).square()
    mix_w = torch.randn(batch, channels, freq, frames, dtype=torch.complex64)
    mix_w[:, 1:] += 0.8 * mix_w[:, :-1].roll(1, -2)
    return masks / masks.sum(0), mix_w


@pytest.fixture
def anywhere(monkeypatch):
    """The filter counts however near stems lie."""
    monkeypatch.setattr(spatial, "NEAR", -2.0)
    monkeypatch.setattr(spatial, "FAR", -1.0)


@pytest.mark.parametrize("channels", [2, 3])
def test_equals_loops_over_bins_and_frames(anywhere, channels):
    masks, mix_w = spectra(channels)
    masks, mix_w = masks.double(), mix_w.to(torch.complex128)
    expected = slow_wiener(masks[:, 0], mix_w[0])
    separated = wiener(masks, mix_w)[:, 0]
    close(separated, expected, 1e-5)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_stems_sum_to_the_mixture(channels):
    masks, mix_w = spectra(channels, frames=70, batch=2)
    mix_w[..., :5] = 0  # silence
    masks[0, ..., 30:] = 0
    masks = masks / masks.sum(0)
    separated = wiener(masks, mix_w)
    assert not separated[..., :5].any()
    close(separated.sum(0), mix_w)


def test_blocks_and_neighbours_do_not_change_the_result(monkeypatch):
    masks, mix_w = spectra(3, frames=70, batch=2)
    whole = wiener(masks, mix_w)
    monkeypatch.setattr(spatial, "BLOCK_FRAMES", 9)
    for i in range(2):
        alone = wiener(masks[:, i : i + 1], mix_w[i : i + 1])
        torch.testing.assert_close(alone[:, 0], whole[:, i])


def test_where_stems_are_near_masks_do():
    _, mix_w = spectra(1)
    for side, filtered in ((0.9, False), (0.0, True)):
        # sure of the left in some frames and of the right in others
        places = torch.tensor([[1.0, side], [side, 1.0]])
        sources = mix_w * torch.ones(2, 1, 1, 1)
        sources[0, ..., 8:16], sources[1, ..., :8] = 0, 0
        mix_w2 = torch.einsum("ca,axft->cft", places.to(mix_w), sources)
        sure = sources.abs()[:, 0].clamp(min=1e-6)
        sure = (sure / sure.sum(0)).unsqueeze(1)
        by_masks = sure.unsqueeze(2) * mix_w2
        separated = wiener(sure, mix_w2[None])
        assert torch.allclose(separated, by_masks, atol=1e-4) != filtered


def test_one_channel_and_one_place_keep_their_masks():
    masks, mix_w = spectra(1)
    for same in (mix_w, mix_w.expand(-1, 2, -1, -1)):
        expected = masks.unsqueeze(2) * same
        separated = wiener(masks, same)
        close(separated, expected)


# -- images


def placed(sig, level, delay):
    """Stereo, the left ``level`` dB louder and ``delay`` samples later."""
    gain = 10 ** (level / 40)
    return torch.stack([gain * sig.roll(delay), sig / gain])


def level_and_delay(sig):
    """Of stereo: dB and samples by which left is louder, and later."""
    left, right = torch.fft.rfft(sig)
    cross = torch.fft.irfft(left * right.conj())
    delay = torch.fft.fftshift(cross).argmax() - len(cross) // 2
    left, right = sig.square().sum(1)
    return decibel(left / right).item(), delay.item()


def test_stems_of_equal_frequencies_in_different_places():
    """Ideal masks, as a perfect network that has one of both channels."""
    places = (6.0, -5), (-4.0, 12)
    stems = torch.stack([placed(torch.randn(3 * RATE), *x) for x in places])
    power = torch.stack([ENCODER(x).abs().square().mean(0) for x in stems])
    masks = (power / power.sum(0)).unsqueeze(1)
    mix = stems.sum(0, keepdim=True)
    modules = ENCODER, lambda mix_w: masks, DECODER
    plain = separate(mix, *modules)[0][0]
    filtered = separate(mix, *modules, spatial=True)[0][0]
    close(filtered.sum(0), mix[0])
    for place, wanted, masked, better in zip(places, stems, plain, filtered):
        errors = [(wanted - x).square().sum() for x in (masked, better)]
        assert decibel(errors[0] / errors[1]) > 5
        level, delay = level_and_delay(better)
        assert level == pytest.approx(place[0], abs=1.0)
        assert delay == place[1]


# -- surround sound


def test_surround_is_folded_down_for_masks_alone():
    """Bass in front and below, a whistle behind: split by frequency."""
    time = torch.arange(4000) * 2 * torch.pi / 64
    low, high = torch.sin(4 * time), torch.sin(20 * time)
    seen = []

    def split(mix_w):
        seen.append(mix_w)
        is_low = torch.zeros(mix_w[:, 0].shape)
        is_low[:, :160] = 1.0
        return torch.stack([is_low, 1 - is_low])

    split.stereo = True
    mix = torch.zeros(1, 8, 4000)
    mix[0, 2], mix[0, LFE], mix[0, 5] = low, low + 0.5 * high, 0.3 * high
    modules = ENCODER, split, DECODER
    est_source, _ = separate(mix, *modules, lfe=[0], spatial=True)
    stereo = 0.5**0.5 * torch.stack([low, low + 0.3 * high])
    close(seen[0][0], ENCODER(stereo), 1e-3)
    expected = torch.zeros(2, 8, 4000)
    # all of the low-frequency channel is the first source's
    expected[0, 2], expected[0, LFE] = mix[0, 2], mix[0, LFE]
    expected[1, 5] = mix[0, 5]
    close(est_source[0, ..., 1000:-1000], expected[..., 1000:-1000], 0.01)


@pytest.mark.parametrize("channels", [6, 8])
def test_files_of_surround_sound(tmp_path, channels):
    path = tmp_path / "film.wav"
    sig = np.random.default_rng(0).normal(0.0, 0.1, (6000, channels))
    soundfile.write(path, sig, RATE, "FLOAT", format="WAVEX")
    separator = named(["drums", "bass", "vocals", "other"])
    paths = separator.separate_file(path, tmp_path, progressbar=False)
    stems, mix = torch.stack([read(x) for x in paths]), read(path)
    close(stems.sum(0), mix, 1e-5)
    # drums and bass share it, as masks of the net are not one or zero
    low = stems[:, LFE].square().mean(-1)
    assert low[:2].min() > 1e-4 and low[2:].max() < 1e-12
    for x in paths:
        assert read_tags(x).layout == read_tags(path).layout


# -- the option


def test_option_is_recorded(anywhere, tmp_path):
    """As is that slots are not filtered."""
    model = str(named().export(tmp_path / "model"))
    song, results = write_noise(tmp_path / "song.wav", 8000), {}
    for option in ("--spatial", "--no-spatial", "--slots"):
        out = tmp_path / option
        args = ["separate", song, "--model", model, "--out", str(out), option]
        assert main([*args, "--device", "cpu"]) == 0
        record = json.loads((out / "trackformer.json").read_text())["song"]
        assert record["spatial"] == (option != "--no-spatial")
        results[option] = [read(x) for x in sorted(out.glob("song_*"))]
    with_places, plain, slots = results.values()
    assert not torch.allclose(with_places[0], plain[0], atol=1e-4)
    drums = slots[0] + slots[1]
    close(drums, plain[0], 1e-6)


def test_gains_apply_to_filtered_stems(tmp_path):
    separator, song = named(), write_noise(tmp_path / "song.wav", 8000)
    drums, vocals, other = separator.separate_file(song, progressbar=False)
    expected = separator.separate(read(song))["vocals"]
    close(vocals, expected, 1e-6)
    options = {"outputs": {"rest": (0, 1, 4, 5)}, "remix": {"rest": -20.0}}
    rest, remix = separator.separate_file(song, progressbar=False, **options)
    close(rest, drums + other, 1e-6)
    close(remix, vocals + 0.1 * rest, 1e-6)
