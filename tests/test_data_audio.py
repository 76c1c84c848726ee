"""Audio of every kind that people have: any rate, format, tags, damage.

What the reader promises for each: the right samples, or an error with the
reason; never wrong samples, never a process that hangs.
"""

import os
import pickle
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trackformer_sb.audio import (
    AUDIO_EXTENSIONS,
    UnreadableAudio,
    audio_info,
    open_audio,
    read_on,
    read_segment,
    resample,
)
from trackformer_sb.data.files import measure_levels
from trackformer_sb.ffmpeg import FFmpegFile

RATE, SECONDS = 44100, 2.5


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


def encode(path, sig, container, codec, sample_rate=RATE, **options):
    """Writes [time, 2] by FFmpeg."""
    with av.open(path, "w", format=container, options=options) as file:
        rate = 48000 if codec == "libopus" else sample_rate
        stream = file.add_stream(codec, rate, layout="stereo")
        stream.bit_rate = 192000
        whole = np.ascontiguousarray(sig.T, dtype="float32")
        frame = av.AudioFrame.from_ndarray(whole, "fltp", "stereo")
        frame.sample_rate, frame.pts = sample_rate, 0
        frame.time_base = Fraction(1, sample_rate)
        for one in (frame, None):
            file.mux(stream.encode(one))
    return path


def music(seconds=SECONDS, sample_rate=RATE, channels=2):
    """Swelling noise over a sweep: no two places or channels are alike."""
    rng = np.random.default_rng(0)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    noise = 0.1 * rng.standard_normal((len(time), channels))
    sweep = 0.3 * np.sin(2 * np.pi * (200 + 300 * time) * time)
    sig = noise * np.sin(1.7 * time)[:, None] ** 6 + sweep[:, None]
    return sig * 0.8 ** np.arange(channels)


# Format, subtype, step between two values; soundfile scales by 2^(bits - 1)
# less 1 in writing and by 2^(bits - 1) in reading.
LINEAR = {
    "8.wav": ("WAV", "PCM_U8", 2**-7),
    "16.wav": ("WAV", "PCM_16", 2**-15),
    "24.wav": ("WAVEX", "PCM_24", 2**-23),
    "32.wav": ("WAV", "PCM_32", 2**-23),
    "double.wav": ("WAV", "DOUBLE", 2**-24),
    "rf64.wav": ("RF64", "PCM_16", 2**-15),
    "w64.w64": ("W64", "PCM_16", 2**-15),
    "24.aiff": ("AIFF", "PCM_24", 2**-23),
    "float.aifc": ("AIFF", "FLOAT", 2**-24),
    "caf.caf": ("CAF", "PCM_16", 2**-15),
    "au.au": ("AU", "PCM_16", 2**-15),
    "8.flac": ("FLAC", "PCM_S8", 2**-7),
    "24.flac": ("FLAC", "PCM_24", 2**-23),
}
# by libsndfile: rate, channels, options
LOSSY = {
    "vorbis.ogg": (RATE, 2, {}),
    "vorbis.oga": (96000, 6, {"format": "OGG", "compression_level": 0.9}),
    "opus.ogg": (48000, 2, {"subtype": "OPUS"}),
    "six.opus": (48000, 6, {"format": "OGG", "subtype": "OPUS"}),
    "vbr.mp3": (RATE, 2, {"bitrate_mode": "VARIABLE"}),
    # 32 kbit/s, where frames lean most on those before them
    "low.mp3": (
        *(RATE, 2),
        {"bitrate_mode": "CONSTANT", "compression_level": 0.9},
    ),
    # MPEG 2 and 2.5 have frames of 576 samples
    "22.mp3": (22050, 2, {"bitrate_mode": "AVERAGE"}),
    "8.mp3": (8000, 2, {"bitrate_mode": "CONSTANT"}),
}
# by FFmpeg: container, codec
FFMPEG = {
    "opus.opus": ("opus", "libopus"),
    "mp3.mp3": ("mp3", "libmp3lame"),
    "mp3_in_wav.wav": ("wav", "libmp3lame"),
    "aac.m4a": ("ipod", "aac"),
    "alac.m4a": ("ipod", "alac"),
    "aac.aac": ("adts", "aac"),
    "film.mp4": ("mp4", "aac"),
    "film.mov": ("mov", "pcm_s16be"),
    "film.mkv": ("matroska", "aac"),
    "film.webm": ("webm", "libopus"),
    "film.avi": ("avi", "libmp3lame"),
    "wma.wma": ("asf", "wmav2"),
    "ac3.ac3": ("ac3", "ac3"),
    "opus.mka": ("matroska", "libopus"),
    "layer2.mp2": ("mp2", "mp2"),
    "wavpack.wv": ("wv", "wavpack"),
    "tta.tta": ("tta", "tta"),
    "eac3.eac3": ("eac3", "eac3"),
    "film.wmv": ("asf", "wmav2"),
    "film.flv": ("flv", "aac"),
    "film.mpg": ("vob", "mp2"),
    "film.ts": ("mpegts", "aac"),
    "film.3gp": ("3gp", "aac"),
    "book.m4b": ("ipod", "aac"),
}
NAMES = (*LINEAR, *LOSSY, *FFMPEG, "bare.mp3", "joined.mp3")
# Each decoding of aac draws its noise anew
NOISY = [
    name
    for name, (_, codec) in FFMPEG.items()
    if codec in ("aac", "wmav2", "eac3")
]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Name -> file of that kind, for reading only."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, (kind, subtype, _) in LINEAR.items():
        write(folder / name, music(), format=kind, subtype=subtype)
    for name, (rate, channels, options) in LOSSY.items():
        sig = music(sample_rate=rate, channels=channels)
        write(folder / name, sig, rate, **options)
    for name, kind in FFMPEG.items():
        encode(folder / name, music(), *kind)
    encode(folder / "bare.mp3", music(), "mp3", "libmp3lame", write_xing="0")
    once = (folder / "mp3.mp3").read_bytes()
    (folder / "joined.mp3").write_bytes(once + once)
    return {name: folder / name for name in NAMES}


def decoded(path):
    """The whole file, read on in blocks [time, channels]."""
    with open_audio(path) as audio:
        parts = range(0, audio.frames, 50000)
        blocks = [read_on(audio, 50000) for _ in parts]
    return torch.from_numpy(np.concatenate(blocks))


def assert_segments_are_slices(path, atol=0.0):
    """Anywhere in the file; past its end there are zeros."""
    whole, sample_rate = decoded(path).mean(1), audio_info(path).sample_rate
    assert audio_info(path).num_frames == len(whole)
    end, rng = len(whole), np.random.default_rng(0)
    starts = [*rng.integers(0, end, 12), 0, 1, end + 5]
    starts += [end - n for n in (sample_rate, sample_rate // 7, 2, 1)]
    for start in (max(0, int(start)) for start in starts):
        count = int(rng.integers(1, 2 * sample_rate))
        segment = read_segment(
            path, start / sample_rate, count / sample_rate, sample_rate
        )
        assert segment.shape == (count,)
        expected = whole[start : start + count]
        torch.testing.assert_close(
            segment[: len(expected)], expected, atol=atol, rtol=0
        )
        assert not segment[len(expected) :].any()


def assert_unreadable(path, reason):
    """By everything that reads files, with the file and the reason named."""
    for read in (
        audio_info,
        measure_levels,
        lambda path: read_segment(path, 0, SECONDS, 16000),
    ):
        with pytest.raises(
            UnreadableAudio, match=rf"{path.name}: .*({reason})"
        ) as error:
            read(path)
        # as from the workers of a DataLoader
        assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


# --- formats -----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_is_read_whole_and_in_segments(kinds, name):
    path = kinds[name]
    assert path.suffix in AUDIO_EXTENSIONS
    info, sig = audio_info(path), decoded(path).numpy()
    _, channels, _ = LOSSY.get(name, (RATE, 2, {}))
    assert sig.shape == (info.num_frames, channels)
    # what codecs add at the ends or lack; libsndfile's are exact
    slack = 0.06 if name not in {**LINEAR, **LOSSY} else 0
    slack = 4 * 1152 / RATE if name == "low.mp3" else slack
    seconds = 2 * SECONDS if name == "joined.mp3" else SECONDS
    assert info.duration == pytest.approx(seconds, abs=slack)
    if channels == 6:  # written in the order of Vorbis, the bass last
        sig = sig[:, [0, 2, 1, 4, 5, 3]]
    # no channel is lost, nothing is silent; the sixth may be for low tones
    expected = music(channels=channels)
    level, right = (np.square(x).mean(0)[:5] ** 0.5 for x in (sig, expected))
    assert level == pytest.approx(right, rel=0.1)
    if name in LINEAR:
        np.testing.assert_allclose(sig, expected, atol=1.01 * LINEAR[name][2])
    atol = {".ogg": 1e-6, ".oga": 1e-6, ".opus": 1e-4, ".mp3": 1e-5}
    atol = atol.get(path.suffix, 0 if name in LINEAR else 2e-4)
    atol = 0.05 if name in NOISY else atol
    assert_segments_are_slices(path, atol)


def test_an_mp3_in_parts_of_other_rates_is_read_whole(tmp_path):
    path = tmp_path / "joined.mp3"
    parts = []
    for rate in (44100, 48000):
        sig = music(sample_rate=rate)
        parts.append(encode(path, sig, "mp3", "libmp3lame", rate).read_bytes())
    path.write_bytes(b"".join(parts))
    assert audio_info(path).duration == pytest.approx(2 * SECONDS, abs=0.1)


def test_an_opus_of_a_minute_is_read_to_its_end(tmp_path):
    path = encode(tmp_path / "song.opus", music(60), "opus", "libopus")
    assert audio_info(path).duration == pytest.approx(60, abs=0.02)
    assert len(decoded(path)) == audio_info(path).num_frames


def test_a_streamed_flac_does_not_say_its_length(kinds, tmp_path):
    flac = kinds["24.flac"].read_bytes()
    path = tmp_path / "streamed.flac"
    # STREAMINFO without a total: bytes 21 (low half) to 25
    path.write_bytes(
        flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]
    )
    assert audio_info(path).duration == SECONDS
    assert len(decoded(path)) == SECONDS * RATE


@pytest.mark.parametrize("tag", [b"\xff", b"TAG", b"ID3" + bytes(9)])
def test_what_follows_an_mp3(kinds, tmp_path, tag):
    path = tmp_path / "song.mp3"
    path.write_bytes(kinds["mp3.mp3"].read_bytes() + tag)
    assert audio_info(path).duration == pytest.approx(SECONDS, abs=0.1)


def test_a_segment_is_found_without_counting(kinds, monkeypatch):
    counted = []
    monkeypatch.setattr(FFmpegFile, "frames", property(counted.append))
    read_segment(kinds["aac.m4a"], 1.0, 0.5, RATE)
    assert not counted


def test_a_right_header_saves_decoding(kinds, monkeypatch):
    monkeypatch.setattr(FFmpegFile, "_decode", lambda self: iter(()))
    assert audio_info(kinds["mp3.mp3"]).duration == SECONDS


def synchsafe(number):
    """A length in an ID3 tag: 7 bits a byte."""
    return bytes((number >> shift) & 127 for shift in (21, 14, 7, 0))


def id3(num_bytes):
    """A tag at the head of a file, as large as a cover picture."""
    picture = np.random.default_rng(0).integers(0, 256, num_bytes, "uint8")
    frame = b"APIC" + synchsafe(num_bytes) + b"\0\0" + picture.tobytes()
    return b"ID3\x04\0\0" + synchsafe(len(frame)) + frame


def chunk(name, size):
    return name + size.to_bytes(4, "little") + bytes(size + size % 2)


NOISE = np.random.default_rng(1).integers(0, 256, 5001, "uint8").tobytes()


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("vbr.mp3", lambda song: id3(200000) + song),
        ("vbr.mp3", lambda song: song + b"TAG" + b"x" * 125),
        ("vbr.mp3", lambda song: song + b"APETAGEX" + bytes(300)),
        *(
            (name, lambda song: song + NOISE)
            for name in ("24.flac", "24.aiff", "vorbis.ogg", "16.wav")
        ),
        ("16.wav", lambda song: song + chunk(b"id3 ", 5001)),
        ("16.wav", lambda song: song[:12] + chunk(b"LIST", 27) + song[12:]),
        ("16.wav", lambda song: id3(2000) + song),
    ],
)
def test_tags_and_other_bytes_are_no_samples(kinds, tmp_path, name, tag):
    path = tmp_path / name
    path.write_bytes(tag(kinds[name].read_bytes()))
    whole = decoded(kinds[name])
    torch.testing.assert_close(decoded(path), whole, atol=1e-6, rtol=0)
    assert_segments_are_slices(path, atol=1e-5)


# --- rates and segments ------------------------------------------------------


@pytest.mark.parametrize("rate_in", [8000, 22051, 44100, 44101, 384000])
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


# 160:147 and its reverse, an exact factor, and a factor with a short grid.
@pytest.mark.parametrize(
    "rates", [(48000, 44100), (44100, 48000), (16000, 8000), (8000, 12000)]
)
@settings(max_examples=12, deadline=None)
@given(st.floats(0, 2.7), st.integers(1, 20000))
def test_resampled_segment_equals_slice_of_whole_resample(
    tmp_path_factory, rates, start, count
):
    rate_in, rate_out = rates
    path = tmp_path_factory.getbasetemp() / f"resample_{rate_in}.wav"
    if not path.exists():
        write(path, music(sample_rate=rate_in), rate_in, subtype="FLOAT")
    whole = resample(decoded(path).mean(dim=1), rate_in, rate_out)
    first = round(start * rate_out)
    segment = read_segment(path, start, count / rate_out, rate_out)
    expected = whole[first : first + count]
    assert segment.shape == (count,)
    # float32 sums of the filter in another order: 2e-6 measured at most.
    torch.testing.assert_close(
        segment[: len(expected)], expected, atol=1e-5, rtol=0
    )
    assert not segment[len(expected) :].any()


def test_segment_reads_only_what_it_needs(kinds, monkeypatch):
    read_counts = []
    read = soundfile.SoundFile.read

    def counting_read(self, frames=-1, **options):
        read_counts.append(frames)
        return read(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", counting_read)
    read_segment(kinds["24.flac"], 1.0, 0.5, RATE)
    assert read_counts == [RATE // 2]
    read_segment(kinds["24.flac"], 1.0, 0.5, 48000)
    assert RATE // 2 < read_counts[1] < RATE // 2 + 1200


def test_lengths_of_segments(tmp_path):
    path = write(tmp_path / "ramp.wav", np.arange(10) / 16, 10)
    assert read_segment(path, 0, 0.25, 10).shape == (2,)
    segment = read_segment(path, 0, 0.3, 10)
    assert segment.tolist() == [0, 1 / 16, 2 / 16]
    for start, duration in ((-0.1, 1.0), (0, 0), (0, 1e-6)):
        with pytest.raises(ValueError, match=r"start >= 0 s and at least one"):
            read_segment(path, start, duration, 10)


@pytest.mark.parametrize("sig", [[0.5], np.zeros(RATE)])
@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_one_sample_and_silence(tmp_path, extension, sig):
    path = write(tmp_path / f"short.{extension}", sig)
    assert audio_info(path).num_frames == len(sig)
    for rate in (RATE, 48000):
        segment = read_segment(path, 0, 0.5, rate)
        assert segment.shape == (rate // 2,)
        assert torch.isfinite(segment).all()
        assert segment[200:].abs().max() < 1e-4


# --- damage ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.nan, "NaN or infinite"),
        (-np.inf, "NaN or infinite"),
        # the sum of both channels would be infinite
        (3e38, "samples beyond"),
    ],
)
def test_samples_that_are_no_numbers(tmp_path, value, reason):
    sig = np.zeros((1000, 2))
    sig[600] = value
    path = write(tmp_path / "nan.wav", sig, 1000, subtype="FLOAT")
    with pytest.raises(UnreadableAudio, match=rf"nan\.wav: {reason}"):
        read_segment(path, 0.5, 0.2, 1000)
    assert not read_segment(path, 0, 0.5, 1000).any()


@pytest.mark.parametrize("rate", [RATE, 48000])
def test_a_cut_flac_is_named_where_it_ends(kinds, tmp_path, rate):
    """What is left of it is read as it was."""
    content, whole = kinds["24.flac"].read_bytes(), decoded(kinds["24.flac"])
    path = tmp_path / "cut.flac"
    path.write_bytes(content[: len(content) // 2])
    segment = read_segment(path, 0.2, 0.2, RATE)
    expected = whole.mean(1)[RATE // 5 :][: RATE // 5]
    torch.testing.assert_close(segment, expected, atol=1e-6, rtol=0)
    match = r"cut\.flac: truncated"
    for start in (1.1, 2.0):
        with pytest.raises(UnreadableAudio, match=match):
            read_segment(path, start, 0.4, rate)
    with pytest.raises(UnreadableAudio, match=match):
        measure_levels(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vbr.mp3", "truncated, [0-9]+ of [0-9]+ bytes"),
        ("mp3.mp3", "truncated, [0-9]+ of [0-9]+ bytes"),
        ("aac.m4a", "format not recognised"),
    ],
)
def test_cut_files_that_are_named_at_once(kinds, tmp_path, name, reason):
    path = tmp_path / name
    path.write_bytes(kinds[name].read_bytes()[:-9000])
    assert_unreadable(path, reason)


@pytest.mark.parametrize("name", ["16.wav", "24.aiff", "vorbis.ogg"])
def test_cut_files_of_other_formats_are_shorter(kinds, tmp_path, name):
    content = kinds[name].read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: 3 * len(content) // 4])
    assert RATE / 2 < audio_info(path).num_frames < SECONDS * RATE
    assert_segments_are_slices(path, atol=1e-6)


@pytest.mark.parametrize("extension", ["wav", "mp3", "m4a"])
def test_what_is_no_audio(tmp_path, extension):
    path = tmp_path / f"no audio.{extension}"
    assert_unreadable(path, "[Nn]o such file")
    for content, reason in (
        (b"", "the file is empty"),
        (b"x", "format not recognised|no s"),
        (bytes(5000), "format not recognised|no s"),
        (b"<!DOCTYPE html><html>404</html>", "format not recognised|no s"),
        # a list of files
        (b"ffconcat version 1.0\nfile a.mp3\n", "format not recognised|no s"),
    ):
        path.write_bytes(content)
        assert_unreadable(path, reason)
    path.unlink()
    path.mkdir()
    assert_unreadable(path, "not a regular file")


def test_files_without_samples(kinds, tmp_path):
    # a recorder that was killed
    content, path = kinds["16.wav"].read_bytes(), tmp_path / "zero.wav"
    place = content.index(b"data") + 4
    path.write_bytes(content[:place] + bytes(4) + content[place + 4 :])
    assert_unreadable(path, "no samples, or a header that promises 0")
    path = tmp_path / "silent.mp4"
    with av.open(path, "w") as file:
        stream = file.add_stream("mpeg4", 25)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        file.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        file.mux(stream.encode(None))
    assert_unreadable(path, "no sound")


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
