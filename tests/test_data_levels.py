"""Levels of files: what was decoded, and what can be told from it alone."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.functional import resample

from trackformer_sb.data.copies import same_recording
from trackformer_sb.data.levels import (
    AudioLevels,
    active_share,
    measure_levels,
    segment_level,
    sum_levels,
)

REAL_MUSIC = Path(__file__).parents[2] / "shared" / "data"
RATE = 8000


def write(path, sig, sample_rate=RATE, **options):
    """Writes in blocks: libsndfile's Vorbis encoder overflows on long arrays.

    [time] or [time, channels].
    """
    sig = np.asarray(sig, dtype="float64")
    channels = 1 if sig.ndim == 1 else sig.shape[1]
    with soundfile.SoundFile(
        path, "w", sample_rate, channels, **options
    ) as file:
        for block in np.split(sig, range(65536, len(sig), 65536)):
            file.write(block)
    return path


def sine(hertz, seconds, sample_rate=RATE):
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    return np.sin(2 * np.pi * hertz * time)


def tune(seed, seconds=20, sample_rate=44100):
    """Struck notes of a scale, each louder or softer than the last."""
    rng = np.random.default_rng(seed)
    sig = np.zeros(round(seconds * sample_rate))
    start = 0
    while start < len(sig):
        length = int(rng.uniform(0.15, 1.2) * sample_rate)
        hertz = 220 * 2 ** (rng.integers(24) / 12)
        time = np.arange(length) / sample_rate
        note = np.sin(2 * np.pi * hertz * time) * np.exp(-4 * time)
        note *= 0.4 * 10 ** (-rng.uniform(0, 18) / 20)
        part = sig[start : start + length]
        part += note[: len(part)]
        start += length
    return sig


def levels_of(decibels, **others):
    """Levels of a made-up curve."""
    codes = 2 * (np.asarray(decibels, dtype=float) + 100)
    values = {"peak": 0.5, "dc_offset": 0.0, "clipped_share": 0.0, **others}
    return AudioLevels(codes.round().astype("uint8"), **values)


def slow_decibels(sig, sample_rate):
    """RMS of each tenth of a second of [time, channels], one by one."""
    mono = sig.mean(axis=1)
    decibels = []
    for i in itertools.count():
        # window i ends before the sample at (i + 1) / 10 s
        begin = i * sample_rate // 10
        end = (i + 1) * sample_rate // 10
        if begin >= len(mono):
            return np.array(decibels)
        power = sum(x * x for x in mono[begin:end]) / (end - begin)
        level = 10 * math.log10(power) if power else -100.0
        decibels.append(min(max(level, -100.0), 27.5))


def slow_clipped_share(sig):
    """Samples in runs of three and more at full scale, run by run."""
    clipped = 0
    for channel in sig.T:
        for value, run in itertools.groupby(channel):
            length = len(list(run))
            if abs(value) >= 32767 / 32768 and length >= 3:
                clipped += length
    return clipped / sig.size


# --- measuring ---------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.sampled_from([100, 999, 1000, 1103]),
    st.integers(1, 3500),
    st.integers(1, 6),
    st.integers(0, 9),
    st.sampled_from([1e-5, 0.01, 0.4, 3.0]),
)
def test_levels_equal_slow_ones(
    tmp_path_factory, sample_rate, num_frames, channels, seed, scale
):
    rng = np.random.default_rng(seed)
    sig = scale * rng.standard_normal((num_frames, channels)) + scale / 3
    sig = np.where(np.abs(sig) > 1, np.clip(sig, -1, 1), sig).astype("float32")
    path = tmp_path_factory.getbasetemp() / "any.wav"
    write(path, sig, sample_rate, subtype="FLOAT")
    levels = measure_levels(path)
    expected = slow_decibels(sig.astype("float64"), sample_rate)
    assert levels.codes.dtype == np.uint8
    assert levels.decibels.shape == expected.shape
    # rounded to half decibels
    np.testing.assert_allclose(levels.decibels, expected, atol=0.2501)
    assert levels.peak == np.abs(sig).max()
    assert levels.dc_offset == pytest.approx(
        np.abs(sig.mean(axis=0, dtype="float64")).max(), rel=1e-6
    )
    assert levels.clipped_share == pytest.approx(slow_clipped_share(sig))


@pytest.mark.parametrize("sample_rate", [8000, 11025, 22050, 44100, 192000])
def test_windows_do_not_drift(tmp_path, sample_rate):
    """Half a sample a window would be 2.7 windows in an hour at 11025 Hz."""
    loud, soft = round(47.3 * sample_rate), 5 * sample_rate
    sig = np.concatenate([np.full(loud, 0.5), np.full(soft, 0.005)])
    levels = measure_levels(write(tmp_path / "step.wav", sig, sample_rate))
    assert levels.decibels[:473].tolist() == [-6.0] * 473
    assert levels.decibels[474:].tolist() == [-46.0] * (523 - 474)


@pytest.mark.parametrize("gain_db", [0, -3, -20, -60, -80])
def test_level_of_a_sine(tmp_path, gain_db):
    sig = 10 ** (gain_db / 20) * sine(1000, 1)
    path = write(tmp_path / "sine.wav", sig, subtype="PCM_24")
    levels = measure_levels(path)
    assert levels.decibels.tolist() == [gain_db - 3.0] * 10
    assert levels.peak == pytest.approx(10 ** (gain_db / 20), rel=1e-3)
    assert levels.dc_offset < 1e-6


def test_level_is_that_of_the_mean_of_the_channels(tmp_path):
    """As training reads it: what cancels is silent, whatever its peak."""
    left = 0.5 * sine(1000, 1)
    path, sig = tmp_path / "opposed.wav", np.stack([left, -left], 1)
    levels = measure_levels(write(path, sig, subtype="FLOAT"))
    assert levels.decibels.tolist() == [-100.0] * 10
    assert levels.peak == pytest.approx(0.5, abs=1e-4)
    one_side = write(tmp_path / "left.wav", np.stack([left, 0 * left], 1))
    assert measure_levels(one_side).decibels.tolist() == [-15.0] * 10


def test_dc_offset_is_the_worst_channel_s(tmp_path):
    sig = np.stack([sine(100, 3), sine(100, 3) - 0.5], 1) / 2
    levels = measure_levels(write(tmp_path / "dc.wav", sig))
    assert levels.dc_offset == pytest.approx(0.25, abs=1e-4)


def test_silence_is_the_floor(tmp_path):
    levels = measure_levels(write(tmp_path / "silence.flac", np.zeros(1234)))
    assert levels.codes.tolist() == [0, 0]
    assert levels[1:] == (0.0, 0.0, 0.0)


def test_samples_beyond_any_level(tmp_path):
    """float32 squares of these overflow; the code is the largest."""
    path = write(tmp_path / "huge.wav", [1e30, -1e30], 10, subtype="FLOAT")
    levels = measure_levels(path)
    assert levels.decibels.tolist() == [27.5, 27.5]
    assert levels.peak == pytest.approx(1e30)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("hertz", [50, 440, 1999])
def test_loud_but_clean_sine_is_not_clipped(tmp_path, hertz, subtype):
    path = tmp_path / "sine.wav"
    for peak in (0.999, 1.0):
        write(path, peak * sine(hertz, 2, 44100), 44100, subtype=subtype)
        assert measure_levels(path).clipped_share == 0


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_clipped_sine(tmp_path, subtype):
    """Above sin(30 degrees) two thirds of a sine are cut off."""
    sig = np.clip(2 * sine(10, 3, 44100), -1, 1)
    path = write(tmp_path / "clipped.wav", sig, 44100, subtype=subtype)
    share = measure_levels(path).clipped_share
    assert share == pytest.approx(2 / 3, abs=2e-3)


@pytest.mark.parametrize("first", [10, 995, 997, 998, 999, 1000, 1997, 1999])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 30, 1500])
def test_clipped_run_across_seconds(tmp_path, first, length):
    """The file is decoded a second at a time; runs go on."""
    sig = np.zeros((4000, 2))
    sig[first : first + length, 1] = -1
    path = write(tmp_path / "run.wav", sig, 1000, subtype="FLOAT")
    counted = measure_levels(path).clipped_share * sig.size
    assert counted == pytest.approx(length if length >= 3 else 0)


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    path = write(tmp_path / "long.flac", np.zeros(40 * RATE))
    counts = []
    read = soundfile.SoundFile.read

    def counting_read(self, frames=-1, **options):
        counts.append(frames)
        return read(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", counting_read)
    measure_levels(path)
    assert counts == [RATE] * 40


@pytest.mark.parametrize(
    ("extension", "options"),
    [
        ("flac", {}),
        ("ogg", {}),
        ("mp3", {}),
        ("mp3", {"bitrate_mode": "CONSTANT", "compression_level": 0.9}),
        ("mp3", {"bitrate_mode": "VARIABLE", "compression_level": 0.3}),
    ],
)
def test_decoding_never_seeks(tmp_path, monkeypatch, extension, options):
    """After a seek the first frames of an mp3 are wrong, by 0.5 measured."""
    sig = np.random.default_rng(0).normal(0, 0.2, 5 * 44100)
    path = write(tmp_path / f"noise.{extension}", sig, 44100, **options)
    whole = soundfile.read(path, dtype="float32", always_2d=True)[0]

    def seek(self, *args):
        raise AssertionError("seeked")

    monkeypatch.setattr(soundfile.SoundFile, "seek", seek)
    levels = measure_levels(path)
    # the largest sample of all is as exact as a checksum
    assert levels.peak == np.abs(whole).max()
    assert levels.dc_offset == pytest.approx(abs(whole.mean(dtype="f8")))


# --- keeping -----------------------------------------------------------------


@given(
    st.binary(max_size=300),
    st.floats(0, 100),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_text_gives_the_same_levels(codes, peak, dc_offset, clipped_share):
    codes = np.frombuffer(codes, "uint8")
    levels = AudioLevels(codes, peak, dc_offset, clipped_share)
    line = json.dumps({"levels": levels.to_text()})
    assert line.isascii() and "\n" not in line
    again = AudioLevels.from_text(json.loads(line)["levels"])
    assert again.codes.dtype == np.uint8
    np.testing.assert_array_equal(again.codes, codes)
    assert again[1:] == (peak, dc_offset, clipped_share)


def test_four_minutes_are_few_bytes():
    levels = levels_of(np.full(2400, -20.0))
    assert len(levels.to_text()) < 3300


@pytest.mark.parametrize(
    "text",
    ["", "0.5 0.0 0.0", "0.5 0.0 0.0 0.0 UAA=", "0.5 x 0.0 UAA=", "a b c !"],
)
def test_text_that_is_no_levels(text):
    with pytest.raises(ValueError, match="expected levels as written by to_t"):
        AudioLevels.from_text(text)


# --- segments ----------------------------------------------------------------


def test_activity_of_a_segment():
    levels = levels_of([-100, -60, -59.5, -20, -100, -100])
    assert active_share(levels, 0, 0.6) == pytest.approx(2 / 6)
    assert active_share(levels, 0.2, 0.2) == 1
    assert active_share(levels, 0, 0.1) == 0
    assert active_share(levels, 0, 0.5, threshold_db=-30) == 0.2
    assert active_share(levels, 0, 0.6, threshold_db=-61) == 0.5


def test_segment_past_the_end_is_silent():
    levels = levels_of([-20.0] * 10)
    assert active_share(levels, 0.5, 1.0) == 0.5
    assert active_share(levels, 7, 1.0) == 0
    assert segment_level(levels, 0.5, 1.0) == pytest.approx(-23.01, abs=0.01)
    assert segment_level(levels, 7, 1.0) == -math.inf


@given(st.integers(0, 500), st.integers(1, 100))
def test_segment_on_the_grid_takes_no_window_more(first, count):
    """0.3 / 0.1 is 2.9999999999999996."""
    curve = np.full(700, -20.0)
    curve[first : first + count] = -40
    levels = levels_of(curve)
    start, duration = first / 10, count / 10
    assert segment_level(levels, start, duration) == pytest.approx(-40)
    assert active_share(levels, start, duration, threshold_db=-30) == 0


def test_window_that_is_cut_counts():
    levels = levels_of([-100, -20, -100])
    assert active_share(levels, 0.05, 0.1) == 0.5
    assert active_share(levels, 0.12, 0.01) == 1


def test_level_of_a_segment_is_near_that_of_its_samples(tmp_path):
    sig = tune(0, 10, RATE)
    levels = measure_levels(write(tmp_path / "tune.wav", sig))
    for start, duration in ((0, 10), (2, 3), (4.5, 0.5), (9, 1)):
        part = sig[int(start * RATE) : int((start + duration) * RATE)]
        expected = 10 * math.log10(np.square(part).mean())
        level = segment_level(levels, start, duration)
        assert level == pytest.approx(expected, abs=0.25)


def test_silent_segment_has_no_level():
    assert segment_level(levels_of([-100.0] * 20), 0.5, 1.0) == -math.inf


@pytest.mark.parametrize(
    ("start", "duration"), [(-0.1, 1), (0, 0), (0, -1), (math.nan, 1)]
)
@pytest.mark.parametrize("measure", [active_share, segment_level])
def test_impossible_segment(measure, start, duration):
    with pytest.raises(ValueError, match="start >= 0 s and duration > 0 s"):
        measure(levels_of([-20.0]), start, duration)


# --- sums --------------------------------------------------------------------


def test_levels_of_a_sum(tmp_path):
    """Of files that have nothing in common, as those of two instruments."""
    rng = np.random.default_rng(0)
    long, short = rng.normal(0, 0.1, 4 * RATE), rng.normal(0, 0.05, 2 * RATE)
    paths = [tmp_path / name for name in ("long.wav", "short.wav", "sum.wav")]
    total = long.copy()
    total[: len(short)] += short
    for path, sig in zip(paths, (long, short, total)):
        write(path, sig)
    *parts, expected = map(measure_levels, paths)
    found = sum_levels(parts)
    np.testing.assert_allclose(found.decibels, expected.decibels, atol=0.5)
    assert found.decibels[:20].mean() > found.decibels[20:].mean() + 0.7
    assert found.peak >= expected.peak
    assert found.dc_offset >= expected.dc_offset


def test_sum_with_silence_and_of_one():
    song = levels_of([-20, -30.5, -99.5], clipped_share=0.2)
    silence = levels_of([-100, -100, -100, -100], peak=0.0)
    total = sum_levels([silence, song])
    assert total.decibels.tolist() == [-20, -30.5, -99.5, -100]
    assert total[1:] == (0.5, 0.0, 0.2)
    assert sum_levels([song]) is song
    with pytest.raises(ValueError, match="at least one file, got none"):
        sum_levels([])


# --- the same recording ------------------------------------------------------


def mp3(sig, folder):
    options = {"bitrate_mode": "CONSTANT", "compression_level": 0.9}
    return write(folder / "copy.mp3", sig, 44100, **options)


def opus(sig, folder):
    sig = resample(torch.from_numpy(sig), 44100, 48000).numpy()
    options = {"format": "OGG", "subtype": "OPUS"}
    return write(folder / "copy.opus", sig, 48000, **options)


def resampled(sig, folder):
    sig = resample(torch.from_numpy(sig), 44100, 16000).numpy()
    return write(folder / "copy.wav", sig, 16000)


COPIES = {
    "flac": lambda sig, folder: write(folder / "copy.flac", sig, 44100),
    "ogg": lambda sig, folder: write(
        folder / "copy.ogg", sig, 44100, compression_level=0.9
    ),
    "mp3 at 32 kbit/s": mp3,
    "opus": opus,
    "16 kHz": resampled,
    "quieter by 14 dB": lambda sig, folder: write(
        folder / "copy.wav", sig / 5, 44100
    ),
    "8 bits": lambda sig, folder: write(
        folder / "copy.wav", sig, 44100, subtype="PCM_U8"
    ),
    "stereo": lambda sig, folder: write(
        folder / "copy.wav", np.stack([sig, sig], 1), 44100
    ),
    "50 ms late": lambda sig, folder: write(
        folder / "copy.wav", np.append(np.zeros(2205), sig), 44100
    ),
    "the first 170 ms cut": lambda sig, folder: write(
        folder / "copy.wav", sig[7497:], 44100
    ),
}


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    """A tune and the levels of its wav file."""
    sig = tune(0)
    path = tmp_path_factory.mktemp("song") / "song.wav"
    return sig, measure_levels(write(path, sig, 44100))


@pytest.mark.parametrize("kind", COPIES)
def test_copy_is_the_same_recording(song, tmp_path, kind):
    sig, levels = song
    copy = measure_levels(COPIES[kind](sig, tmp_path))
    assert same_recording(levels, copy) is True
    assert same_recording(copy, levels) is True


def test_other_songs_are_not_the_same_recording(song, tmp_path):
    """Nor is the song backwards, or with one bar in another place."""
    sig, levels = song
    bar = len(sig) // 10
    others = [tune(seed) for seed in range(1, 6)]
    others += [sig[::-1], np.roll(sig, bar), np.concatenate([sig, sig[:bar]])]
    for other in others:
        found = measure_levels(write(tmp_path / "other.wav", other, 44100))
        assert same_recording(levels, found) is False
        assert same_recording(found, levels) is False


def test_curves_that_say_nothing_are_not_the_same_recording():
    rng = np.random.default_rng(0)
    silence = levels_of(np.full(600, -100.0))
    tone = levels_of(np.full(600, -20.0))
    noise = levels_of(-20 + 0.5 * rng.integers(0, 2, 600))
    short = levels_of(rng.uniform(-60, -10, 35))
    for levels in (silence, tone, noise, short, levels_of([])):
        assert same_recording(levels, levels) is False
    song = levels_of(rng.uniform(-60, -10, 60))
    assert same_recording(song, song) is True
    assert same_recording(song, silence) is False


def test_length_tells_apart():
    """0.2 s may be padding of a codec, 0.3 s are other music."""
    curve = np.random.default_rng(0).uniform(-60, -10, 200)
    longer = np.append(curve, [-40.0, -40.0, -40.0])
    assert same_recording(levels_of(curve), levels_of(longer[:-1]))
    assert not same_recording(levels_of(curve), levels_of(longer))


def test_songs_of_little_dynamics_differ_in_their_shape():
    """Their distance in dB is small; their correlation tells them apart."""
    rng = np.random.default_rng(0)
    first, second = (levels_of(rng.uniform(-22, -18, 600)) for _ in range(2))
    quieter = first._replace(codes=first.codes - 12)
    assert same_recording(first, quieter) is True
    assert same_recording(first, second) is False


def test_sounds_that_die_away_differ_in_how_fast():
    """All falling curves correlate; their distance in dB tells them apart."""
    time = np.arange(60) / 10
    slow, fast = levels_of(-10 - 2 * time), levels_of(-10 - 5 * time)
    assert same_recording(slow, slow) is True
    assert same_recording(slow, fast) is False


@pytest.mark.skipif(
    not REAL_MUSIC.is_dir(), reason=f"no real music at {REAL_MUSIC}"
)
def test_real_music(tmp_path):
    # the same tune is there twice, under two names
    same = {"TSC__courseclear_AAA.ogg", "opensurge__winning_plusplus.ogg"}
    names = sorted({*same, "opensurge__title.ogg", "opensurge__drowning.ogg"})
    paths = [REAL_MUSIC / "mixes" / name for name in names]
    levels = [measure_levels(path) for path in paths]
    for path, found in zip(paths, levels):
        sig, sample_rate = soundfile.read(path, always_2d=True)
        copy = write(tmp_path / "copy.mp3", sig / 2, sample_rate)
        assert same_recording(found, measure_levels(copy))
        seconds = len(sig) / sample_rate
        expected = 10 * np.log10(np.square(sig.mean(axis=1)).mean())
        assert segment_level(found, 0, seconds) == pytest.approx(
            expected, abs=0.3
        )
    for (a, first), (b, second) in itertools.combinations(
        zip(paths, levels), 2
    ):
        count = min(len(first.codes), len(second.codes))
        cut = [x._replace(codes=x.codes[:count]) for x in (first, second)]
        assert same_recording(*cut) is ({a.name, b.name} == same)
