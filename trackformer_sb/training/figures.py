"""Pictures of a training and of what it separates."""

import matplotlib
import torch
from matplotlib.figure import Figure

# Spectrograms show this range below their figure's loudest bin, in dB.
RANGE_DB = 70.0

# Curves of the training picture: title, unit, keys of the history.
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
    ("Mask overlap (validation)", "cosine", ("valid_mask_overlap",)),
    (
        "Effective mask count (validation)",
        "masks",
        ("valid_effective_mask_count",),
    ),
)

PRETRAINING_CURVES = (
    (
        "Reconstruction",
        "mean squared error",
        ("train_loss", "valid_loss"),
    ),
    (
        "Explained variance (validation)",
        "share",
        ("valid_explained_variance",),
    ),
)


def training_curves(history, curves=CURVES):
    """Losses and measures over the epochs.

    Arguments
    ---------
    history : TrainingHistory
        What was measured.
    curves : tuple
        Title, unit and keys of the history of each panel.

    Returns
    -------
    matplotlib.figure.Figure
        One panel per kind of measure.
    """
    rows = -(-len(curves) // 2)
    figure = Figure(figsize=(10, 3.25 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flat
    for axis, (title, unit, names) in zip(axes, curves):
        for name in names:
            epochs, values = history.series(name)
            if epochs:
                label = name.replace("valid_", "") if "valid" in title else name
                axis.plot(epochs, values, marker="o", ms=3, label=label)
        axis.set(title=title, xlabel="epoch", ylabel=unit)
        axis.xaxis.set_major_locator(
            matplotlib.ticker.MaxNLocator(integer=True)
        )
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend()
        if not axis.lines:
            axis.text(0.5, 0.5, "not measured", ha="center", va="center")
    return figure


def _spectrogram(sig):
    """Decibels of the magnitude, [freq, frames]."""
    window = torch.hann_window(1024)
    spectrum = torch.stft(
        sig, 1024, 256, window=window, pad_mode="constant", return_complex=True
    )
    return (20 * spectrum.abs().clamp(min=1e-8).log10()).numpy()


def separation_figure(mix, est_source, est_mask, stems, names, sample_rate):
    """A mixture, its stems, the outputs and the masks as pictures.

    Arguments
    ---------
    mix : torch.Tensor
        [time].
    est_source : torch.Tensor
        [sources, time].
    est_mask : torch.Tensor
        [sources, channels, frames].
    stems : torch.Tensor
        [stems, time], with no rows where stems are not known.
    names : list of str
        Names of the stems.
    sample_rate : int
        In Hz.

    Returns
    -------
    matplotlib.figure.Figure
        First row the mixture and the stems, second the outputs with their
        levels, third the masks.
    """
    mix, est_source, est_mask, stems = (
        x.detach().float().cpu() for x in (mix, est_source, est_mask, stems)
    )
    columns = max(len(est_source), len(stems) + 1)
    figure = Figure(figsize=(2.4 * columns + 1.2, 7.5), layout="constrained")
    axes = figure.subplots(3, columns, squeeze=False, sharey="row")
    seconds = len(mix) / sample_rate
    top = min(sample_rate / 2000, 11.0)
    references = _spectrogram(mix)
    peak = float(references.max())
    extent = (0, seconds, 0, sample_rate / 2000)

    def show(axis, image, title, **style):
        drawn = axis.imshow(
            image,
            origin="lower",
            aspect="auto",
            extent=extent,
            interpolation="nearest",
            **style,
        )
        axis.set_title(title, fontsize=9)
        return drawn

    levels = {"vmin": peak - RANGE_DB, "vmax": peak, "cmap": "magma"}
    show(axes[0, 0], references, "mixture", **levels)
    for axis, stem, name in zip(axes[0, 1:], stems, names):
        show(axis, _spectrogram(stem), f"stem: {name}", **levels)
    mix_energy = mix.square().mean().clamp(min=1e-12)
    spectrum = None
    for number, (axis, source) in enumerate(zip(axes[1], est_source)):
        level = 10 * (source.square().mean() / mix_energy + 1e-12).log10()
        spectrum = show(
            axis,
            _spectrogram(source),
            f"output {number} ({float(level):.0f} dB)",
            **levels,
        )
    figure.colorbar(spectrum, ax=axes[:2], label="dB", shrink=0.6)
    mask = None
    for number, (axis, image) in enumerate(zip(axes[2], est_mask.numpy())):
        mask = show(axis, image, f"mask {number}", vmin=0, vmax=1)
    figure.colorbar(mask, ax=axes[2], label="mask")
    for axis in axes.flat:
        axis.set_ylim(0, top)
        if not axis.images:
            axis.set_axis_off()
    for row in axes[:2]:
        row[0].set_ylabel("kHz")
    axes[2, 0].set_ylabel("kHz, or share of channels")
    for axis in axes[2]:
        axis.set_xlabel("s")
    return figure


def reconstruction_figure(target, prediction, hidden, sample_rate, hop_length):
    """What a masked autoencoder saw, rebuilt, and missed.

    Arguments
    ---------
    target, prediction : torch.Tensor
        [frames, channels], normalised.
    hidden : torch.Tensor
        Boolean, [frames, channels].
    sample_rate : int
        In Hz.
    hop_length : int
        Samples between frames.

    Returns
    -------
    matplotlib.figure.Figure
        Target, its visible part, reconstruction and error, one below another.
    """
    target, prediction, hidden = (
        x.detach().cpu() for x in (target, prediction.float(), hidden)
    )
    figure = Figure(figsize=(11, 10), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True, sharey=True)
    # of so many that torch takes them
    some = target.flatten()[:: -(-target.numel() // 2**22)]
    low, high = some.quantile(0.01).item(), some.quantile(0.99).item()
    seconds = len(target) * hop_length / sample_rate
    rebuilt = torch.where(hidden, prediction, target)
    images = (
        ("target", target),
        ("what is visible", target.masked_fill(hidden, torch.nan)),
        ("what is visible, and what was hidden rebuilt", rebuilt),
    )
    style = {
        "origin": "lower",
        "aspect": "auto",
        "extent": (0, seconds, 0, sample_rate / 2000),
        "interpolation": "nearest",
    }
    drawn = None
    for axis, (title, image) in zip(axes, images):
        drawn = axis.imshow(
            image.T.numpy(), vmin=low, vmax=high, cmap="magma", **style
        )
        axis.set(title=title, ylabel="kHz", facecolor="lightgrey")
    figure.colorbar(drawn, ax=axes[:3], label="normalised log-magnitude")
    error = (rebuilt - target).abs().T.numpy()
    drawn = axes[3].imshow(error, vmin=0, vmax=2, cmap="viridis", **style)
    axes[3].set(title="absolute error", ylabel="kHz", xlabel="s")
    figure.colorbar(drawn, ax=axes[3])
    return figure


def save_figure(figure, path):
    """Writes a figure as PNG, making the folder it goes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
