"""Small spectrograms of files of any length, as pictures."""

import matplotlib.image
import numpy as np
import soundfile

N_FFT = 4096
COLUMNS = 1000
BANDS = 96
LOWEST_HZ = 40.0

# Pictures show this range below the loudest point of the mixture, in dB.
RANGE_DB = 70.0

# Windows that a column averages at most: a long file costs no more.
WINDOWS = 4


def band_edges(sample_rate):
    """Frequencies between the bands, evenly spaced on a logarithmic scale.

    Arguments
    ---------
    sample_rate : int
        In Hz.

    Returns
    -------
    numpy.ndarray
        [bands + 1] in Hz, ascending up to half the sample rate.

    Example
    -------
    >>> band_edges(44100)[[0, -1]].round().tolist()
    [40.0, 22050.0]
    """
    highest = sample_rate / 2
    return np.geomspace(min(LOWEST_HZ, highest / 2), highest, BANDS + 1)


def _band_bins(sample_rate):
    """First bin and bin after the last of each band, at least one."""
    bins = band_edges(sample_rate) * N_FFT / sample_rate
    first = np.minimum(np.round(bins[:-1]).astype(int), N_FFT // 2)
    return first, np.maximum(np.round(bins[1:]).astype(int), first + 1)


def spectrogram(path):
    """Power of a file over time and frequency, in few numbers.

    The file is read piece by piece: memory does not depend on its length.
    Channels are averaged in power, so that none hides another.

    Arguments
    ---------
    path : str or Path
        Audio file that can be sought in.

    Returns
    -------
    numpy.ndarray
        [bands, columns], low frequencies first, as mean power of a bin; at
        most 96 x 1000 values.

    Example
    -------
    >>> import tempfile
    >>> tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     soundfile.write(f"{folder}/tone.wav", tone, 16000)
    ...     power = spectrogram(f"{folder}/tone.wav")
    >>> loudest = power.sum(1).argmax()
    >>> band_edges(16000)[[loudest, loudest + 1]].round().tolist()
    [982.0, 1038.0]
    """
    window = np.hanning(N_FFT + 1)[:-1, None]
    with soundfile.SoundFile(path) as reader:
        frames = max(reader.frames, 1)
        columns = min(COLUMNS, -(-frames * 4 // N_FFT))
        first, last = _band_bins(reader.samplerate)
        edges = np.linspace(0, frames, columns + 1)
        power = np.zeros((BANDS, columns))
        for column in range(columns):
            width = edges[column + 1] - edges[column]
            count = int(np.clip(np.ceil(width / N_FFT), 1, WINDOWS))
            for i in range(count):
                centre = edges[column] + (i + 0.5) * width / count
                sig = _window_at(reader, round(centre))
                bins = np.abs(np.fft.rfft(sig * window, axis=0)) ** 2
                total = np.cumsum(np.append(0, bins.mean(1)))
                power[:, column] += (total[last] - total[first]) / (
                    (last - first) * count
                )
    return power


def _window_at(reader, centre):
    """Samples around a position, zeros beyond the ends of the file."""
    start = centre - N_FFT // 2
    reader.seek(min(max(start, 0), reader.frames))
    sig = reader.read(N_FFT + min(start, 0), always_2d=True)
    before = max(-start, 0)
    return np.pad(sig, ((before, N_FFT - before - len(sig)), (0, 0)))


def save_picture(power, loudest, path):
    """Writes a spectrogram as a picture without axes, high frequencies on top.

    Arguments
    ---------
    power : numpy.ndarray
        [bands, columns].
    loudest : float
        Power of the brightest colour; the same for all that is compared.
    path : str or Path
        A .png file.

    Example
    -------
    >>> import io
    >>> file = io.BytesIO()
    >>> save_picture(np.eye(2), 1.0, file)
    >>> _ = file.seek(0)
    >>> [int(x) for x in matplotlib.image.imread(file)[1, 0] * 255]
    [251, 252, 191, 255]
    """
    floor = 10 ** (-RANGE_DB / 10)
    relative = power / loudest if loudest > 0 else np.zeros_like(power)
    matplotlib.image.imsave(
        path,
        10 * np.log10(np.maximum(relative, floor)),
        vmin=-RANGE_DB,
        vmax=0.0,
        cmap="magma",
        origin="lower",
        format="png",
    )
