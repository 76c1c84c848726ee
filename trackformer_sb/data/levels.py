"""How loud a file is from moment to moment, and how far it is distorted.

A file is decoded once. What is kept of it, one byte for a tenth of a second,
tells which segments are silent, how loud they are, and whether two files are
the same recording, without decoding anything again.
"""

import base64
import math
from typing import NamedTuple

import numpy as np

from trackformer_sb.data.audio import open_audio, read_blocks

WINDOWS_PER_SECOND = 10

# A code is a level in half decibels above the floor; 255 is +27.5 dBFS, which
# only files of floating-point samples can reach.
FLOOR_DB = -100.0
CODES_PER_DB = 2
POWERS = 10 ** ((FLOOR_DB + np.arange(256) / CODES_PER_DB) / 10)
POWERS[0] = 0.0

# The largest 16-bit sample. Three of them in a row are a wave cut off: a sine
# of 0.999 stays below, and of a full one only below 40 Hz (at 44.1 kHz) is the
# crest that long.
FULL_SCALE = 1 - 2**-15
CLIPPED_RUN = 3


class AudioLevels(NamedTuple):
    """What an audio file contains, as far as its level tells.

    Arguments
    ---------
    codes : numpy.ndarray
        uint8 [windows]: RMS level of the mean of the channels in windows of
        0.1 s, in half decibels above -100 dBFS, rounded; 0 is that or less.
        What the last window lacks counts as silence.
    peak : float
        Largest absolute sample of any channel; 1 is full scale.
    dc_offset : float
        Absolute mean of the samples of a channel, the largest of all channels.
    clipped_share : float
        Share, 0 to 1, of samples in runs of at least three equal ones at full
        scale. Of 8-bit and lossy files, whose clipped samples are not that
        large or not equal, it says nothing.

    Example
    -------
    >>> levels = AudioLevels(np.array([80, 0], "uint8"), 0.002, 0.0, 0.0)
    >>> levels.decibels
    array([ -60., -100.], dtype=float32)
    """

    codes: np.ndarray
    peak: float
    dc_offset: float
    clipped_share: float

    @property
    def decibels(self):
        """RMS level of the windows in dBFS, float32 [windows]."""
        return FLOOR_DB + self.codes.astype(np.float32) / CODES_PER_DB

    def to_text(self):
        """All of it as a line of ASCII text, for a cache.

        Returns
        -------
        str
            The three numbers, and the codes in base64.

        Example
        -------
        >>> levels = AudioLevels(np.array([80, 0], "uint8"), 0.002, 0.0, 0.0)
        >>> levels.to_text()
        '0.002 0.0 0.0 UAA='
        >>> AudioLevels.from_text("0.002 0.0 0.0 UAA=").codes
        array([80,  0], dtype=uint8)
        """
        numbers = " ".join(repr(float(number)) for number in self[1:])
        codes = base64.b64encode(np.asarray(self.codes, np.uint8).tobytes())
        return f"{numbers} {codes.decode('ascii')}"

    @classmethod
    def from_text(cls, text):
        """Reads what `to_text` wrote.

        Arguments
        ---------
        text : str
            The text.

        Returns
        -------
        AudioLevels
            Equal to what was written, bit for bit.

        Raises
        ------
        ValueError
            If the text is something else.
        """
        try:
            *numbers, codes = text.split(" ")
            codes = base64.b64decode(codes, validate=True)
            return cls(np.frombuffer(codes, np.uint8), *map(float, numbers))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"expected levels as written by to_text, got {text[:60]!r} "
                f"({len(text)} characters)"
            ) from error


def measure_levels(path):
    """Decodes a file from beginning to end, a second at a time.

    Arguments
    ---------
    path : str or Path
        The audio file.

    Returns
    -------
    AudioLevels
        Its levels and distortions.

    Raises
    ------
    UnreadableAudio
        If the file cannot be opened, does not say its length, holds NaN or
        infinite samples, or is damaged, cut or shorter than its header
        promises.

    Example
    -------
    >>> import tempfile, soundfile
    >>> sine = np.sin(2 * np.pi * 440 * np.arange(4410) / 44100)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/sine.wav"
    ...     soundfile.write(path, np.append(0.5 * sine, 0 * sine), 44100)
    ...     levels = measure_levels(path)
    >>> levels.decibels, round(levels.peak, 3)
    (array([  -9., -100.], dtype=float32), 0.5)
    """
    with open_audio(path) as audio:
        edges = np.arange(WINDOWS_PER_SECOND + 1) * audio.samplerate
        edges //= WINDOWS_PER_SECOND
        # below 10 Hz some windows have no sample, and take the one before
        sizes = np.maximum(1, np.diff(edges))
        mean_squares = []
        sums = np.zeros(audio.channels)
        peak, clipped, done = 0.0, 0, 0
        tail = np.zeros((audio.channels, CLIPPED_RUN), np.float32)
        for block in read_blocks(audio, path, audio.samplerate):
            if not len(block):
                break
            sig = np.ascontiguousarray(block.T)  # [channels, time]
            squares = np.square(sig.mean(axis=0, dtype=np.float64))
            starts = edges[:-1][edges[:-1] < len(block)]
            sum_squares = np.add.reduceat(squares, starts)
            mean_squares.append(sum_squares / sizes[: len(starts)])
            largest = float(max(sig.max(), -sig.min()))
            if max(largest, np.abs(tail).max()) >= FULL_SCALE:
                clipped += _clipped_samples(tail, sig)
            tail = np.concatenate([tail, sig], axis=1)[:, -CLIPPED_RUN:]
            peak = max(peak, largest)
            sums += sig.sum(axis=1, dtype=np.float64)
            done += len(block)
    return AudioLevels(
        _codes(np.concatenate(mean_squares)),
        peak,
        float(np.abs(sums).max() / done),
        clipped / (done * len(sums)),
    )


def _clipped_samples(tail, sig):
    """How many samples of clipped runs `sig` adds to the three before it."""
    sig = np.concatenate([tail, sig], axis=1)
    equal = (sig[:, 1:] == sig[:, :-1]) & (np.abs(sig[:, 1:]) >= FULL_SCALE)
    triple = equal[:, 1:] & equal[:, :-1]
    # a run of n samples holds n - 2 triples
    begins = triple[:, 1:] & ~triple[:, :-1]
    return int(triple[:, 1:].sum() + (CLIPPED_RUN - 1) * begins.sum())


def _codes(power):
    """Mean squares as codes."""
    decibels = 10 * np.log10(np.maximum(power, 1e-15))
    codes = np.rint((decibels - FLOOR_DB) * CODES_PER_DB)
    return codes.clip(0, 255).astype(np.uint8)


def sum_levels(several):
    """The levels of files that are summed, as the tracks of a song are.

    Arguments
    ---------
    several : sequence of AudioLevels
        At least one; shorter ones are silent at their end.

    Returns
    -------
    AudioLevels
        Of each window the sum of the powers, which is that of the sum if the
        files are not correlated. Peak and DC offset are upper bounds, the
        clipped share is the largest.

    Raises
    ------
    ValueError
        If there are none.

    Example
    -------
    >>> drums = AudioLevels(np.array([160, 160], "uint8"), 0.3, 0.0, 0.0)
    >>> voice = AudioLevels(np.array([160], "uint8"), 0.2, 0.0, 0.0)
    >>> sum_levels([drums, voice]).decibels
    array([-17., -20.], dtype=float32)
    """
    if not several:
        raise ValueError("expected levels of at least one file, got none")
    if len(several) == 1:
        return several[0]
    power = np.zeros(max(len(levels.codes) for levels in several))
    for levels in several:
        power[: len(levels.codes)] += POWERS[levels.codes]
    return AudioLevels(
        _codes(power),
        sum(levels.peak for levels in several),
        sum(levels.dc_offset for levels in several),
        max(levels.clipped_share for levels in several),
    )


def active_share(levels, start, duration, threshold_db=-60.0):
    """Share of a segment's windows that are louder than a threshold.

    Arguments
    ---------
    levels : AudioLevels
        Of the file.
    start : float
        Beginning of the segment in seconds, from 0.
    duration : float
        Length of the segment in seconds.
    threshold_db : float
        In dBFS RMS.

    Returns
    -------
    float
        In [0, 1]. A window of which the segment holds a part counts as one, and
        past the end of the file all are silent.

    Raises
    ------
    ValueError
        If `start` is negative or `duration` is not positive.

    Example
    -------
    >>> codes = np.array([0, 0, 120, 130], "uint8")
    >>> active_share(AudioLevels(codes, 0.1, 0.0, 0.0), 0.1, 0.3)
    0.6666666666666666
    """
    codes, num_windows = _segment(levels, start, duration)
    active = codes / CODES_PER_DB + FLOOR_DB > threshold_db
    return int(np.count_nonzero(active)) / num_windows


def segment_level(levels, start, duration):
    """RMS level of a segment from its windows.

    Arguments
    ---------
    levels : AudioLevels
        Of the file.
    start : float
        Beginning of the segment in seconds, from 0.
    duration : float
        Length of the segment in seconds.

    Returns
    -------
    float
        In dBFS, right within 0.25 dB; -inf for silence.

    Raises
    ------
    ValueError
        If `start` is negative or `duration` is not positive.

    Example
    -------
    >>> levels = AudioLevels(np.array([160, 0], "uint8"), 0.1, 0.0, 0.0)
    >>> segment_level(levels, 0, 0.1), round(segment_level(levels, 0, 0.2), 2)
    (-20.0, -23.01)
    """
    codes, num_windows = _segment(levels, start, duration)
    power = float(POWERS[codes].sum()) / num_windows
    return 10 * float(np.log10(power)) if power else float("-inf")


def _segment(levels, start, duration):
    """The codes of a segment, and how many windows it has."""
    if not (start >= 0 and duration > 0):
        raise ValueError(
            "expected start >= 0 s and duration > 0 s, got "
            f"start={start}, duration={duration}"
        )
    # 0.3 s is 2.9999999999999996 windows of 0.1 s
    first = math.floor(start * WINDOWS_PER_SECOND + 1e-6)
    end = math.ceil((start + duration) * WINDOWS_PER_SECOND - 1e-6)
    end = max(end, first + 1)
    return levels.codes[first:end], end - first
