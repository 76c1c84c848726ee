"""Audio as it is in the wild: any rate, any format, tags, lies and damage.

What the reader promises for each: the right samples, or an error with the
reason; never wrong samples, never a process that hangs.
"""

import os

import numpy as np
import pytest
import soundfile
import torch

from trackformer_sb.data.audio import (
    AUDIO_EXTENSIONS,
    UnreadableAudio,
    audio_info,
    read_segment,
)
from trackformer_sb.data.levels import measure_levels

RATE = 44100


def write(path, sig, sample_rate=RATE, **options):
    """Writes [time] or [time, channels] in blocks.

    libsndfile's Vorbis encoder overflows its stack on long arrays.
    """
    sig = np.asarray(sig, dtype="float64")
    channels = 1 if sig.ndim == 1 else sig.shape[1]
    with soundfile.SoundFile(
        path, "w", sample_rate, channels, **options
    ) as file:
        for block in np.split(sig, range(65536, len(sig), 65536)):
            file.write(block)
    return path


def music(seconds, sample_rate=RATE, channels=2):
    """Swelling noise over a sweep, other noise in every channel."""
    rng = np.random.default_rng(0)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    noise = 0.1 * rng.standard_normal((len(time), channels))
    sweep = 0.3 * np.sin(2 * np.pi * (200 + 100 * time) * time)
    return noise * np.sin(1.7 * time)[:, None] ** 6 + sweep[:, None]


def decoded(path):
    """The whole file read at once, the mean of its channels."""
    whole = soundfile.read(path, dtype="float32", always_2d=True)[0]
    return torch.from_numpy(whole).mean(dim=1)


def assert_segments_are_slices(path, atol=0.0, slack=0):
    """Over the file and at both ends; past the end there are zeros."""
    whole, sample_rate = decoded(path), audio_info(path).sample_rate
    assert 0 <= audio_info(path).num_frames - len(whole) <= slack
    rng = np.random.default_rng(0)
    starts = [*rng.integers(0, len(whole), 12), 0, 1]
    starts += [len(whole) - n for n in (sample_rate, sample_rate // 7, 2, 1)]
    for start in (max(0, int(start)) for start in starts):
        count = int(rng.integers(1, 2 * sample_rate))
        segment = read_segment(
            path, start / sample_rate, 1, sample_rate, num_samples=count
        )
        expected = whole[start : start + count]
        torch.testing.assert_close(
            segment[: len(expected)], expected, atol=atol, rtol=0
        )
        assert not segment[len(expected) :].any()


def assert_unreadable(path, reason):
    """By everything that reads files, with the file and the reason named."""
    match = rf"{path.name}: .*({reason})"
    with pytest.raises(UnreadableAudio, match=match):
        audio_info(path)
    with pytest.raises(UnreadableAudio, match=match):
        read_segment(path, 0, 0.1, 16000)
    with pytest.raises(UnreadableAudio, match=match):
        measure_levels(path)


# --- rates -------------------------------------------------------------------


@pytest.mark.parametrize("rate_in", [8000, 11025, 44100, 48000, 192000])
@pytest.mark.parametrize("rate_out", [8000, 44100])
def test_tones_keep_frequency_and_level_or_vanish(tmp_path, rate_in, rate_out):
    """What fits below the lower Nyquist frequency passes; nothing aliases."""
    time = np.arange(rate_in) / rate_in
    lower = min(rate_in, rate_out)
    kept = [lower * share for share in (0.011, 0.13, 0.31, 0.44)]
    lost = [rate_out * share for share in (0.52, 0.71, 0.9, 1.3)]
    lost = [hertz for hertz in lost if hertz < 0.49 * rate_in]

    def tones(time, hertz):
        # phases differ, so that no two mistakes cancel
        parts = [np.sin(2 * np.pi * f * time + f) for f in hertz]
        return np.sum(parts, axis=0) / 8

    path = tmp_path / "tones.wav"
    write(path, tones(time, kept + lost), rate_in, subtype="FLOAT")
    start = round(0.3 * rate_out)
    segment = read_segment(path, start / rate_out, 0.4, rate_out)
    places = (start + np.arange(len(segment))) / rate_out
    np.testing.assert_allclose(segment, tones(places, kept), atol=2e-4)


# --- formats -----------------------------------------------------------------

# Format, subtype, step between two values; soundfile scales by 2^(bits - 1)
# less 1 in writing and by 2^(bits - 1) in reading.
LINEAR = [
    ("WAV", "PCM_U8", 2**-7),
    ("WAV", "PCM_16", 2**-15),
    ("WAV", "PCM_24", 2**-23),
    ("WAV", "PCM_32", 2**-23),
    ("WAV", "FLOAT", 2**-24),
    ("WAV", "DOUBLE", 2**-24),
    ("WAVEX", "PCM_24", 2**-23),
    ("RF64", "PCM_16", 2**-15),
    ("AIFF", "PCM_S8", 2**-7),
    ("AIFF", "PCM_16", 2**-15),
    ("AIFF", "PCM_24", 2**-23),
    ("AIFF", "PCM_32", 2**-23),
    ("AIFF", "FLOAT", 2**-24),
    ("FLAC", "PCM_S8", 2**-7),
    ("FLAC", "PCM_16", 2**-15),
    ("FLAC", "PCM_24", 2**-23),
]
EXTENSIONS = {"AIFF": "aiff", "FLAC": "flac"}


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize(("kind", "subtype", "step"), LINEAR)
def test_linear_samples_are_exact(tmp_path, kind, subtype, step, channels):
    sig = music(1.3, 8000, channels)
    path = tmp_path / f"song.{EXTENSIONS.get(kind, 'wav')}"
    write(path, sig, 8000, format=kind, subtype=subtype)
    assert_segments_are_slices(path)
    segment = read_segment(path, 0.5, 0.25, 8000)
    expected = sig[4000:6000].mean(axis=1)
    np.testing.assert_allclose(segment, expected, atol=1.01 * step)
    assert len(measure_levels(path)) == 13


MP3 = {
    "64 kbit/s": {"bitrate_mode": "CONSTANT", "compression_level": 0.8},
    "256 kbit/s": {"bitrate_mode": "CONSTANT", "compression_level": 0.1},
    "variable": {"bitrate_mode": "VARIABLE", "compression_level": 0.5},
    "average": {"bitrate_mode": "AVERAGE", "compression_level": 0.6},
}


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
@pytest.mark.parametrize("channels", [2])
@pytest.mark.parametrize("kind", MP3)
def test_mp3(tmp_path, kind, channels, rate):
    """MPEG 1, 2 and 2.5: frames of 1152 and of 576 samples."""
    path = tmp_path / "song.mp3"
    write(path, music(5, rate, channels), rate, **MP3[kind])
    # the length of one without a Xing frame is an estimate
    assert_segments_are_slices(path, atol=1e-6, slack=2304)


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (96000, 6)])
@pytest.mark.parametrize("level", [0.1, 0.9])
def test_vorbis(tmp_path, level, channels, rate):
    path = tmp_path / "song.ogg"
    write(path, music(5, rate, channels), rate, compression_level=level)
    assert_segments_are_slices(path, atol=1e-6)


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (48000, 6)])
@pytest.mark.parametrize("level", [0.1, 0.9])
def test_opus(tmp_path, level, channels, rate):
    """Down to 33 kbit/s; at 7 kbit/s, for speech, a seek leaves traces."""
    path = tmp_path / "song.opus"
    write(
        path,
        music(3, rate, channels),
        rate,
        format="OGG",
        subtype="OPUS",
        compression_level=level,
    )
    assert_segments_are_slices(path, atol=1e-4)


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Extension -> bytes of 2 s of stereo music, decoded (mono)."""
    folder = tmp_path_factory.mktemp("contents")
    made = {}
    for extension in ("wav", "flac", "aiff", "ogg", "opus", "mp3"):
        options = {}
        rate = RATE
        if extension == "opus":
            options, rate = {"format": "OGG", "subtype": "OPUS"}, 48000
        path = folder / f"song.{extension}"
        write(path, music(2, rate), rate, **options)
        made[extension] = path.read_bytes(), decoded(path)
    return made


def test_speech_codecs_that_cannot_seek_are_refused_at_once(tmp_path):
    path = write(
        tmp_path / "call.wav", music(1, 8000, 1), 8000, subtype="GSM610"
    )
    assert_unreadable(path, "no seeking in GSM610 samples")


# --- tags and other bytes ----------------------------------------------------


def synchsafe(number):
    """A length in an ID3 tag: 7 bits a byte."""
    return bytes((number >> shift) & 127 for shift in (21, 14, 7, 0))


def id3(num_bytes):
    """A tag at the head of a file, as large as a cover picture."""
    picture = np.random.default_rng(0).integers(0, 256, num_bytes, "uint8")
    frame = b"APIC" + synchsafe(num_bytes) + b"\0\0" + picture.tobytes()
    return b"ID3\x04\0\0" + synchsafe(len(frame)) + frame


def chunk(name, size, padded=True):
    return name + size.to_bytes(4, "little") + bytes(size + padded * (size % 2))


NOISE = np.random.default_rng(1).integers(0, 256, 5001, "uint8").tobytes()
TAGGED = {
    "id3v2.mp3": lambda song: id3(200000) + song,
    "id3v1.mp3": lambda song: song + b"TAG" + b"x" * 125,
    "ape.mp3": lambda song: song + b"APETAGEX" + bytes(300),
    "zeros first.mp3": lambda song: bytes(3000) + song,
    "noise after.mp3": lambda song: song + NOISE,
    "noise after.flac": lambda song: song + NOISE,
    "noise after.aiff": lambda song: song + NOISE,
    "noise after.ogg": lambda song: song + NOISE,
    "noise after.wav": lambda song: song + NOISE,
    "tag after.wav": lambda song: song + chunk(b"id3 ", 5001),
    "junk.wav": lambda song: song[:12] + chunk(b"JUNK", 28) + song[12:],
    "odd.wav": lambda song: song[:12] + chunk(b"LIST", 27) + song[12:],
    "id3v2.wav": lambda song: id3(2000) + song,
}


@pytest.mark.parametrize("name", TAGGED)
def test_tags_and_other_bytes_are_no_samples(contents, tmp_path, name):
    content, whole = contents[name.rpartition(".")[2]]
    path = tmp_path / name
    path.write_bytes(TAGGED[name](content))
    assert audio_info(path).num_frames == len(whole)
    torch.testing.assert_close(decoded(path), whole, atol=1e-6, rtol=0)
    assert_segments_are_slices(path, atol=1e-6)
    assert len(measure_levels(path)) == 20


# --- damage ------------------------------------------------------------------


def test_data_size_zero(contents, tmp_path):
    """A recorder that was killed; a whole file without samples is no better."""
    content, _ = contents["wav"]
    place = content.index(b"data") + 4
    path = tmp_path / "zero.wav"
    path.write_bytes(content[:place] + bytes(4) + content[place + 4 :])
    assert_unreadable(path, "no samples, or a header that promises 0")
    path = write(tmp_path / "none.wav", np.zeros((0, 2)))
    assert_unreadable(path, "no samples, or a header that promises 0")


@pytest.mark.parametrize("extension", ["flac", "mp3"])
@pytest.mark.parametrize("rate", [RATE, 48000])
def test_cut_files_are_named_where_they_end(
    contents, tmp_path, extension, rate
):
    """What is left of them is read as it was."""
    content, whole = contents[extension]
    path = tmp_path / f"cut.{extension}"
    path.write_bytes(content[: len(content) // 2])
    segment = read_segment(path, 0.2, 0.2, RATE)
    expected = whole[RATE // 5 :][: RATE // 5]
    torch.testing.assert_close(segment, expected, atol=1e-6, rtol=0)
    match = rf"cut\.{extension}: truncated"
    for start in (0.8, 1.5):
        with pytest.raises(UnreadableAudio, match=match):
            read_segment(path, start, 0.4, rate)
    with pytest.raises(UnreadableAudio, match=match):
        measure_levels(path)


@pytest.mark.parametrize("extension", ["wav", "aiff", "ogg"])
def test_cut_files_of_other_formats_are_shorter(contents, tmp_path, extension):
    content, whole = contents[extension]
    path = tmp_path / f"cut.{extension}"
    path.write_bytes(content[: 3 * len(content) // 4])
    assert RATE / 2 < audio_info(path).num_frames < len(whole)
    assert_segments_are_slices(path, atol=1e-6)


NO_AUDIO = {
    "zero bytes": (b"", "the file is empty"),
    "one byte": (b"x", "ormat not recogni|NoBackend"),
    "text": (b"these are no samples\n" * 500, "ormat not recogni"),
    "zeros": (bytes(5000), "ormat not recogni"),
    "page": (b"<!DOCTYPE html><html>404</html>", "ormat not recogni"),
    "picture": (b"\x89PNG\r\n\x1a\n" + NOISE[:900], "ormat not recogni"),
}


@pytest.mark.parametrize("extension", AUDIO_EXTENSIONS)
@pytest.mark.parametrize("kind", NO_AUDIO)
def test_what_is_no_audio(tmp_path, kind, extension):
    content, reason = NO_AUDIO[kind]
    path = tmp_path / f"no audio{extension}"
    path.write_bytes(content)
    assert_unreadable(path, reason)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("place", [0, 1000, 2345])
def test_levels_refuse_what_is_no_number(tmp_path, place, value):
    sig = np.zeros((2346, 2))
    sig[place, 1] = value
    path = write(tmp_path / "nan.wav", sig, 1000, subtype="FLOAT")
    seconds = place // 1000
    match = rf"nan\.wav: NaN or infinite samples after {seconds}\.000 s"
    with pytest.raises(UnreadableAudio, match=match):
        measure_levels(path)


def test_a_number_too_large_for_float32_is_infinite(tmp_path):
    path = write(tmp_path / "huge.wav", [0, 1e300], 1000, subtype="DOUBLE")
    with pytest.raises(UnreadableAudio, match=r"huge\.wav: NaN or infinite"):
        read_segment(path, 0, 0.002, 1000)
    with pytest.raises(UnreadableAudio, match=r"huge\.wav: NaN or infinite"):
        measure_levels(path)


@pytest.mark.parametrize("rate_out", [8000, 16000])
def test_offset_and_overshoot_stay_as_they_are(tmp_path, rate_out):
    """Neither is repaired nor cut."""
    sig = 0.25 + 1.5 * np.sin(2 * np.pi * 100 * np.arange(8000) / 8000)
    path = write(tmp_path / "loud.wav", sig, 8000, subtype="FLOAT")
    segment = read_segment(path, 0.2, 0.5, rate_out)
    assert segment.mean().item() == pytest.approx(0.25, abs=1e-3)
    assert segment.max().item() == pytest.approx(1.75, abs=2e-3)


# --- what is no file ---------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "pipe.wav"
    os.mkfifo(path)
    # held open and not empty, so that a reader that tries gets other words
    # instead of waiting for ever
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(pipe, bytes(4096))
        assert_unreadable(path, "not a regular file")
    finally:
        os.close(pipe)
