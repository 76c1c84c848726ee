"""Audio files: segments at any rate as mono, or the whole in blocks.

Of a file no more is read than a segment needs. libsndfile (the `soundfile`
package) reads what it decodes exactly, FFmpeg (PyAV) all else, so every
function here takes any file whose ending is in `AUDIO_EXTENSIONS`.
"""

import math
import os
from contextlib import contextmanager
from typing import NamedTuple

import av
import numpy as np
import soundfile
import soxr
import torch

from trackformer_sb.ffmpeg import FFmpegFile

# Where a track exists in two formats the first wins: lossless ones, others,
# films.
FILM_EXTENSIONS = tuple(
    ".mp4 .m4v .mov .mkv .webm .avi .wmv .asf .flv .f4v .mpg .mpeg .vob .ts "
    ".mts .m2ts .3gp".split()
)
AUDIO_EXTENSIONS = (
    *".wav .wave .flac .aiff .aif .aifc .w64 .caf .au .ape .wv".split(),
    *".tta .tak .dsf .ogg .oga .spx .opus .mp3 .mp2 .m2a .m4a .m4b".split(),
    *".f4a .aac .wma .ac3 .eac3 .dts .mpc .mka .amr .voc".split(),
    *FILM_EXTENSIONS,
)

# Other music by its ending, and what would help.
_CONVERT = "a format that is not read, convert it to wav or flac"
UNREAD_MUSIC = {
    **dict.fromkeys(
        ".mid .midi .kar".split(),
        "notes without sound, trackformer make-music plays them",
    ),
    **dict.fromkeys(
        ".m4p .aax".split(), "protected, only a copy without protection is read"
    ),
    ".wvc": "corrections of the .wv file beside it, which is read without",
    **dict.fromkeys(".ra .rm .dff .shn .mod .xm .it .s3m".split(), _CONVERT),
}

# libsndfile reports this length when a header gives none (a streamed FLAC).
UNKNOWN_FRAMES = 2**63 - 1

# Within the last page of an Ogg file libsndfile (1.2.2) seeks up to 432 samples
# off, in 36 of 59 files tried. A page has at most 255 packets, a Vorbis packet
# at most 1024 samples: reading on from before that is right.
OGG_LAST_PAGE = 255 * 1024

NO_SAMPLES = "no samples, or a header that promises 0"

# Of soxr, whose filters have lengths of their own: what is read around a
# segment, in samples of the lower rate.
CONTEXT = 512

LARGEST_SAMPLE = 1e30  # of float files; sums of larger ones would be infinite


class UnreadableAudio(RuntimeError):
    """An audio file that cannot be used; the message names file and reason."""

    path = ""  # the file, where it is a single one


class AudioInfo(NamedTuple):
    """Rate in Hz, samples per channel, channels and length in seconds."""

    sample_rate: int
    num_frames: int
    channels: int
    duration: float


def audio_info(path):
    """Reads the header of an audio file.

    Nothing is decoded where the header says the length: a damaged body shows
    itself only in `read_segment`.
    Raises UnreadableAudio as `open_audio`.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/silence.wav"
    ...     soundfile.write(path, torch.zeros(11025, 2).numpy(), 44100)
    ...     audio_info(path)
    AudioInfo(sample_rate=44100, num_frames=11025, channels=2, duration=0.25)
    """
    with open_audio(path) as audio:
        rate, frames = audio.samplerate, audio.frames
        return AudioInfo(rate, frames, audio.channels, frames / rate)


def read_segment(path, start, duration, sample_rate, channel="mean"):
    """Reads a segment at the wanted rate, exactly as long as asked.

    The file is seeked, not loaded. Where its rate differs, some context is read
    on both sides and the segment is cut on the grid on which the two rates
    meet: the result equals the slice of the whole resampled file.

    Arguments
    ---------
    path : str or Path
        The audio file.
    start : float
        Beginning of the segment in seconds, from 0.
    duration : float
        Length of the segment in seconds, rounded to samples.
    sample_rate : int
        Rate of the result in Hz.
    channel : str
        "mean" of all channels, or of a stereo file "left" or "right"; "both":
        as stereo, other files as their mean in both channels.

    Returns
    -------
    torch.Tensor
        float32, [time], with "both" [2, time]. Zeros past the end of the file,
        as a stem may be shorter than its song.

    Raises
    ------
    ValueError
        If `start` is negative or the segment has no samples.
    UnreadableAudio
        If the file cannot be opened or decoded, holds NaN or infinite samples
        in the segment, or gives fewer samples than its header says.

    Example
    -------
    >>> import tempfile
    >>> ramp = torch.arange(8) / 8
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/ramp.wav"
    ...     soundfile.write(path, ramp.numpy(), 4)
    ...     read_segment(path, start=1.5, duration=1.0, sample_rate=4)
    tensor([0.7500, 0.8750, 0.0000, 0.0000])
    """
    num_samples = round(duration * sample_rate)
    if start < 0 or num_samples < 1:
        raise ValueError(
            "expected start >= 0 s and at least one sample, got "
            f"start={start}, {num_samples} samples of {path}"
        )
    first = round(start * sample_rate)
    with open_audio(path, counted=False) as audio:
        if audio.samplerate == sample_rate:
            sig = _read_frames(audio, first, num_samples, channel)
        else:
            what = first, num_samples, sample_rate, channel
            sig = _read_resampled(audio, *what)
    return torch.nn.functional.pad(sig, (0, num_samples - sig.shape[-1]))


def _read_resampled(audio, first, count, sample_rate, channel):
    """Samples `first` to `first + count` of the file at another rate."""
    # The two grids meet every in_step frames of the file = out_step samples.
    common = math.gcd(audio.samplerate, sample_rate)
    in_step, out_step = audio.samplerate // common, sample_rate // common
    context = math.ceil(CONTEXT * max(1, in_step / out_step))
    blocks = max(0, (first * in_step // out_step - context) // in_step)
    begin = blocks * in_step
    end = math.ceil((first + count) * in_step / out_step) + context
    frames = _read_frames(audio, begin, end - begin, channel)
    sig = resample(frames, audio.samplerate, sample_rate)
    offset = first - blocks * out_step
    return sig[..., offset : offset + count]


def resample(sig, sample_rate, new_rate):
    """Resamples by soxr at its highest quality: any rates, in little memory.

    [..., time] -> [..., ceil(time * new_rate / sample_rate)], float32, on the
    CPU.

    Example
    -------
    >>> resample(torch.zeros(2, 44101), 44101, 44100).shape
    torch.Size([2, 44100])
    """
    if sample_rate == new_rate or not sig.numel():
        return sig
    count = -(-sig.shape[-1] * new_rate // sample_rate)
    channels = sig.reshape(-1, sig.shape[-1]).T.contiguous().numpy()
    new = soxr.resample(channels, sample_rate, new_rate, "VHQ").T[:, :count]
    new = np.pad(new, ((0, 0), (0, count - new.shape[1])))
    return torch.from_numpy(new).reshape(*sig.shape[:-1], count)


def _read_frames(audio, first, count, channel):
    """Up to `count` frames from `first` on; fewer at the file's end."""
    # counting what FFmpeg reads would decode all of it
    counted = isinstance(audio, soundfile.SoundFile)
    available = min(count, audio.frames - first) if counted else count
    if available <= 0:
        return torch.zeros(2, 0) if channel == "both" else torch.zeros(0)
    begin = first  # or where decoding gives it right
    if audio.format == "OGG":
        begin = max(0, min(first, audio.frames - OGG_LAST_PAGE))
    frames = decode(audio, begin, first - begin + available)[first - begin :]
    if first == 0 and not len(frames):
        raise _unreadable(name_of(audio), NO_SAMPLES)
    _check_decoded(audio, first, available if counted else 0, frames)
    frames = torch.from_numpy(frames)
    if channel == "both":
        return frames.T if audio.channels == 2 else frames.mean(1).expand(2, -1)
    if audio.channels == 1 or (audio.channels == 2 and channel == "left"):
        return frames[:, 0]
    if audio.channels == 2 and channel == "right":
        return frames[:, 1]
    return frames.mean(dim=1)


def decode(audio, first, count):
    """Samples of an open file, float32 [time, channels], fewer at its end.

    They begin at ``first``, with None where the last ones ended.
    """
    with naming(name_of(audio), "truncated or damaged, "):
        if first is not None:
            audio.seek(first)
        return audio.read(count, dtype="float32", always_2d=True)


@contextmanager
def open_audio(path, counted=True):
    """Opens an audio file at its beginning, by libsndfile or by FFmpeg.

    Its length is known, and not 0, if it is to be `counted`. Raises
    UnreadableAudio if it cannot be opened or is no audio.
    """
    # Opening a named pipe waits until somebody writes to it.
    if os.path.exists(path) and not os.path.isfile(path):
        raise _unreadable(path, "not a regular file")
    with naming(path):
        if os.path.getsize(path) == 0:
            raise _unreadable(path, "the file is empty")
        audio = _open_exact(path)
        counted = counted or isinstance(audio, soundfile.SoundFile)
        if counted and audio.frames == 0:
            audio.close()
            raise _unreadable(path, NO_SAMPLES)
    with audio:
        yield audio


def _open_exact(path):
    """By libsndfile if it knows the length and gives it, else by FFmpeg."""
    if os.fspath(path).lower().endswith(".mp3"):
        return FFmpegFile(path)  # libsndfile estimates lengths of it
    # As bytes, a POSIX path need not be valid UTF-8.
    name = os.fsencode(path) if os.name == "posix" else os.fspath(path)
    try:
        audio = soundfile.SoundFile(name)
    except soundfile.SoundFileError:
        return FFmpegFile(path)
    exact = audio.frames != UNKNOWN_FRAMES and audio.seekable()
    # Vorbis has an order of channels of its own, an mp3 may be in a wav, and in
    # Opus files of many seconds libsndfile (1.2.2) finds errors that are none
    exact = exact and not (audio.format == "OGG" and audio.channels > 2)
    if exact and not audio.subtype.startswith(("MPEG", "OPUS")):
        return audio
    audio.close()
    return FFmpegFile(path)


def read_on(audio, num_frames):
    """The next samples of an open file, at most so many, fewer at its end.

    ``audio`` is what `open_audio` gave; it cannot seek afterwards. Returns
    float32 [time, channels]; raises UnreadableAudio as `read_segment`.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/song.wav"
    ...     soundfile.write(path, torch.zeros(100, 2).numpy(), 44100)
    ...     with open_audio(path) as audio:
    ...         [read_on(audio, 64).shape for _ in range(3)]
    [(64, 2), (36, 2), (0, 2)]
    """
    # soundfile seeks to where it is after every read: see OGG_LAST_PAGE
    audio.seekable = lambda: False
    first = audio.tell()
    count = min(num_frames, audio.frames - first)
    block = decode(audio, None, count)
    _check_decoded(audio, first, count, block)
    return block


def name_of(audio):
    """The name of an open file, for messages."""
    name = audio.name
    return os.fsdecode(name) if isinstance(name, bytes) else str(name)


def _check_decoded(audio, first, count, frames):
    """Refuses what was read from `first` on if it is short or not finite."""
    seconds = f"after {first / audio.samplerate:.3f} s"
    peak = np.abs(frames).max(initial=0.0)  # NaN if there is one
    if len(frames) < count:
        words = f"truncated, {len(frames)} of {count} samples {seconds}"
    elif not np.isfinite(peak):
        words = f"NaN or infinite samples {seconds}"
    elif peak > LARGEST_SAMPLE:
        words = f"samples beyond {LARGEST_SAMPLE:g} {seconds}"
    else:
        return
    raise _unreadable(name_of(audio), words)


@contextmanager
def naming(path, what=""):
    """Says of what the libraries or the system refuse which file it is."""
    try:
        yield
    except (soundfile.SoundFileError, av.FFmpegError, OSError) as error:
        raise _unreadable(path, what + _words(error)) from error


def _unreadable(path, reason):
    # One argument: the error must survive pickling in a DataLoader worker.
    error = UnreadableAudio(f"{os.fspath(path)}: {reason}")
    error.path = os.fspath(path)
    return error


def _words(error):
    """What is wrong with a file that a library or the system refused."""
    # FLAC decoding errors come with a number and no words; when several threads
    # open files, libsndfile loses the number as well (soundfile says 0).
    if isinstance(error, soundfile.SoundFileError):
        code = getattr(error, "code", 0)
        words = error.error_string.strip() if code else ""
        return words or f"libsndfile error {code}"
    wrong = av.InvalidDataError, av.ArgumentError
    if isinstance(error, wrong) and error.errno:
        return "format not recognised"  # not one of FFmpegFile's own
    return error.strerror
