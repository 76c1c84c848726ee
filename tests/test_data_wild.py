"""Audio as it is in the wild: any rate, any format, tags, lies and damage.

What the reader promises for each: the right samples, or an error with the
reason; never wrong samples, never a process that hangs.
"""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from trackformer_sb.data import audio as audio_module
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

RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
HIGH_RATES = (88200, 96000, 176400, 192000)


@pytest.mark.parametrize("rate_in", RATES + HIGH_RATES)
@pytest.mark.parametrize("rate_out", [8000, 16000, 44100, 48000])
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


@pytest.mark.parametrize(("rate_out", "times"), [(RATE, 0), (16000, 1)])
def test_audio_is_resampled_once_or_not_at_all(
    tmp_path, monkeypatch, rate_out, times
):
    path = write(tmp_path / "song.wav", music(1), subtype="PCM_16")
    calls = []
    resample = audio_module.resample

    def counted(*args, **options):
        calls.append(args[1:])
        return resample(*args, **options)

    monkeypatch.setattr(audio_module, "resample", counted)
    read_segment(path, 0.1, 0.5, rate_out)
    assert len(calls) == times


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


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize(("kind", "subtype", "step"), LINEAR)
def test_linear_samples_are_exact(tmp_path, kind, subtype, step, channels):
    sig = music(1.3, 8000, channels)
    path = tmp_path / f"song.{EXTENSIONS.get(kind, 'wav')}"
    write(path, sig, 8000, format=kind, subtype=subtype)
    assert_segments_are_slices(path)
    segment = read_segment(path, 0.5, 0.25, 8000)
    expected = sig[4000:6000].mean(axis=1)
    np.testing.assert_allclose(segment, expected, atol=1.01 * step)
    levels = measure_levels(path)
    assert levels.peak == pytest.approx(np.abs(sig).max(), abs=1.01 * step)
    assert len(levels.codes) == 13


@pytest.mark.parametrize("subtype", ["ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM"])
def test_old_compressed_wav(tmp_path, subtype):
    path = write(tmp_path / "song.wav", music(2), subtype=subtype)
    assert_segments_are_slices(path)


MP3 = {
    "64 kbit/s": {"bitrate_mode": "CONSTANT", "compression_level": 0.8},
    "256 kbit/s": {"bitrate_mode": "CONSTANT", "compression_level": 0.1},
    "variable": {"bitrate_mode": "VARIABLE", "compression_level": 0.5},
    "average": {"bitrate_mode": "AVERAGE", "compression_level": 0.6},
}


@pytest.mark.parametrize("rate", [8000, 22050, 32000, 48000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", MP3)
def test_mp3(tmp_path, kind, channels, rate):
    """MPEG 1, 2 and 2.5: frames of 1152 and of 576 samples."""
    path = tmp_path / "song.mp3"
    write(path, music(5, rate, channels), rate, **MP3[kind])
    # the length of one without a Xing frame is an estimate
    assert_segments_are_slices(path, atol=1e-6, slack=2304)


@pytest.mark.parametrize("rate", [8000, 44100, 96000])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("level", [0.1, 0.9])
def test_vorbis(tmp_path, level, channels, rate):
    path = tmp_path / "song.ogg"
    write(path, music(5, rate, channels), rate, compression_level=level)
    assert_segments_are_slices(path, atol=1e-6)


@pytest.mark.parametrize("rate", [16000, 48000])
@pytest.mark.parametrize("channels", [1, 2, 6])
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


@pytest.mark.parametrize("extension", ["wav", "flac", "aiff", "ogg", "mp3"])
def test_extension_may_be_wrong(contents, tmp_path, extension):
    content, whole = contents[extension]
    for other in AUDIO_EXTENSIONS:
        path = tmp_path / f"song{other}"
        path.write_bytes(content)
        segment = read_segment(path, 0.5, 0.5, RATE)
        expected = whole[RATE // 2 : RATE]
        torch.testing.assert_close(segment, expected, atol=1e-6, rtol=0)


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
    assert len(measure_levels(path).codes) == 20


def test_id3_before_flac(contents, tmp_path):
    """No part of FLAC, and libsndfile misses it near the end of the file."""
    content, whole = contents["flac"]
    path = tmp_path / "id3v2.flac"
    path.write_bytes(id3(20000) + content)
    assert len(measure_levels(path).codes) == 20
    for start in range(0, len(whole), 4410):
        try:
            segment = read_segment(path, start / RATE, 0.1, RATE)
        except UnreadableAudio as error:
            assert start > 0.5 * len(whole)
            assert "id3v2.flac: " in str(error)
        else:
            assert torch.equal(segment, whole[start : start + 4410])


# --- headers that lie --------------------------------------------------------


def with_size(content, marker, size, byteorder="little"):
    """The file with another number after a marker."""
    place = content.index(marker) + 4
    field = size.to_bytes(4, byteorder)
    return content[:place] + field + content[place + 4 :]


BODY = 2 * RATE * 4  # bytes of the samples of `contents`


@pytest.mark.parametrize("size", [0, 8, BODY // 2, 3 * BODY, 2**32 - 1])
def test_size_of_the_whole_wav_does_not_matter(contents, tmp_path, size):
    content, whole = contents["wav"]
    path = tmp_path / "riff.wav"
    path.write_bytes(with_size(content, b"RIFF", size))
    assert audio_info(path).num_frames == len(whole)
    assert_segments_are_slices(path)


@pytest.mark.parametrize("size", [4, BODY // 2, BODY - 4, BODY - 1])
def test_data_size_too_small_is_a_shorter_file(contents, tmp_path, size):
    content, whole = contents["wav"]
    path = tmp_path / "short.wav"
    path.write_bytes(with_size(content, b"data", size))
    frames = size // 4
    assert audio_info(path).num_frames == frames
    segment = read_segment(path, (frames - 1) / RATE, 0.1, RATE)
    assert segment.tolist() == [whole[frames - 1], *[0] * 4409]
    assert len(measure_levels(path).codes) == -(-frames * 10 // RATE)


@pytest.mark.parametrize("size", [BODY + 4, 2 * BODY, 10 * BODY])
def test_data_size_too_large_is_truncation(contents, tmp_path, size):
    """A file cut short: up to there it is good, after it nothing is known."""
    content, whole = contents["wav"]
    path = tmp_path / "long.wav"
    path.write_bytes(with_size(content, b"data", size))
    segment = read_segment(path, 1.5, 0.5, RATE)
    torch.testing.assert_close(segment, whole[3 * RATE // 2 :], atol=0, rtol=0)
    match = r"long\.wav: truncated, the header promises more"
    with pytest.raises(UnreadableAudio, match=match):
        read_segment(path, 1.5, 0.6, RATE)
    with pytest.raises(UnreadableAudio, match=match):
        measure_levels(path)


@pytest.mark.parametrize("size", [0x7FFFF000, 2**32 - 1])
def test_placeholder_of_a_pipe_means_to_the_end(contents, tmp_path, size):
    content, whole = contents["wav"]
    path = tmp_path / "piped.wav"
    path.write_bytes(with_size(content, b"data", size))
    assert audio_info(path).num_frames == len(whole)
    assert_segments_are_slices(path)
    assert len(measure_levels(path).codes) == 20


def test_data_size_zero(contents, tmp_path):
    """A recorder that was killed; a whole file without samples is no better."""
    path = tmp_path / "zero.wav"
    path.write_bytes(with_size(contents["wav"][0], b"data", 0))
    assert_unreadable(path, "no samples, or a header that promises 0")
    path = write(tmp_path / "none.wav", np.zeros((0, 2)))
    assert_unreadable(path, "no samples, or a header that promises 0")


@pytest.mark.parametrize("frames", [0, 100, 4 * RATE, 2**32 - 1])
def test_number_of_frames_of_an_aiff_does_not_matter(
    contents, tmp_path, frames
):
    content, whole = contents["aiff"]
    place = content.index(b"COMM") + 10
    field = frames.to_bytes(4, "big")
    path = tmp_path / "comm.aiff"
    path.write_bytes(content[:place] + field + content[place + 4 :])
    assert audio_info(path).num_frames == len(whole)
    assert_segments_are_slices(path)


# --- damage ------------------------------------------------------------------

CUTS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.66, 0.75, 0.9, 0.99, 0.9999)

# Samples that may be missing without anybody knowing: the last frames of an mp3
# whose length is an estimate as often as not, parts of the last sample.
MAY_BE_MISSING = {"wav": 1, "aiff": 1, "flac": 0, "mp3": 2304}


@pytest.mark.parametrize("extension", MAY_BE_MISSING)
@pytest.mark.parametrize("cut", CUTS)
def test_truncated_anywhere(contents, tmp_path, extension, cut):
    """Every segment is right or an error; the file as a whole is an error."""
    content, whole = contents[extension]
    path = tmp_path / f"cut.{extension}"
    path.write_bytes(content[: int(len(content) * cut)])
    sure = len(whole) - MAY_BE_MISSING[extension]
    right = 0
    for start in range(0, len(whole), 2205):
        try:
            segment = read_segment(path, start / RATE, 0.05, RATE)
        except UnreadableAudio as error:
            assert f"cut.{extension}: " in str(error)
            continue
        count = max(0, min(2205, sure - start))
        torch.testing.assert_close(
            segment[:count],
            whole[start : start + count],
            atol=1e-6,
            rtol=0,
        )
        right += 2205
    # a FLAC decoder gives up some frames before the cut
    assert right >= (cut - 0.25) * len(whole)
    if right < sure - 2205:
        with pytest.raises(UnreadableAudio, match=rf"cut\.{extension}: "):
            measure_levels(path)


@pytest.mark.parametrize("extension", ["ogg", "opus"])
@pytest.mark.parametrize("cut", CUTS)
def test_truncated_ogg(contents, tmp_path, extension, cut):
    """It is as long as its whole pages; what came after is not known."""
    content, whole = contents[extension]
    path = tmp_path / f"cut.{extension}"
    path.write_bytes(content[: int(len(content) * cut)])
    try:
        info = audio_info(path)
    except UnreadableAudio as error:
        assert f"cut.{extension}: " in str(error)
        assert cut < 0.5
        return
    # a page holds about 8 KB
    assert (cut - 0.6) * len(whole) < info.num_frames < cut * len(whole) + 8192
    for start in range(0, info.num_frames - 2205, 2205):
        segment = read_segment(
            path, start / info.sample_rate, 1, info.sample_rate, 2205
        )
        torch.testing.assert_close(
            segment, whole[start : start + 2205], atol=1e-4, rtol=0
        )
    match = rf"cut\.{extension}: truncated, \d+ of at least \d+ bytes"
    for start in (info.duration - 0.01, info.duration, info.duration + 1):
        with pytest.raises(UnreadableAudio, match=match):
            read_segment(path, start, 0.1, info.sample_rate)
    with pytest.raises(UnreadableAudio, match=match):
        measure_levels(path)


@pytest.mark.parametrize("extension", ["ogg", "opus"])
def test_ogg_cut_between_two_pages_is_a_shorter_file(
    contents, tmp_path, extension
):
    """A live recording ends like that, and lacks nothing."""
    content, whole = contents[extension]
    path = tmp_path / f"live.{extension}"
    path.write_bytes(content[: content.rindex(b"OggS")])
    info = audio_info(path)
    assert 0 < info.num_frames < len(whole)
    torch.testing.assert_close(
        decoded(path), whole[: info.num_frames], atol=1e-6, rtol=0
    )
    assert_segments_are_slices(path, atol=1e-4)
    seconds = info.num_frames / info.sample_rate
    assert len(measure_levels(path).codes) == -(-round(1e6 * seconds) // 100000)


@pytest.mark.parametrize("missing", [2000, 5000, 20000])
def test_truncated_mp3_names_its_bytes(contents, tmp_path, missing):
    content, _ = contents["mp3"]
    path = tmp_path / "cut.mp3"
    size = len(content) - missing
    for before, after in ((b"", b""), (id3(300), b"TAG" + b"x" * 125)):
        path.write_bytes(before + content[:size] + after)
        present = len(before) + size + len(after)
        promised = len(before) + len(content)
        match = rf"cut\.mp3: truncated, {present} of {promised} bytes"
        with pytest.raises(UnreadableAudio, match=match):
            measure_levels(path)
        assert read_segment(path, 0.1, 0.1, RATE).any()


@pytest.mark.parametrize("extension", ["flac", "ogg", "opus"])
@pytest.mark.parametrize("place", [0.6, 0.8])
def test_damage_in_the_middle(contents, tmp_path, extension, place):
    """Checksums tell; a wav or mp3 with other bytes is other music."""
    content, _ = contents[extension]
    at = int(len(content) * place)
    other = bytes(byte ^ 0x55 for byte in content[at : at + 40])
    path = tmp_path / f"damaged.{extension}"
    path.write_bytes(content[:at] + other + content[at + 40 :])
    with pytest.raises(UnreadableAudio, match=r"damaged\.\w+: truncated"):
        measure_levels(path)


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


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 999, 1000, 2345])
def test_levels_refuse_what_is_no_number(tmp_path, place, value, subtype):
    sig = np.zeros((2346, 2))
    sig[place, 1] = value
    path = write(tmp_path / "nan.wav", sig, 1000, subtype=subtype)
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
    """Neither is repaired nor cut: the levels tell, the user decides."""
    sig = 0.25 + 1.5 * np.sin(2 * np.pi * 100 * np.arange(8000) / 8000)
    path = write(tmp_path / "loud.wav", sig, 8000, subtype="FLOAT")
    segment = read_segment(path, 0.2, 0.5, rate_out)
    assert segment.mean().item() == pytest.approx(0.25, abs=1e-3)
    assert segment.max().item() == pytest.approx(1.75, abs=2e-3)
    levels = measure_levels(path)
    assert levels.peak == pytest.approx(1.75)
    assert levels.dc_offset == pytest.approx(0.25, abs=1e-6)
    assert levels.clipped_share == 0


# --- what is no file ---------------------------------------------------------


def test_folder_with_the_name_of_a_file(tmp_path):
    (tmp_path / "song.wav").mkdir()
    assert_unreadable(tmp_path / "song.wav", "[Dd]irectory|[Pp]ermission")


def symlink(path, target):
    try:
        path.symlink_to(target)
    except OSError:
        pytest.skip("no symbolic links here")
    return path


def test_links(tmp_path):
    song = write(tmp_path / "song.wav", music(0.1))
    assert audio_info(symlink(tmp_path / "link.wav", song)) == audio_info(song)
    gone = symlink(tmp_path / "gone.wav", tmp_path / "missing.wav")
    assert_unreadable(gone, "[Nn]o such file")
    loop = symlink(tmp_path / "loop.wav", tmp_path / "loop.wav")
    assert_unreadable(loop, "symbolic links")
    in_file = song / "below.wav"
    assert_unreadable(in_file, "Not a directory|No such file")


@pytest.mark.skipif(os.name != "posix", reason="POSIX files")
def test_endless_device(tmp_path):
    path = symlink(tmp_path / "zeros.wav", "/dev/zero")
    assert_unreadable(path, "not a regular file")


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


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no such sockets")
def test_socket(tmp_path, monkeypatch):
    # the name of a socket has at most about a hundred bytes
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.wav")
        assert_unreadable(Path("socket.wav"), "not a regular file")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="root may read every file",
)
def test_permissions(tmp_path):
    path = write(tmp_path / "secret.wav", np.zeros(10))
    path.chmod(0)
    assert_unreadable(path, "Permission denied")
    folder = tmp_path / "locked"
    folder.mkdir()
    inside = write(folder / "song.wav", np.zeros(10))
    folder.chmod(0)
    try:
        assert_unreadable(inside, "Permission denied")
    finally:
        folder.chmod(0o700)
