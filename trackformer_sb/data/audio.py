"""Audio files: segments at any rate as mono, or the whole in blocks.

Of a file no more is read than a segment needs. All reading goes through
libsndfile (the `soundfile` package), so every function here takes any file
whose ending is in `AUDIO_EXTENSIONS`.
"""

import math
import os
import stat
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

# Lossless formats first: where a track exists in two formats, the first wins.
AUDIO_EXTENSIONS = (".wav", ".flac", ".aiff", ".aif", ".ogg", ".opus", ".mp3")

# torchaudio's equivalent of resampy's "kaiser_best": pass band up to 0.948 of
# the lower Nyquist frequency. Its default (6 zero crossings) is audibly dull.
FILTER_WIDTH = 64
FILTER_ROLLOFF = 0.9475937167399596
FILTER_BETA = 14.769656459379492

# libsndfile reports this length when a header gives none (a streamed FLAC).
UNKNOWN_FRAMES = 2**63 - 1

# A constant-rate mp3 without a Xing header has only an estimated length, up to
# a frame of 1152 samples too long.
MP3_SLACK = 2 * 1152

# An mp3 frame borrows bits of earlier ones, so the first frames decoded after a
# seek may be wrong (by 0.24 at 32 kbit/s, measured). Ten frames before the
# segment are decoded as well and dropped; eight were enough in every trial.
MP3_LEAD = 10 * 1152

# Within the last page of an Ogg file libsndfile (1.2.2) seeks up to 432 samples
# off, in 36 of 59 files tried. A page has at most 255 packets, a Vorbis packet
# at most 1024 samples: reading on from before that is right.
OGG_LAST_PAGE = 255 * 1024

LARGEST_SAMPLE = 1e30  # of float files; sums of larger ones would be infinite

# libsndfile calls an .mp3 without one mp3 frame "not a regular file".
NO_MP3_FRAME = 7


class UnreadableAudio(RuntimeError):
    """An audio file that cannot be used; the message names file and reason.

    Attributes
    ----------
    path : str
        The file, where it is a single one.
    """

    path = ""


class AudioInfo(NamedTuple):
    """What the header of an audio file says.

    Arguments
    ---------
    sample_rate : int
        Sampling rate in Hz.
    num_frames : int
        Length in samples per channel.
    channels : int
        Number of channels.
    duration : float
        Length in seconds.
    """

    sample_rate: int
    num_frames: int
    channels: int
    duration: float


def audio_info(path):
    """Reads the header of an audio file.

    Arguments
    ---------
    path : str or Path
        The audio file.

    Returns
    -------
    AudioInfo
        Rate, length and channels. Nothing is decoded: a damaged body shows
        itself only in `read_segment`.

    Raises
    ------
    UnreadableAudio
        If the file cannot be opened or seeked, is no audio, does not say its
        length, or says that it holds no samples.

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
        return AudioInfo(
            audio.samplerate,
            audio.frames,
            audio.channels,
            audio.frames / audio.samplerate,
        )


def read_segment(
    path, start, duration, sample_rate, num_samples=None, channel="mean"
):
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
        Length of the segment in seconds.
    sample_rate : int
        Rate of the result in Hz.
    num_samples : int, optional
        Length of the result in samples; default round(duration * sample_rate).
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
        in the segment, or gives fewer samples than libsndfile says it has.

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
    if num_samples is None:
        num_samples = round(duration * sample_rate)
    if start < 0 or num_samples < 1:
        raise ValueError(
            "expected start >= 0 s and at least one sample, got "
            f"start={start}, {num_samples} samples of {path}"
        )
    first = round(start * sample_rate)
    with open_audio(path) as audio:
        if audio.samplerate == sample_rate:
            sig = _read_frames(audio, path, first, num_samples, channel)
        else:
            what = audio, path, first, num_samples, sample_rate, channel
            sig = _read_resampled(*what)
    return torch.nn.functional.pad(sig, (0, num_samples - sig.shape[-1]))


def _read_resampled(audio, path, first, count, sample_rate, channel):
    """Samples `first` to `first + count` of the file at another rate."""
    # The two grids meet every in_step frames of the file = out_step samples.
    common = math.gcd(audio.samplerate, sample_rate)
    in_step, out_step = audio.samplerate // common, sample_rate // common
    cutoff = min(in_step, out_step) * FILTER_ROLLOFF
    context = math.ceil(FILTER_WIDTH * in_step / cutoff) + 1
    blocks = max(0, first // out_step - math.ceil(context / in_step))
    begin = blocks * in_step
    end = math.ceil((first + count) * in_step / out_step) + context
    frames = _read_frames(audio, path, begin, end - begin, channel)
    if frames.shape[-1] == 0:
        return frames
    sig = resample(
        frames,
        in_step,
        out_step,
        lowpass_filter_width=FILTER_WIDTH,
        rolloff=FILTER_ROLLOFF,
        resampling_method="sinc_interp_kaiser",
        beta=FILTER_BETA,
    )
    offset = first - blocks * out_step
    return sig[..., offset : offset + count]


def _read_frames(audio, path, first, count, channel):
    """Up to `count` frames from `first` on; fewer at the file's end."""
    available = min(count, audio.frames - first)
    if available <= 0:
        return torch.zeros(2, 0) if channel == "both" else torch.zeros(0)
    lead = first - _seekable(audio, first)
    audio.seek(first - lead)
    frames = audio.read(lead + available, dtype="float32", always_2d=True)
    frames = frames[lead:]
    _check_decoded(audio, path, first, available, frames)
    frames = torch.from_numpy(frames)
    if channel == "both":
        return frames.T if audio.channels == 2 else frames.mean(1).expand(2, -1)
    if audio.channels == 1 or (audio.channels == 2 and channel == "left"):
        return frames[:, 0]
    if audio.channels == 2 and channel == "right":
        return frames[:, 1]
    return frames.mean(dim=1)


def _seekable(audio, first):
    """The frame at or before `first` from which decoding gives it right."""
    if audio.format == "MP3":
        return max(0, first - MP3_LEAD)
    if audio.format == "OGG":
        return max(0, min(first, audio.frames - OGG_LAST_PAGE))
    return first


@contextmanager
def open_audio(path):
    """Opens an audio file; whatever libsndfile raises comes as UnreadableAudio.

    Arguments
    ---------
    path : str or Path
        The audio file.

    Yields
    ------
    soundfile.SoundFile
        The file at its first sample, with a length that is known and not 0.

    Raises
    ------
    UnreadableAudio
        As `audio_info`; also where the caller's reading fails.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/ramp.wav"
    ...     soundfile.write(path, torch.arange(4).numpy() / 4, 44100)
    ...     with open_audio(path) as audio:
    ...         audio.read(3).tolist()
    [0.0, 0.25, 0.5]
    """
    # As bytes, a POSIX path need not be valid UTF-8.
    name = os.fsencode(path) if os.name == "posix" else os.fspath(path)
    try:
        # Opening a named pipe waits until somebody writes to it.
        mode = os.stat(name).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise _unreadable(path, "not a regular file")
        audio = soundfile.SoundFile(name)
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(path, _reason(path, error)) from error
    with audio:
        if audio.frames == UNKNOWN_FRAMES:
            raise _unreadable(path, "the header does not say its length")
        if audio.frames == 0:
            raise _unreadable(path, "no samples, or a header that promises 0")
        if not audio.seekable():
            raise _unreadable(path, f"no seeking in {audio.subtype} samples")
        try:
            yield audio
        except soundfile.SoundFileError as error:
            words = f"truncated or damaged, {_words(error)}"
            raise _unreadable(path, words) from error


def read_blocks(audio, path, num_frames):
    """Decodes an open file from beginning to end, block by block.

    Arguments
    ---------
    audio : soundfile.SoundFile
        What `open_audio` gave, not read from yet. It cannot seek afterwards.
    path : str or Path
        The file, for messages.
    num_frames : int
        Length of a block in samples per channel; the last one is shorter.

    Yields
    ------
    numpy.ndarray
        float32 [time, channels].

    Raises
    ------
    UnreadableAudio
        As `read_segment`.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/song.wav"
    ...     soundfile.write(path, torch.zeros(100, 2).numpy(), 44100)
    ...     with open_audio(path) as audio:
    ...         [block.shape for block in read_blocks(audio, path, 64)]
    [(64, 2), (36, 2)]
    """
    # soundfile seeks to where it is after every read, and the first frames of
    # an mp3 after a seek are wrong: see MP3_LEAD.
    audio.seekable = lambda: False
    for first in range(0, audio.frames, num_frames):
        count = min(num_frames, audio.frames - first)
        block = audio.read(count, dtype="float32", always_2d=True)
        _check_decoded(audio, path, first, count, block)
        yield block


def _check_decoded(audio, path, first, count, frames):
    """Refuses what was read from `first` on if it is short or not finite."""
    seconds = f"after {first / audio.samplerate:.3f} s"
    certain = audio.frames - (MP3_SLACK if audio.format == "MP3" else 0)
    if len(frames) < min(count, certain - first):
        words = f"truncated, {len(frames)} of {count} samples {seconds}"
        raise _unreadable(path, words)
    peak = np.abs(frames).max(initial=0.0)  # NaN if there is one
    if not np.isfinite(peak):
        raise _unreadable(path, f"NaN or infinite samples {seconds}")
    if peak > LARGEST_SAMPLE:
        raise _unreadable(path, f"samples beyond {LARGEST_SAMPLE:g} {seconds}")


def _unreadable(path, reason):
    # One argument: the error must survive pickling in a DataLoader worker.
    error = UnreadableAudio(f"{os.fspath(path)}: {reason}")
    error.path = os.fspath(path)
    return error


def _reason(path, error):
    """Why libsndfile refused a file, in words that say what to do."""
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                return "the file is empty"
    except OSError as os_error:
        return os_error.strerror or str(os_error)
    return _words(error)


def _words(error):
    # FLAC decoding errors come with a number and no words; when several threads
    # open files, libsndfile loses the number as well (soundfile says 0).
    code = getattr(error, "code", 0)
    if code == NO_MP3_FRAME:
        return "format not recognised, no mp3 frame in it"
    words = error.error_string.strip() if code else ""
    return words or f"libsndfile error {code}"
