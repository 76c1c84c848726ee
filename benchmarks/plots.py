"""How the training step benchmark grows, in a table and in pictures.

Colours follow the candidate, so that both pictures agree; they are those of
Okabe and Ito, which colour-blind readers can tell apart, grey, wine and indigo.
"""

import numpy as np
from common import exponent, table
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#000000", "#f0e442", "#999999", "#882255", "#332288"),
)
MARKERS = "osD^vPX*<>h"
# lines that lie on one another are told apart
LINES = ("-", "--", ":")
QUANTITIES = ("time of a step", "extra memory")
UNITS = ("ms", "MB")
PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")


def _plain_log(axis):
    """Ticks at 1, 2, 5, 10, ... as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=30))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(PLAIN)


def _short(value):
    """A ratio with no more digits than tell something."""
    return f"{value:.{2 if value < 1 else 1 if value < 10 else 0}f}"


def growth_figure(results):
    """Time and memory against the length of the segments, both logarithmic.

    Arguments
    ---------
    results : dict
        Candidate -> list of (seconds of audio, ms a step, MB).

    Returns
    -------
    matplotlib.figure.Figure
        Two panels; the legend has the fitted exponents, where there is more
        than one length.
    """
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    lengths = sorted({point[0] for one in results.values() for point in one})
    for column, axis in enumerate(figure.subplots(1, 2), start=1):
        for number, (name, points) in enumerate(results.items()):
            x = [point[0] for point in points]
            y = [point[column] for point in points]
            power = f", length^{exponent(x, y):.2f}" if len(x) > 1 else ""
            axis.loglog(
                *(x, y),
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle=LINES[number % len(LINES)],
                label=f"{name}{power}",
            )
        axis.set_xticks(lengths, [f"{length:g}" for length in lengths])
        axis.xaxis.set_minor_locator(NullLocator())
        _plain_log(axis.yaxis)
        axis.set_xlabel("length of a segment, s")
        axis.set_title(f"{QUANTITIES[column - 1]}, {UNITS[column - 1]}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        # below, where no line can be
        axis.legend(
            *axis.get_legend_handles_labels(),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=2,
            columnspacing=1.0,
            fontsize=8,
            frameon=False,
        )
    return figure


def ratio_figure(results, reference):
    """How many times the time and memory of a reference the others take.

    Arguments
    ---------
    results : dict
        As for ``growth_figure``.
    reference : str
        The candidate that counts as one.

    Returns
    -------
    matplotlib.figure.Figure or None
        A panel for time and one for memory; None where there is no reference
        or nothing beside it.
    """
    ones = {point[0]: point for point in results.get(reference, ())}
    others = {
        name: [point for point in points if point[0] in ones]
        for name, points in results.items()
        if name != reference
    }
    others = {name: points for name, points in others.items() if points}
    if not others:
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    names, lengths = list(results), sorted(ones)
    width = 0.9 / len(others)
    # of each length, centred, those that there are
    place = {}
    for number, length in enumerate(lengths):
        there = [
            name
            for name, points in others.items()
            if any(point[0] == length for point in points)
        ]
        for i, name in enumerate(there):
            middle = (len(there) - 1) / 2
            place[name, length] = number + (i - middle) * width
    for column, axis in enumerate(figure.subplots(1, 2), start=1):
        for name, points in others.items():
            x = [place[name, point[0]] for point in points]
            ratio = [point[column] / ones[point[0]][column] for point in points]
            colour = COLOURS[names.index(name) % len(COLOURS)]
            # from one, so that what costs less points down
            bars = axis.bar(
                *(x, np.subtract(ratio, 1), 0.9 * width),
                bottom=1,
                color=colour,
                label=name,
            )
            labels = [_short(value) for value in ratio]
            axis.bar_label(bars, labels, fontsize=7, padding=2)
        axis.set_yscale("log")
        _plain_log(axis.yaxis)
        low, high = axis.get_ylim()
        axis.set_ylim(low / 1.2, high * 1.3)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(lengths)), [f"{x:g} s" for x in lengths])
        axis.set_title(QUANTITIES[column - 1])
        axis.set_ylabel(f"times that of {reference}")
        axis.spines[["top", "right"]].set_visible(False)
    # above, where no bar can be
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=min(4, len(others)),
        fontsize=8,
        frameon=False,
    )
    return figure


def growth(results):
    """How times and memory of each candidate grow with the length.

    Arguments
    ---------
    results : dict
        Candidate -> list of (seconds of audio, ms a step, MB).
    """
    rows = []
    for name, points in results.items():
        if len(points) > 1:
            lengths, times, memory = zip(*points)
            rows.append(
                [
                    name,
                    " ".join(f"{length:g}" for length in lengths),
                    f"{exponent(lengths, times):.2f}",
                    f"{exponent(lengths, memory):.2f}",
                ]
            )
    header = [
        "candidate",
        "lengths, s",
        "step time grows as length to the power of",
        "extra memory to the power of",
    ]
    return ["## Growth", table(header, rows)] if rows else []


def draw(results, reference, output):
    """Writes the two pictures beside the record; lines that show them."""
    figures = {"growth": growth_figure(results)}
    figures["ratios"] = ratio_figure(results, reference)
    shown = []
    for name, figure in figures.items():
        if figure is not None:
            path = output.with_name(f"{output.stem}_{name}.png")
            figure.savefig(path, dpi=80)  # as small as it stays readable
            shown.append(f"![{name}]({path.name})")
    return shown
