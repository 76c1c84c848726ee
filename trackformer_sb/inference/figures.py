"""A picture of a separation: spectrograms, and which output plays when."""

from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FuncFormatter

# Of the picture of a spectrogram.
COLUMNS = 600
ROWS = 120
LOWEST_HZ = 40.0

# More windows in a column would not be seen.
WINDOWS_PER_COLUMN = 8

# Range of the colours, in dB.
RANGE = 80.0
ACTIVITY_RANGE = 60.0

TICKS = {100: "100", 1000: "1k", 10000: "10k"}
MAX_TITLE = 80


def frequency_bands(sample_rate, n_fft, rows=ROWS):
    """Weights that sum the bins of a spectrum into logarithmic bands.

    Arguments
    ---------
    sample_rate : int
        In Hz.
    n_fft : int
        Length of the transform in samples.
    rows : int
        Number of bands.

    Returns
    -------
    bands : numpy.ndarray
        [rows, n_fft // 2 + 1]: each row averages the bins of its band, or
        takes the nearest one where a band is narrower than a bin.
    edges : numpy.ndarray
        [rows + 1] in Hz, from 40 Hz (or less at low rates) to half of the rate.

    Example
    -------
    >>> bands, edges = frequency_bands(8000, 256, rows=3)
    >>> [round(float(edge)) for edge in edges]
    [40, 186, 862, 4000]
    >>> np.count_nonzero(bands, axis=1).tolist()
    [4, 22, 101]
    """
    highest = sample_rate / 2
    edges = np.geomspace(min(LOWEST_HZ, highest / 100), highest, rows + 1)
    frequencies = np.fft.rfftfreq(n_fft, 1 / sample_rate)
    # the last band includes its upper edge
    edge_bins = np.searchsorted(frequencies, edges)
    edge_bins[-1] = len(frequencies)
    bands = np.zeros((rows, len(frequencies)), np.float32)
    for row, (first, last) in enumerate(pairwise(edge_bins)):
        if first == last:
            center = np.sqrt(edges[row] * edges[row + 1])
            first = np.abs(frequencies - center).argmin()
            last = first + 1
        bands[row, first:last] = 1 / (last - first)
    return bands, edges


def pooled_spectrogram(blocks, frames, sample_rate, columns=COLUMNS):
    """The power of a long signal in a few bands and columns.

    Arguments
    ---------
    blocks : iterable of numpy.ndarray
        [time, channels] each; never more than one is held.
    frames : int
        Samples of all of them.
    sample_rate : int
        In Hz.
    columns : int
        Number of columns at most; fewer for a very short signal.

    Returns
    -------
    power : numpy.ndarray
        [120, columns]: mean power in logarithmic bands, where a sine of
        amplitude 1 has 1/2 in a band of one bin.
    mean_square : numpy.ndarray
        [columns]: that of all samples of the column.

    Example
    -------
    >>> sine = np.sin(np.arange(8000) * 2 * np.pi * 1000 / 8000)
    >>> power, mean_square = pooled_spectrogram([sine[:, None]], 8000, 8000, 4)
    >>> _, edges = frequency_bands(8000, 256)
    >>> row = power[:, 1].argmax()
    >>> bool(edges[row] <= 1000 <= edges[row + 1])
    True
    >>> [round(float(x), 3) for x in mean_square]
    [0.5, 0.5, 0.5, 0.5]
    """
    # about 46 ms
    n_fft = max(64, 2 ** round(np.log2(0.046 * sample_rate)))
    columns = max(1, min(columns, 2 * frames // n_fft))
    hop = max(n_fft // 2, frames // (columns * WINDOWS_PER_COLUMN))
    window = np.hanning(n_fft + 1)[:-1].astype(np.float32)
    bands, _ = frequency_bands(sample_rate, n_fft)
    power = np.zeros((columns, len(bands)))
    count = np.zeros(columns)
    square = np.zeros(columns)

    def add(windows, starts):
        """Adds the spectra of windows [window, channels, time]."""
        spectrum = np.abs(np.fft.rfft(windows * window)) ** 2
        spectrum = spectrum.mean(1) * 2 / window.sum() ** 2
        column = np.minimum(
            (starts + n_fft // 2) * columns // frames, columns - 1
        )
        np.add.at(power, column, spectrum @ bands.T)
        np.add.at(count, column, 1)

    position, ahead, held = 0, 0, None
    for block in blocks:
        samples = np.arange(position, position + len(block))
        square += np.bincount(
            samples * columns // frames,
            weights=np.square(block, dtype=np.float64).mean(1),
            minlength=columns,
        )
        position += len(block)
        held = block if held is None else np.concatenate([held, block])
        # where the next window begins, in what is held
        starts = np.arange(ahead, len(held) - n_fft + 1, hop)
        if len(starts):
            views = np.lib.stride_tricks.sliding_window_view(held, n_fft, 0)
            add(views[starts], position - len(held) + starts)
            ahead = starts[-1] + hop
        dropped = min(ahead, len(held))
        held, ahead = held[dropped:], ahead - dropped
    if not count.any():  # shorter than a window
        held = np.pad(held, ((0, n_fft - len(held)), (0, 0)))
        add(held.T[None], np.zeros(1, int))
    samples = np.diff(-(-np.arange(columns + 1) * frames // columns))
    power = power / np.maximum(count, 1)[:, None]
    return power.T, square / samples


def save_figure(path, mixture, outputs, frames, sample_rate, title, comment=""):
    """Draws the mixture and its outputs.

    Arguments
    ---------
    path : str or Path
        The PNG to write.
    mixture : callable
        Returns an iterable of [time, channels], the blocks of the mixture.
    outputs : dict
        Name -> the same of an output.
    frames : int
        Samples of each of them.
    sample_rate : int
        In Hz.
    title : str
        Above the picture.
    comment : str
        Text that the file carries.
    """
    spectrograms, levels = {}, {}
    for name, blocks in {"mixture": mixture, **outputs}.items():
        spectrograms[name], levels[name] = pooled_spectrogram(
            blocks(), frames, sample_rate
        )
    figure = separation_figure(
        spectrograms, levels, frames / sample_rate, sample_rate, title
    )
    metadata = {"Comment": comment} if comment else None
    figure.savefig(path, format="png", dpi=100, metadata=metadata)


def separation_figure(spectrograms, levels, seconds, sample_rate, title):
    """Spectrograms of a mixture and its outputs above their levels.

    Arguments
    ---------
    spectrograms : dict
        Name -> power [bands, columns]; the mixture first.
    levels : dict
        Name -> mean squares [columns], of the same names.
    seconds : float
        Length of the file.
    sample_rate : int
        In Hz.
    title : str
        Above the picture.

    Returns
    -------
    matplotlib.figure.Figure
        A row for the mixture, one for each output, and one with the levels of
        the outputs over time. All spectrograms have the same colours, in dB
        below the loudest point of the mixture.

    Example
    -------
    >>> power, square = np.ones((120, 5)), np.full(5, 0.25)
    >>> figure = separation_figure(
    ...     {"mixture": 2 * power, "source0": power},
    ...     {"mixture": 2 * square, "source0": square},
    ...     seconds=3.0,
    ...     sample_rate=8000,
    ...     title="song",
    ... )
    >>> figure.axes[1].get_title(loc="left")
    'source0: -3.0 dB of the mixture'
    """
    names = list(spectrograms)
    outputs = names[1:]
    heights = [1.5] + [1.2] * len(outputs)
    if outputs:
        heights.append(0.4 + 0.25 * len(outputs))
    figure = Figure(
        figsize=(10, sum(heights) + 0.3 * len(heights) + 0.5),
        layout="constrained",
    )
    axes = figure.subplots(
        len(heights),
        1,
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )[:, 0]
    figure.suptitle(_drawable(title), parse_math=False)
    loudest = max(float(spectrograms[names[0]].max()), 1e-20)
    total = float(np.mean(levels[names[0]]))
    for axis, name in zip(axes, names):
        image = axis.imshow(
            _decibels(spectrograms[name] / loudest),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            extent=(0, seconds, 0, ROWS),
            vmin=-RANGE,
            vmax=0,
            cmap="magma",
        )
        _frequency_ticks(axis, sample_rate)
        label = name
        if name in outputs:
            label = f"{name}: {_share(np.mean(levels[name]), total)}"
        axis.set_title(label, loc="left", fontsize=9, pad=3)
    axes[0].set_ylabel("Hz", fontsize=9)
    figure.colorbar(
        image,
        ax=axes[: len(names)],
        label="dB, the peak of the mixture is 0",
        fraction=0.03,
        aspect=40,
        pad=0.01,
    )
    if outputs:
        image = axes[-1].imshow(
            _decibels(np.stack([levels[name] for name in outputs])),
            aspect="auto",
            interpolation="nearest",
            extent=(0, seconds, len(outputs), 0),
            vmin=-ACTIVITY_RANGE,
            vmax=0,
            cmap="viridis",
        )
        axes[-1].set_yticks(np.arange(len(outputs)) + 0.5, outputs, fontsize=8)
        axes[-1].set_title("activity", loc="left", fontsize=9, pad=3)
        figure.colorbar(
            image, ax=axes[-1], label="dBFS", fraction=0.03, pad=0.01
        )
    axes[-1].set_xlabel("time in seconds")
    if seconds >= 120:
        axes[-1].set_xlabel("time in minutes")
        axes[-1].xaxis.set_major_formatter(FuncFormatter(_minutes))
    return figure


def _decibels(power):
    return 10 * np.log10(np.maximum(power, 1e-20))


def _share(power, total):
    """The level of an output against that of the mixture."""
    if power <= 0 or total <= 0:
        return "silent"
    return f"{10 * np.log10(power / total):.1f} dB of the mixture"


def _minutes(seconds, _):
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def _frequency_ticks(axis, sample_rate):
    """Marks decades on an axis of logarithmic bands."""
    _, edges = frequency_bands(sample_rate, 64)
    shown = [hertz for hertz in TICKS if edges[0] <= hertz < edges[-1]]
    rows = ROWS * np.log(np.array(shown) / edges[0])
    rows = rows / np.log(edges[-1] / edges[0])
    axis.set_yticks(rows, [TICKS[hertz] for hertz in shown], fontsize=8)


def _drawable(text):
    """A name on one line, in letters that the font has."""
    known = get_font(findfont(FontProperties())).get_charmap()
    text = "".join(
        letter if ord(letter) in known and letter.isprintable() else "▯"
        for letter in text
    )
    return text if len(text) <= MAX_TITLE else text[: MAX_TITLE - 1] + "…"
