"""Segments of audio files: the right samples, or an error that says why not."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.functional import resample

from trackformer_sb.data import audio as audio_module
from trackformer_sb.data.audio import (
    AUDIO_EXTENSIONS,
    UnreadableAudio,
    audio_info,
    read_segment,
)

REAL_MUSIC = Path(__file__).parents[2] / "shared" / "data"
RATE = 44100
SECONDS = 4


def write(path, sig, sample_rate=RATE, **options):
    """Writes [time] or [time, channels] in blocks.

    libsndfile's Vorbis encoder overflows its stack on long arrays.
    """
    sig = np.asarray(sig, dtype="float32")
    channels = 1 if sig.ndim == 1 else sig.shape[1]
    with soundfile.SoundFile(
        path, "w", sample_rate, channels, **options
    ) as file:
        for block in np.split(sig, range(65536, len(sig), 65536)):
            file.write(block)
    return path


def music(seconds=SECONDS, sample_rate=RATE, channels=2):
    """Swelling noise over a sweep: no two places are alike."""
    rng = np.random.default_rng(0)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    noise = 0.2 * rng.standard_normal((len(time), channels))
    sweep = 0.3 * np.sin(2 * np.pi * (200 + 300 * time) * time)
    return noise * np.sin(1.7 * time)[:, None] ** 6 + sweep[:, None]


FORMATS = {
    "wav": {"subtype": "PCM_16"},
    "flac": {},
    "aiff": {},
    "ogg": {},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {},
    # 32 kbit/s, where seeking goes wrong most: see MP3_LEAD.
    "low.mp3": {"bitrate_mode": "CONSTANT", "compression_level": 0.9},
    "vbr.mp3": {"bitrate_mode": "VARIABLE", "compression_level": 0.3},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Format -> (path, rate, whole file decoded from its beginning, mono)."""
    folder = tmp_path_factory.mktemp("formats")
    decoded = {}
    for kind, options in FORMATS.items():
        rate = 48000 if kind == "opus" else RATE
        sig = music(sample_rate=rate)
        path = write(folder / f"music.{kind}", sig, rate, **options)
        whole = soundfile.read(path, dtype="float32")[0].mean(axis=1)
        decoded[kind] = path, rate, torch.from_numpy(whole)
    return decoded


# Everything but Opus gives the same bits after a seek as without one; Opus
# predicts from the past and was off by up to 8e-8 over 200 seeks.
@pytest.mark.parametrize("kind", FORMATS)
def test_segment_equals_slice_of_whole_file(files, kind):
    path, rate, whole = files[kind]
    assert path.suffix in AUDIO_EXTENSIONS
    # At 32 kbit/s the mp3 encoder leaves its padding in the length.
    assert 0 <= len(whole) - SECONDS * rate < 4 * 1152 * (kind == "low.mp3") + 1

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, len(whole) - 1), st.integers(1, len(whole)))
    def check(first, count):
        expected = whole[first : first + count]
        segment = read_segment(path, first / rate, count / rate, rate)
        assert segment.dtype == torch.float32
        assert segment.shape == (count,)
        torch.testing.assert_close(
            segment[: len(expected)], expected, atol=1e-6, rtol=0
        )
        assert not segment[len(expected) :].any()

    check()


@pytest.mark.parametrize(
    ("kind", "constant"), [("low.mp3", "MP3_LEAD"), ("ogg", "OGG_LAST_PAGE")]
)
def test_some_formats_need_a_lead(files, monkeypatch, kind, constant):
    """After a plain seek these are audibly wrong, and may be so silently."""
    path, rate, whole = files[kind]
    starts = range(20000, len(whole) - 4410, 7000)

    def worst():
        return max(
            (read_segment(path, s / rate, 0.1, rate) - whole[s : s + 4410])
            .abs()
            .max()
            .item()
            for s in starts
        )

    assert worst() < 1e-6
    monkeypatch.setattr(audio_module, constant, 0)
    assert worst() > 1e-2


# 160:147 and its reverse, an exact factor, and a factor with a short grid.
@pytest.mark.parametrize(
    "rates", [(48000, 44100), (44100, 48000), (16000, 8000), (8000, 12000)]
)
@settings(max_examples=12, deadline=None)
@given(st.floats(0, 2.2), st.integers(1, 20000))
def test_resampled_segment_equals_slice_of_whole_resample(
    tmp_path_factory, rates, start, count
):
    rate_in, rate_out = rates
    path = tmp_path_factory.getbasetemp() / f"resample_{rate_in}.wav"
    if not path.exists():
        write(path, music(2, rate_in), rate_in, subtype="FLOAT")
    whole = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    whole = resample(
        whole.mean(dim=1),
        rate_in,
        rate_out,
        lowpass_filter_width=audio_module.FILTER_WIDTH,
        rolloff=audio_module.FILTER_ROLLOFF,
        resampling_method="sinc_interp_kaiser",
        beta=audio_module.FILTER_BETA,
    )
    first = round(start * rate_out)
    segment = read_segment(path, start, count / rate_out, rate_out)
    expected = whole[first : first + count]
    assert segment.shape == (count,)
    # float32 sums of the filter in another order: 2e-6 measured at most.
    torch.testing.assert_close(
        segment[: len(expected)], expected, atol=1e-5, rtol=0
    )
    assert not segment[len(expected) :].any()


@pytest.mark.parametrize(
    ("hertz", "gain"), [(440, 1), (7000, 1), (9500, 0), (11000, 0)]
)
def test_resampling_keeps_what_fits_and_no_more(tmp_path, hertz, gain):
    """48 to 16 kHz: tones below 8 kHz pass, tones above do not alias."""
    time = np.arange(48000) / 48000
    path = write(tmp_path / "tone.wav", np.sin(2 * np.pi * hertz * time), 48000)
    segment = read_segment(path, 0.25, 0.5, 16000)
    place = (0.25 + np.arange(8000) / 16000) * 2 * np.pi * hertz
    expected = gain * torch.from_numpy(np.sin(place)).float()
    torch.testing.assert_close(segment, expected, atol=1e-3, rtol=0)


def test_segment_reads_only_what_it_needs(files, monkeypatch):
    path, rate, _ = files["flac"]
    read_counts = []
    read = soundfile.SoundFile.read

    def counting_read(self, frames=-1, **options):
        read_counts.append(frames)
        return read(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", counting_read)
    read_segment(path, 1.0, 0.5, rate)
    assert read_counts == [rate // 2]
    read_segment(path, 1.0, 0.5, 48000)
    assert rate // 2 < read_counts[1] < rate // 2 + 1000


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_averaged(tmp_path, channels):
    levels = np.arange(1, channels + 1) / 8
    path = write(tmp_path / "levels.wav", np.tile(levels, (100, 1)), 100)
    segment = read_segment(path, 0.2, 0.5, 100)
    expected = torch.full((50,), float(levels.mean()))
    torch.testing.assert_close(segment, expected, atol=1e-4, rtol=0)


def test_num_samples_overrides_rounding(tmp_path):
    path = write(tmp_path / "ramp.wav", np.arange(10) / 16, 10)
    assert read_segment(path, 0, 0.25, 10).shape == (2,)
    segment = read_segment(path, 0, 0.25, 10, num_samples=3)
    assert segment.tolist() == [0, 1 / 16, 2 / 16]


@pytest.mark.parametrize("sample_rate", [100, 150])
def test_past_the_end_is_silence(tmp_path, sample_rate):
    path = write(tmp_path / "short.wav", np.full(100, 0.5), 100)
    half = read_segment(path, 0.5, 1.0, sample_rate)
    assert half[: sample_rate // 4].min() > 0.4
    assert half[sample_rate // 2 :].tolist() == [0] * (sample_rate // 2)
    assert not read_segment(path, 7, 1.0, sample_rate).any()


def test_samples_whose_sum_would_be_infinite(tmp_path):
    sig = np.zeros((800, 2), dtype="float32")
    sig[400] = 3e38
    path = write(tmp_path / "loud.wav", sig, subtype="FLOAT")
    assert read_segment(path, 0.0, 300 / RATE, RATE).isfinite().all()
    with pytest.raises(UnreadableAudio, match=r"loud\.wav: samples beyond"):
        read_segment(path, 0.0, 800 / RATE, RATE)


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_one_sample_file(tmp_path, extension):
    path = write(tmp_path / f"one.{extension}", [0.5])
    assert audio_info(path).num_frames == 1
    segment = read_segment(path, 0, 0.1, RATE)
    assert segment.shape == (4410,)
    assert torch.isfinite(segment).all()
    assert not segment[1:].any()


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_silent_file_is_finite(tmp_path, extension):
    path = write(tmp_path / f"silent.{extension}", np.zeros(RATE))
    segment = read_segment(path, 0.1, 0.5, 48000)
    assert torch.isfinite(segment).all()
    assert segment.abs().max() < 1e-4


def test_info_reads_the_header(files):
    path, rate, whole = files["ogg"]
    info = audio_info(path)
    assert info == (rate, len(whole), 2, SECONDS)
    assert info.duration == SECONDS


@pytest.mark.parametrize("name", ["Пісня №1.wav", "a song (live) ü.wav"])
def test_any_name(tmp_path, name):
    path = write(tmp_path / name, np.full(10, 0.5), 10)
    assert audio_info(str(path)).num_frames == 10
    assert read_segment(path, 0.5, 0.1, 10).tolist() == [0.5]


@pytest.mark.skipif(os.name != "posix", reason="POSIX names are bytes")
def test_name_that_is_not_utf8(tmp_path):
    path = os.fsencode(write(tmp_path / "song.wav", np.full(10, 0.5), 10))
    renamed = path.replace(b"song", b"s\xf6ng")
    try:
        os.rename(path, renamed)
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    assert audio_info(os.fsdecode(renamed)).num_frames == 10


@pytest.mark.parametrize(
    ("start", "duration"), [(-0.1, 1.0), (0, 0), (0, 1e-6)]
)
def test_impossible_segment(tmp_path, start, duration):
    path = write(tmp_path / "song.wav", np.zeros(100), 100)
    with pytest.raises(ValueError, match=r"start >= 0 s and at least one"):
        read_segment(path, start, duration, 100)


def unreadable_files(folder):
    """Name -> what the error must say."""
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("these are no samples\n" * 50)
    (folder / "folder.wav").mkdir()
    flac = write(folder / "whole.flac", music(0.2)).read_bytes()
    # STREAMINFO without a total: bytes 21 (low half) to 25.
    flac = flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]
    (folder / "streamed.flac").write_bytes(flac)
    return {
        "empty.wav": "the file is empty",
        "text.wav": "[Ff]ormat not recogni[sz]ed",
        "folder.wav": "[Ii]s a directory|[Pp]ermission denied",
        "missing.wav": "[Nn]o such file",
        "streamed.flac": "does not say its length",
    }


def test_unreadable_files_name_file_and_reason(tmp_path):
    for name, reason in unreadable_files(tmp_path).items():
        match = f"{name}: .*({reason})"
        with pytest.raises(UnreadableAudio, match=match):
            audio_info(tmp_path / name)
        with pytest.raises(UnreadableAudio, match=match):
            read_segment(tmp_path / name, 0, 1, RATE)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="root may read every file",
)
def test_permission_denied(tmp_path):
    path = write(tmp_path / "secret.wav", np.zeros(10))
    path.chmod(0)
    with pytest.raises(UnreadableAudio, match=r"secret\.wav: Permission"):
        audio_info(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(tmp_path, value):
    sig = np.zeros((1000, 2))
    sig[600, 1] = value
    path = write(tmp_path / "nan.wav", sig, 1000, subtype="FLOAT")
    with pytest.raises(UnreadableAudio, match=r"nan\.wav: NaN or infinite"):
        read_segment(path, 0.5, 0.2, 1000)
    assert not read_segment(path, 0, 0.5, 1000).any()


def test_mp3_of_estimated_length_is_not_truncated(tmp_path):
    """Without the Xing frame the length is a guess, here 759 samples over."""
    options = {"bitrate_mode": "CONSTANT", "compression_level": 0.5}
    path = write(tmp_path / "song.mp3", music(), **options)
    content = path.read_bytes()
    second_frame = content.index(content[:2], 4)
    path.write_bytes(content[second_frame:])
    num_frames = audio_info(path).num_frames
    decoded = len(soundfile.read(path)[0])
    assert decoded < num_frames
    start = num_frames / RATE - 0.1
    assert not read_segment(path, start, 0.1, RATE)[-100:].any()


def test_error_survives_pickling():
    """DataLoader workers send their exceptions to the main process."""
    error = pickle.loads(pickle.dumps(UnreadableAudio("a.wav: empty")))
    assert isinstance(error, UnreadableAudio)
    assert str(error) == "a.wav: empty"


@pytest.mark.skipif(
    not REAL_MUSIC.is_dir(), reason=f"no real music at {REAL_MUSIC}"
)
def test_real_music():
    paths = sorted((REAL_MUSIC / "mixes").glob("*.ogg"))
    paths = [p for p in paths if audio_info(p).sample_rate == 48000] + paths[:3]
    for path in paths:
        info = audio_info(path)
        start = info.duration / 2
        segment = read_segment(path, start, 1.0, RATE)
        assert segment.shape == (RATE,)
        assert torch.isfinite(segment).all()
        assert segment.abs().max() > 1e-3
        if info.sample_rate == RATE:
            whole = soundfile.read(path, dtype="float32", always_2d=True)[0]
            first = round(start * RATE)
            expected = whole[first : first + RATE].mean(axis=1)
            np.testing.assert_allclose(segment, expected, atol=1e-6)
            last = read_segment(path, len(whole) / RATE - 0.1, 0.1, RATE)
            expected = whole[-RATE // 10 :].mean(axis=1)
            np.testing.assert_allclose(last, expected, atol=1e-6)
