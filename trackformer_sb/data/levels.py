"""How loud a file is from moment to moment: a byte for a tenth of a second.

A file is decoded once. Its levels tell which segments are silent and how loud
they are, without decoding anything again.

A code is the RMS level of the mean of the channels in a window of 0.1 s, in
half decibels above -100 dBFS, rounded; 0 is that or less, and what the last
window lacks counts as silence. 255 is +27.5 dBFS, which only files of
floating-point samples can reach.
"""

import math

import numpy as np

from trackformer_sb.data.audio import open_audio, read_blocks

WINDOWS_PER_SECOND = 10
FLOOR_DB = -100.0
CODES_PER_DB = 2
POWERS = 10 ** ((FLOOR_DB + np.arange(256) / CODES_PER_DB) / 10)
POWERS[0] = 0.0


def measure_levels(path):
    """Decodes a file from beginning to end, a second at a time.

    Arguments
    ---------
    path : str or Path
        The audio file.

    Returns
    -------
    numpy.ndarray
        Codes, uint8 [windows].

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
    ...     decibels(measure_levels(path))
    array([  -9., -100.])
    """
    with open_audio(path) as audio:
        edges = np.arange(WINDOWS_PER_SECOND + 1) * audio.samplerate
        edges //= WINDOWS_PER_SECOND
        # below 10 Hz some windows have no sample, and take the one before
        sizes = np.maximum(1, np.diff(edges))
        mean_squares = []
        for block in read_blocks(audio, path, audio.samplerate):
            if not len(block):
                break
            squares = np.square(block.mean(axis=1, dtype=np.float64))
            starts = edges[:-1][edges[:-1] < len(block)]
            sum_squares = np.add.reduceat(squares, starts)
            mean_squares.append(sum_squares / sizes[: len(starts)])
    return _codes(np.concatenate(mean_squares))


def decibels(codes):
    """Codes as levels in dBFS RMS.

    Example
    -------
    >>> decibels(np.array([80, 0], "uint8"))
    array([ -60., -100.])
    """
    return FLOOR_DB + codes / CODES_PER_DB


def sum_levels(several):
    """The levels of files that are summed, as the tracks of a song are.

    Arguments
    ---------
    several : sequence of numpy.ndarray
        Codes of at least one file; shorter ones are silent at their end.

    Returns
    -------
    numpy.ndarray
        Codes, uint8 [windows], of the sum of the powers, which is that of the
        sum if the files are not correlated.

    Example
    -------
    >>> drums, voice = np.array([160, 160], "uint8"), np.array([160], "uint8")
    >>> decibels(sum_levels([drums, voice]))
    array([-17., -20.])
    """
    power = np.zeros(max(map(len, several)))
    for codes in several:
        power[: len(codes)] += POWERS[codes]
    return _codes(power)


def active_share(codes, start, duration, threshold_db=-60.0):
    """Share of a segment's windows that are louder than a threshold.

    Arguments
    ---------
    codes : numpy.ndarray
        Of the file.
    start : float
        Beginning of the segment in seconds, from 0.
    duration : float
        Length of the segment in seconds, above 0.
    threshold_db : float
        In dBFS RMS.

    Returns
    -------
    float
        In [0, 1]. A window of which the segment holds a part counts as one, and
        past the end of the file all are silent.

    Example
    -------
    >>> active_share(np.array([0, 0, 120, 130], "uint8"), 0.1, 0.3)
    0.6666666666666666
    """
    part, num_windows = _segment(codes, start, duration)
    return int(np.count_nonzero(decibels(part) > threshold_db)) / num_windows


def segment_level(codes, start, duration):
    """RMS level of a segment from its windows.

    Arguments
    ---------
    codes : numpy.ndarray
        Of the file.
    start : float
        Beginning of the segment in seconds, from 0.
    duration : float
        Length of the segment in seconds, above 0.

    Returns
    -------
    float
        In dBFS, right within 0.25 dB; -inf for silence.

    Example
    -------
    >>> codes = np.array([160, 0], "uint8")
    >>> segment_level(codes, 0, 0.1), round(segment_level(codes, 0, 0.2), 2)
    (-20.0, -23.01)
    """
    part, num_windows = _segment(codes, start, duration)
    power = float(POWERS[part].sum()) / num_windows
    return 10 * math.log10(power) if power else -math.inf


def _segment(codes, start, duration):
    """The codes of a segment, and how many windows it has."""
    # 0.3 s is 2.9999999999999996 windows of 0.1 s
    first = math.floor(start * WINDOWS_PER_SECOND + 1e-6)
    end = math.ceil((start + duration) * WINDOWS_PER_SECOND - 1e-6)
    end = max(end, first + 1)
    return codes[first:end], end - first


def _codes(power):
    """Mean squares as codes."""
    codes = 10 * np.log10(np.maximum(power, 1e-15)) - FLOOR_DB
    return np.rint(codes * CODES_PER_DB).clip(0, 255).astype(np.uint8)
