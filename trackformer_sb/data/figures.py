"""Pictures of a catalogue: how long its songs are, how loud, and what plays."""

import os
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

from trackformer_sb.data.levels import (
    WINDOWS_PER_SECOND,
    active_share,
    segment_level,
    sum_levels,
)

MAX_STEMS = 20
MAX_NAME = 24
COLORS = {"train": "tab:blue", "valid": "tab:orange", "test": "tab:green"}

# Ticks of the lengths in seconds; a library may hold loops and symphonies.
LENGTHS = {
    **{seconds: f"{seconds} s" for seconds in (0.25, 0.5, 1, 2, 4)},
    **{seconds: f"{seconds} s" for seconds in (8, 15, 30)},
    **{60 * minutes: f"{minutes} min" for minutes in (1, 2, 4, 8, 15, 30)},
    **{3600 * hours: f"{hours} h" for hours in (1, 2, 4, 8)},
}
MAX_TICKS = 10


def catalogue_figures(songs, levels, folder):
    """Draws what is in a catalogue.

    Arguments
    ---------
    songs : dict
        Split -> list of Song with their lengths.
    levels : dict
        Path -> AudioLevels, of some files or all; may be empty. Songs and stems
        of which a file is missing here are left out of what needs it.
    folder : str or Path
        Where the pictures go; it is made.

    Returns
    -------
    list of Path
        durations.png (lengths of the songs), levels.png (their RMS levels) and
        activity.png (for how much of its time a stem sounds), less those that
        have nothing to show. A picture is there whole or not at all.

    Example
    -------
    >>> import tempfile
    >>> from trackformer_sb.data.songs import Song
    >>> song = Song("song", {"mixture": ("song.wav",)}, False, seconds=200.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paths = catalogue_figures({"train": [song]}, {}, folder)
    ...     [path.name for path in paths]
    ['durations.png']
    """
    drawn = {"durations.png": durations_figure(songs)}
    loudness = {
        split: [_song_level(song, levels) for song in part]
        for split, part in songs.items()
    }
    if any(level is not None for part in loudness.values() for level in part):
        drawn["levels.png"] = levels_figure(loudness)
    activity = stem_activity(songs, levels)
    if activity:
        drawn["activity.png"] = activity_figure(activity)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        _save(figure, folder / name)
    return [folder / name for name in drawn]


def durations_figure(songs):
    """A histogram of the lengths of songs.

    Arguments
    ---------
    songs : dict
        Split -> list of Song with their lengths.

    Returns
    -------
    matplotlib.figure.Figure
        Splits are stacked; the axis of lengths is logarithmic.

    Example
    -------
    >>> from trackformer_sb.data.songs import Song
    >>> song = Song("song", {}, has_stems=True, seconds=1800.0)
    >>> figure = durations_figure({"train": [song, song], "valid": []})
    >>> figure.axes[0].get_legend().get_texts()[0].get_text()
    'train: 2 songs, 1.0 h'
    """
    figure, axis = _one_axis()
    seconds = {
        split: np.clip(
            [song.seconds for song in part], min(LENGTHS), max(LENGTHS)
        )
        for split, part in songs.items()
    }
    labels = {
        split: f"{_counted(part)}, {sum(s.seconds for s in part) / 3600:.1f} h"
        for split, part in songs.items()
    }
    low, high = _range(seconds, 60.0)
    # at least a factor of two, however alike the songs are
    low, high = min(low, high / 2) / 1.1, high * 1.1
    axis.set_xscale("log")
    _stacked(axis, seconds, labels, np.geomspace(low, high, 41))
    ticks = [tick for tick in LENGTHS if low <= tick <= high]
    ticks = ticks[:: -(-len(ticks) // MAX_TICKS) or 1]
    axis.set_xticks(ticks, [LENGTHS[tick] for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set(title="Lengths of the songs", xlabel="length", ylabel="songs")
    return figure


def levels_figure(loudness):
    """A histogram of the RMS levels of songs.

    Arguments
    ---------
    loudness : dict
        Split -> list of levels in dBFS; -inf for silence, None if not measured.

    Returns
    -------
    matplotlib.figure.Figure
        Splits are stacked; silent songs are counted in the title.

    Example
    -------
    >>> levels = [-20.0, -23.0, float("-inf")]
    >>> levels_figure({"train": levels}).axes[0].get_title()
    'RMS levels of the songs (1 silent song not shown)'
    """
    figure, axis = _one_axis()
    measured = {
        split: np.array([level for level in part if level is not None])
        for split, part in loudness.items()
    }
    shown = {split: x[np.isfinite(x)] for split, x in measured.items()}
    silent = sum(len(measured[split]) - len(x) for split, x in shown.items())
    labels = {
        split: f"{_counted(x)}, median {np.median(x):.1f} dBFS"
        if len(x)
        else _counted(x)
        for split, x in shown.items()
    }
    low, high = _range(shown, -20.0)
    edges = np.arange(np.floor(low) - 2, np.ceil(high) + 3)
    _stacked(axis, shown, labels, edges)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = "RMS levels of the songs"
    if silent:
        title += f" ({silent} silent song{'s' * (silent > 1)} not shown)"
    axis.set(title=title, xlabel="dBFS", ylabel="songs")
    return figure


def stem_activity(songs, levels):
    """For how much of its time each stem sounds.

    Arguments
    ---------
    songs : dict
        Split -> list of Song; those without stems are left out.
    levels : dict
        Path -> AudioLevels.

    Returns
    -------
    dict
        Name of a stem -> its shares of windows above -60 dBFS, one a song; the
        names of the most songs first.

    Example
    -------
    >>> from trackformer_sb.data.levels import AudioLevels
    >>> from trackformer_sb.data.songs import Song
    >>> levels = AudioLevels(np.array([0, 0, 0, 160], "uint8"), 0.1, 0.0, 0.0)
    >>> song = Song("song", {"drums": ("a.wav",)}, True, seconds=0.4)
    >>> stem_activity({"train": [song]}, {"a.wav": levels})
    {'drums': [0.25]}
    """
    activity = defaultdict(list)
    for song in _all(songs):
        for name, paths in song.tracks.items():
            if song.has_stems and all(path in levels for path in paths):
                track = sum_levels([levels[path] for path in paths])
                # a stem that ends before its song is silent to the end
                seconds = max(song.seconds, _seconds(track))
                if seconds:
                    activity[name].append(active_share(track, 0, seconds))
    names = sorted(activity, key=lambda name: (-len(activity[name]), name))
    return {name: activity[name] for name in names}


def activity_figure(activity):
    """Shares of the time that stems sound, over songs.

    Arguments
    ---------
    activity : dict
        Name of a stem -> list of shares, 0 to 1. The first 20 are drawn.

    Returns
    -------
    matplotlib.figure.Figure
        A row a name: the box from the first to the third quartile with the
        median, whiskers to the least and the largest share.

    Example
    -------
    >>> figure = activity_figure({"drums": [0.5, 1.0], "voice": [0.25]})
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['drums (2 songs)', 'voice (1 song)']
    """
    drawn = dict(list(activity.items())[:MAX_STEMS])
    figure, axis = _one_axis(height=1.4 + 0.32 * len(drawn))
    rows = np.arange(len(drawn))
    least, first, median, third, most = 100 * np.array(
        [np.quantile(x, (0, 0.25, 0.5, 0.75, 1)) for x in drawn.values()]
    ).T.reshape(5, -1)
    axis.hlines(rows, least, most, color="tab:blue")
    axis.barh(rows, third - first, 0.6, first, color="lightsteelblue")
    axis.vlines(median, rows - 0.3, rows + 0.3, color="tab:blue", linewidth=3)
    labels = [
        f"{_drawable(name)} ({_counted(shares)})"
        for name, shares in drawn.items()
    ]
    # else a name with two dollar signs would be read as a formula
    axis.set_yticks(rows, labels, parse_math=False)
    title = "Activity of the stems"
    if len(drawn) < len(activity):
        title += f" (the {len(drawn)} most frequent of {len(activity)})"
    axis.set(
        title=title,
        xlabel="% of the length of the song above -60 dBFS",
        xlim=(-2, 102),
        ylim=(len(drawn) - 0.5, -0.5),
    )
    return figure


def _song_level(song, levels):
    """RMS level of a song over its length, or None if it was not measured."""
    paths = [song.mixture] if song.mixture in levels else song.files
    if not paths or any(path not in levels for path in paths):
        return None
    total = sum_levels([levels[path] for path in paths])
    seconds = _seconds(total)
    return segment_level(total, 0, seconds) if seconds else float("-inf")


def _seconds(levels):
    return len(levels.codes) / WINDOWS_PER_SECOND


def _all(by_split):
    return [item for part in by_split.values() for item in part]


def _counted(part):
    return f"{len(part)} song{'s' * (len(part) != 1)}"


def _range(values, default):
    """Least and largest of all splits."""
    joined = np.concatenate([[], *values.values()])
    return (joined.min(), joined.max()) if len(joined) else (default, default)


def _one_axis(height=4.0):
    # not pyplot, which keeps every figure and may want a display
    figure = Figure(figsize=(8, height), layout="constrained")
    axis = figure.subplots()
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    return figure, axis


def _stacked(axis, values, labels, edges):
    """Histograms of the splits on top of each other."""
    if not _all(values):
        axis.text(0.5, 0.5, "no songs", transform=axis.transAxes, ha="center")
        return
    axis.hist(
        list(values.values()),
        bins=edges,
        stacked=True,
        color=[COLORS.get(split, "tab:gray") for split in values],
        label=[f"{split}: {labels[split]}" for split in values],
    )
    axis.margins(y=0.4)  # room for the legend
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.legend()


def _drawable(name):
    """A name on one line, in letters that the font has."""
    known = get_font(findfont(FontProperties())).get_charmap()
    name = "".join(
        letter if ord(letter) in known and letter.isprintable() else "▯"
        for letter in name
    )
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"


def _save(figure, path):
    """Never leaves a part of a picture under its name."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(unfinished, format="png", dpi=110)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
