"""All figures: separations, reconstructions and training curves.

Made without pyplot, which keeps every figure and may want a display.
"""

import os
from itertools import chain, pairwise

import matplotlib.image
import numpy as np
import soundfile
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Of a spectrogram. Windows are averaged in a column, at most so many.
ROWS = 120
COLUMNS = 600
WINDOWS = 8
WINDOW_SECONDS = 0.046
LOWEST_HZ = 40.0
BLOCK_FRAMES = 2**18  # of a file that are read at once
TICKS_HZ = {100: "100", 1000: "1k", 10000: "10k"}

# Spectrograms show this range below the loudest point of the mixture.
RANGE_DB = 70.0

# Panels of the training curves: title, unit, keys of the history.
CURVES = (
    ("Loss", "MixIT + regularizers", ("train_loss", "valid_loss")),
    (
        "Separation",
        "dB",
        (
            *("train_mixture_si_snr", "valid_mixture_si_snr"),
            *("valid_si_snri", "valid_si_snri_grouped"),
        ),
    ),
    ("Mask overlap", "cosine", ("valid_mask_overlap",)),
    ("Effective mask count", "masks", ("valid_effective_mask_count",)),
)
PRETRAINING_CURVES = (
    ("Reconstruction", "mean squared error", ("train_loss", "valid_loss")),
    ("Explained variance", "share", ("valid_explained_variance",)),
)


def save_figure(figure, path):
    """Writes a figure as PNG, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)


# --- spectrograms ------------------------------------------------------------


def band_edges(sample_rate):
    """Logarithmic frequencies between the rows of a spectrogram, [121] in Hz.

    From 40 Hz, or less at low rates, to half of the rate.
    """
    lowest = min(LOWEST_HZ, sample_rate / 200)
    return np.geomspace(lowest, sample_rate / 2, ROWS + 1)


def spectrogram(blocks, frames, sample_rate):
    """The power of a signal of any length in a few bands and columns.

    ``blocks`` yields [time, channels], in all so many ``frames``. Channels are
    averaged in power, so that none hides another. Returns the mean power of a
    bin in logarithmic bands, [120, at most 600], where a sine of amplitude 1
    has 1/2 in a band of one bin, and the mean square of all samples.

    Example
    -------
    >>> sine = np.sin(np.arange(8000) * 2 * np.pi * 1000 / 8000)
    >>> power, mean_square = spectrogram([sine[:, None]], 8000, 8000)
    >>> row = power.sum(1).argmax()
    >>> bool(abs(band_edges(8000)[row] - 1000) < 8000 / 512)  # of a bin
    True
    >>> round(mean_square, 3)
    0.5
    """
    n_fft = max(64, 2 ** round(np.log2(WINDOW_SECONDS * sample_rate)))
    window = np.hanning(n_fft + 1)[:-1, None]
    bins = band_edges(sample_rate) * n_fft / sample_rate
    # each band has one bin at least, if only the nearest
    first = np.minimum(np.round(bins[:-1]).astype(int), n_fft // 2)
    last = np.maximum(np.round(bins[1:]).astype(int), first + 1)
    columns = max(1, min(COLUMNS, 4 * frames // n_fft))
    edges = np.arange(columns + 1) * frames // columns
    power, energy = np.zeros((ROWS, columns)), 0.0
    for column, piece in enumerate(_pieces(blocks, edges, n_fft)):
        width = len(piece) - n_fft
        inside = piece[n_fft // 2 :][:width]
        energy += float(np.square(inside, dtype=float).mean(1).sum())
        count = int(np.clip(2 * width // n_fft, 1, WINDOWS))
        starts = (np.arange(count) + 0.5) * width / count
        windows = [piece[start:][:n_fft] for start in starts.astype(int)]
        spectrum = np.abs(np.fft.rfft(windows * window, axis=1)) ** 2
        total = np.append(0, spectrum.mean((0, 2)).cumsum())
        power[:, column] = (total[last] - total[first]) / (last - first)
    return power * 2 / window.sum() ** 2, energy / frames


def file_spectrogram(path):
    """The ``spectrogram`` of a file that libsndfile reads."""
    with soundfile.SoundFile(os.fsencode(path)) as file:
        blocks = file.blocks(BLOCK_FRAMES, dtype="float32", always_2d=True)
        return spectrogram(blocks, file.frames, file.samplerate)


def _pieces(blocks, edges, n_fft):
    """The samples from each edge to the next, and half a window around."""
    blocks = iter(blocks)
    block = next(blocks)
    silence = np.zeros_like(block, shape=(n_fft, block.shape[1]))
    blocks = chain([block], blocks, [silence])
    held, position = silence[: n_fft // 2], 0
    for first, last in pairwise(edges):
        while position + len(held) < last + n_fft:
            held = np.concatenate([held, next(blocks)])
        held, position = held[first - position :], first
        yield held[: last - first + n_fft]


def decibels(power, loudest):
    """Power in dB below the loudest, at least -70."""
    relative = power / loudest if loudest > 0 else np.zeros_like(power)
    return 10 * np.log10(np.maximum(relative, 10 ** (-RANGE_DB / 10)))


def save_spectrogram(power, loudest, path):
    """Writes a spectrogram as PNG without axes, a pixel a value.

    The brightest colour is the power `loudest`, the same for all that is
    compared; low frequencies are at the bottom.
    """
    matplotlib.image.imsave(
        path,
        decibels(power, loudest),
        vmin=-RANGE_DB,
        vmax=0.0,
        cmap="magma",
        origin="lower",
        format="png",
    )


# --- separations -------------------------------------------------------------


def _show(axis, image, seconds, title, top=None, **style):
    """Draws [rows, columns] over time, low rows at the bottom."""
    axis.set_title(title, loc="left", fontsize=9, pad=3, parse_math=False)
    return axis.imshow(
        image,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, seconds, 0, len(image) if top is None else top),
        **style,
    )


def separation_figure(columns, seconds, sample_rate, masks=(), count=()):
    """Spectrograms of a mixture, of what is in it, and the masks.

    Each of the ``columns`` is a dict: name -> what ``spectrogram`` returned;
    the first of the first one is the mixture. ``masks``, [sources, channels,
    frames] in [0, 1], are one more column; ``count``, how many instruments
    sound over time, is drawn below the first. All spectrograms have the same
    colours, in dB below the loudest point of the mixture.

    Example
    -------
    >>> power = np.ones((120, 5))
    >>> figure = separation_figure(
    ...     [{"mixture": (power, 0.5), "drums": (power / 2, 0.25)}],
    ...     seconds=3.0,
    ...     sample_rate=8000,
    ... )
    >>> [axis.get_title(loc="left") for axis in figure.axes[:2]]
    ['mixture', 'drums: -3.0 dB of the mixture']
    """
    counts = [len(column) for column in columns]
    counts[0] += len(count) > 0
    if len(masks):
        counts.append(len(masks))
    figure = Figure(
        figsize=(max(10, 5 * len(counts)), 1.3 * max(counts) + 0.8),
        layout="constrained",
    )
    axes = figure.subplots(
        max(counts), len(counts), sharex=True, squeeze=False
    ).T
    mixture, total = next(iter(columns[0].values()))
    edges = band_edges(sample_rate)
    ticks = [hertz for hertz in TICKS_HZ if edges[0] <= hertz < edges[-1]]
    rows = ROWS * np.log(np.array(ticks) / edges[0])
    rows = rows / np.log(edges[-1] / edges[0])
    style = {"vmin": -RANGE_DB, "vmax": 0, "cmap": "magma"}
    for column, column_axes in zip(columns, axes):
        for axis, (name, (power, level)) in zip(column_axes, column.items()):
            title = name.encode("utf-8", "replace").decode()
            if power is not mixture and level and total:
                relative = 10 * np.log10(level / total)
                title += f": {relative:.1f} dB of the mixture"
            elif power is not mixture:
                title += ": silent"
            image = decibels(power, mixture.max())
            shown = _show(axis, image, seconds, title, **style)
            axis.set_yticks(rows, [TICKS_HZ[x] for x in ticks], fontsize=8)
    figure.colorbar(
        shown,
        ax=axes[: len(columns)],
        label="dB, the peak of the mixture is 0",
        fraction=0.03,
        aspect=40,
        pad=0.01,
    )
    axes[0, 0].set_ylabel("Hz", fontsize=9)
    if len(count):
        axis = axes[0, counts[0] - 1]
        axis.set_title("instruments", loc="left", fontsize=9, pad=3)
        axis.stairs(count, np.linspace(0, seconds, len(count) + 1))
        axis.set_ylim(bottom=0)
    for number, (axis, mask) in enumerate(zip(axes[-1], masks)):
        shown = _show(axis, mask, seconds, f"mask {number}", vmin=0, vmax=1)
    if len(masks):
        axes[-1, 0].set_ylabel("channel", fontsize=9)
        figure.colorbar(shown, ax=axes[-1], label="mask", fraction=0.05)
    for count, column_axes in zip(counts, axes):
        for axis in column_axes[count:]:
            axis.set_axis_off()
        column_axes[count - 1].tick_params(labelbottom=True)
        column_axes[count - 1].set_xlabel("time in seconds")
    return figure


def item_figure(mix, est_source, est_mask, stems, names, sample_rate):
    """A mixture, its stems, the outputs of a model and its masks.

    Tensors of a training: `mix` [time], `est_source` [sources, time],
    `est_mask` [sources, channels, frames], and `stems` [stems, time], with no
    rows where stems are not known. See ``separation_figure``.
    """

    def drawn(sig):
        return spectrogram([_array(sig)[:, None]], len(sig), sample_rate)

    known = {f"stem {name}": drawn(x) for name, x in zip(names, stems)}
    outputs = {f"output {i}": drawn(x) for i, x in enumerate(est_source)}
    return separation_figure(
        [{"mixture": drawn(mix), **known}, outputs],
        len(mix) / sample_rate,
        sample_rate,
        _array(est_mask),
    )


def reconstruction_figure(target, prediction, hidden, sample_rate, hop_length):
    """What a masked autoencoder saw, rebuilt, and missed.

    Tensors of a training, all [frames, channels]: `target` and `prediction`,
    normalised, and `hidden`, boolean. Target, its visible part, reconstruction
    and error are drawn one below another.
    """
    target, prediction = _array(target).T, _array(prediction).T
    hidden = _array(hidden).T > 0
    figure = Figure(figsize=(11, 10), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True, sharey=True)
    seconds = target.shape[1] * hop_length / sample_rate
    rebuilt = np.where(hidden, prediction, target)
    low, high = np.quantile(target, (0.01, 0.99))
    khz = sample_rate / 2000
    style = {"vmin": low, "vmax": high, "cmap": "magma"}
    for axis, title, image in (
        (axes[0], "target", target),
        (axes[1], "visible", np.where(hidden, np.nan, target)),
        (axes[2], "visible, and rebuilt where hidden", rebuilt),
    ):
        shown = _show(axis, image, seconds, title, khz, **style)
        axis.set(ylabel="kHz", facecolor="lightgrey")
    figure.colorbar(shown, ax=axes[:3], label="normalised log-magnitude")
    error = np.abs(rebuilt - target)
    title = "absolute error"
    shown = _show(axes[3], error, seconds, title, khz, vmin=0, vmax=2)
    axes[3].set(ylabel="kHz", xlabel="time in seconds")
    figure.colorbar(shown, ax=axes[3])
    return figure


def _array(x):
    """A tensor of a training as a numpy array."""
    return x.detach().float().cpu().numpy()


# --- curves ------------------------------------------------------------------


def training_curves(history, panels=CURVES):
    """Losses and measures of a ``TrainingHistory`` over the epochs.

    Each of the `panels`, two a row, is a title, a unit, and keys of the
    history.
    """
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 3.25 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flat
    for axis, (title, unit, names) in zip(axes, panels):
        for name in names:
            epochs, values = history.series(name)
            if epochs:
                axis.plot(epochs, values, marker="o", ms=3, label=name)
        axis.set(title=title, xlabel="epoch", ylabel=unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
        else:
            axis.text(0.5, 0.5, "not measured", ha="center", va="center")
    return figure
