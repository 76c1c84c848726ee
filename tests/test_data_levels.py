"""Levels of files: what was decoded, and what can be told from it alone."""

import itertools
import math

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from trackformer_sb.data.levels import (
    active_share,
    decibels,
    measure_levels,
    segment_level,
    sum_levels,
)

RATE = 8000


def write(path, sig, sample_rate=RATE, **options):
    soundfile.write(path, np.asarray(sig, "float64"), sample_rate, **options)
    return path


def codes_of(levels):
    """Codes of a made-up curve in dBFS."""
    codes = 2 * (np.asarray(levels, dtype=float) + 100)
    return codes.round().astype("uint8")


def slow_decibels(sig, sample_rate):
    """RMS of each tenth of a second of [time, channels], one by one."""
    mono = sig.mean(axis=1)
    found = []
    for i in itertools.count():
        # window i ends before the sample at (i + 1) / 10 s
        begin = i * sample_rate // 10
        end = (i + 1) * sample_rate // 10
        if begin >= len(mono):
            return np.array(found)
        power = sum(x * x for x in mono[begin:end]) / (end - begin)
        level = 10 * math.log10(power) if power else -100.0
        found.append(min(max(level, -100.0), 27.5))


@given(
    st.sampled_from([100, 999, 1000, 1103]),
    st.integers(1, 3500),
    st.integers(1, 6),
    st.integers(0, 9),
    st.sampled_from([0.0, 1e-5, 0.01, 0.4, 30.0]),
)
def test_levels_equal_slow_ones(
    tmp_path_factory, sample_rate, num_frames, channels, seed, scale
):
    rng = np.random.default_rng(seed)
    sig = scale * rng.standard_normal((num_frames, channels)) + scale / 3
    sig = sig.astype("float32")
    path = tmp_path_factory.getbasetemp() / "any.wav"
    codes = measure_levels(write(path, sig, sample_rate, subtype="FLOAT"))
    expected = slow_decibels(sig.astype("float64"), sample_rate)
    assert codes.dtype == np.uint8 and codes.shape == expected.shape
    # rounded to half decibels
    np.testing.assert_allclose(decibels(codes), expected, atol=0.2501)


@pytest.mark.parametrize("sample_rate", [11025, 44100])
def test_windows_do_not_drift(tmp_path, sample_rate):
    """Half a sample a window would be 2.7 windows in an hour at 11025 Hz."""
    loud, soft = round(47.3 * sample_rate), 5 * sample_rate
    sig = np.concatenate([np.full(loud, 0.5), np.full(soft, 0.005)])
    codes = measure_levels(write(tmp_path / "step.wav", sig, sample_rate))
    assert decibels(codes[:473]).tolist() == [-6.0] * 473
    assert decibels(codes[474:]).tolist() == [-46.0] * (523 - 474)


@pytest.mark.parametrize("extension", ["flac", "ogg", "mp3"])
def test_decoding_is_by_the_second_and_never_seeks(
    tmp_path, monkeypatch, extension
):
    """After a seek the first frames of an mp3 are wrong, by 0.5 measured."""
    sig = np.random.default_rng(0).normal(0, 0.2, 5 * 44100)
    path = write(tmp_path / f"noise.{extension}", sig, 44100)
    whole = soundfile.read(path, dtype="float32", always_2d=True)[0]
    counts = []
    read = soundfile.SoundFile.read

    def counting_read(self, frames=-1, **options):
        counts.append(frames)
        return read(self, frames, **options)

    def seek(self, *args):
        raise AssertionError("seeked")

    monkeypatch.setattr(soundfile.SoundFile, "read", counting_read)
    monkeypatch.setattr(soundfile.SoundFile, "seek", seek)
    codes = measure_levels(path)
    assert max(counts) == 44100
    expected = slow_decibels(whole.astype("float64"), 44100)
    np.testing.assert_allclose(decibels(codes), expected, atol=0.2501)


def test_activity_and_level_of_a_segment():
    codes = codes_of([-100, -60, -59.5, -20, -100, -100])
    assert active_share(codes, 0, 0.6) == pytest.approx(2 / 6)
    assert active_share(codes, 0.2, 0.2) == 1
    assert active_share(codes, 0, 0.5, threshold_db=-30) == 0.2
    # a window that is cut counts
    assert active_share(codes, 0.35, 0.1) == 0.5
    # past the end there is silence
    assert active_share(codes, 0.3, 1.0) == 0.1
    assert segment_level(codes, 0.3, 1.0) == pytest.approx(-30, abs=0.01)
    assert segment_level(codes, 7, 1.0) == -math.inf
    assert segment_level(codes_of([-100.0] * 20), 0.5, 1.0) == -math.inf


@given(st.integers(0, 500), st.integers(1, 100))
def test_segment_on_the_grid_takes_no_window_more(first, count):
    """0.3 / 0.1 is 2.9999999999999996."""
    curve = np.full(700, -20.0)
    curve[first : first + count] = -40
    what = codes_of(curve), first / 10, count / 10
    assert segment_level(*what) == pytest.approx(-40)
    assert active_share(*what, threshold_db=-30) == 0


def test_levels_of_a_sum(tmp_path):
    """Of files that have nothing in common, as those of two instruments."""
    rng = np.random.default_rng(0)
    long, short = rng.normal(0, 0.1, 4 * RATE), rng.normal(0, 0.05, 2 * RATE)
    total = long.copy()
    total[: len(short)] += short
    path = tmp_path / "sig.wav"
    *parts, expected = (
        measure_levels(write(path, sig)) for sig in (long, short, total)
    )
    found = sum_levels(parts)
    np.testing.assert_allclose(decibels(found), decibels(expected), atol=0.5)
    assert found[:20].mean() > found[20:].mean() + 1
    assert sum_levels([expected]).tolist() == expected.tolist()
