"""Levels of files: what was decoded, and what can be told from it alone."""

import itertools
import math

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from trackformer_sb.data.files import decibels, measure_levels, segment_loudness


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
    soundfile.write(path, sig, sample_rate, "FLOAT")
    codes = measure_levels(path)
    expected = slow_decibels(sig.astype("float64"), sample_rate)
    assert codes.dtype == np.uint8 and codes.shape == expected.shape
    # rounded to half decibels
    np.testing.assert_allclose(decibels(codes), expected, atol=0.2501)


@pytest.mark.parametrize(
    ("start", "duration", "level", "share"),
    [
        (0, 0.6, -27.78, 2 / 6),
        # 0.3 / 0.1 is 2.9999999999999996
        (0.3, 0.1, -20, 1),
        # a window that is cut counts
        (0.35, 0.1, -23.01, 0.5),
        # past the end there is silence
        (0.3, 1.0, -30, 0.1),
        (7, 1.0, -math.inf, 0),
    ],
)
def test_loudness_of_a_segment(start, duration, level, share):
    levels = np.array([-100, -60, -59.5, -20, -100, -100])
    codes = (2 * (levels + 100)).astype("uint8")
    found = segment_loudness(codes, start, duration)
    assert found == pytest.approx((level, share), abs=0.01)
