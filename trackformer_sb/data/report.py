"""What is in a folder of music, in words and pictures."""

from collections import defaultdict

from trackformer_sb.data.levels import (
    WINDOWS_PER_SECOND,
    active_share,
    segment_level,
    sum_levels,
)
from trackformer_sb.data.songs import skipped_table


def report_text(report):
    """The tables of a data report.

    Arguments
    ---------
    report : dict
        What ``Music.prepare`` returned.

    Returns
    -------
    str
        Lines of songs, hours and segments, rates, channels, stems, and what
        was left out and why.

    Example
    -------
    >>> split = {"songs": 2, "hours": 0.1, "segments": 120}
    >>> report = {"splits": {"train": split}, "stems": {"bass": 2}}
    >>> report.update(sample_rates={"44100": 2}, channels={"1": 2})
    >>> report.update(skipped=[{"file": "a", "reason": "empty"}])
    >>> report.update(segments_left_out=3)
    >>> print(report_text(report))
    split    songs     hours  segments
    train        2      0.10       120
    files    2 of 44100 Hz; 2 of 1 channel(s)
    stems    bass 2
    segments left out 3; files and songs: 1 left out
        1  empty, first a
    """
    lines = ["split    songs     hours  segments"]
    for name, part in report["splits"].items():
        lines.append(
            f"{name:5s} {part['songs']:8d} {part['hours']:9.2f} "
            f"{part['segments']:9d}"
        )
    rates = ", ".join(
        f"{n} of {r} Hz" for r, n in report["sample_rates"].items()
    )
    kinds = ", ".join(f"{n} of {c}" for c, n in report["channels"].items())
    lines.append(f"files    {rates}; {kinds} channel(s)")
    if report["stems"]:
        stems = ", ".join(f"{name} {n}" for name, n in report["stems"].items())
        lines.append(f"stems    {stems}")
    table = skipped_table(report["skipped"])
    left_out = report["segments_left_out"]
    lines.append(f"segments left out {left_out}; files and songs: {table}")
    return "\n".join(lines)


def song_level(song, levels):
    """RMS level of a song.

    Arguments
    ---------
    song : Song
        The song.
    levels : dict
        Path -> codes of ``levels.measure_levels``, of its mixture or its files.

    Returns
    -------
    float
        In dBFS; -inf for silence, NaN if a file was not measured.
    """
    paths = [song.mixture] if song.mixture in levels else song.files
    if not paths or any(path not in levels for path in paths):
        return float("nan")
    total = sum_levels([levels[path] for path in paths])
    seconds = len(total) / WINDOWS_PER_SECOND
    return segment_level(total, 0, seconds) if seconds else float("-inf")


def stem_activity(songs, levels):
    """For how much of its time each stem sounds.

    Arguments
    ---------
    songs : iterable of Song
        Those without stems, and stems that were not measured, are left out.
    levels : dict
        Path -> codes of ``levels.measure_levels``.

    Returns
    -------
    dict
        Name of a stem -> its shares of windows above -60 dBFS, one a song; the
        names of the most songs first.

    Example
    -------
    >>> import numpy as np
    >>> from trackformer_sb.data.songs import Song
    >>> codes = np.array([0, 0, 0, 160], "uint8")
    >>> song = Song("song", {"drums": ("a.wav",)}, True, seconds=0.4)
    >>> stem_activity([song], {"a.wav": codes})
    {'drums': [0.25]}
    """
    activity = defaultdict(list)
    for song in songs:
        for name, paths in song.tracks.items():
            if song.has_stems and all(path in levels for path in paths):
                track = sum_levels([levels[path] for path in paths])
                # a stem that ends before its song is silent to the end
                seconds = len(track) / WINDOWS_PER_SECOND
                share = active_share(track, 0, max(song.seconds, seconds))
                activity[name].append(share)
    names = sorted(activity, key=lambda name: (-len(activity[name]), name))
    return {name: activity[name] for name in names}


def draw_songs(songs, levels, folder):
    """Draws durations.png, levels.png and activity.png.

    Arguments
    ---------
    songs : dict
        Split -> list of Song with their lengths.
    levels : dict
        Path -> codes of ``levels.measure_levels``; may be empty.
    folder : Path
        Where they go.

    Returns
    -------
    list of Path
        Those that have something to show.
    """
    # Imported here: matplotlib is slow to import.
    from trackformer_sb import plots

    minutes = {
        split: [song.seconds / 60 for song in part]
        for split, part in songs.items()
    }
    figures = {
        "durations.png": plots.songs_figure(
            minutes, "Lengths of the songs", "minutes", log=True
        )
    }
    loudness = {
        split: [song_level(song, levels) for song in part]
        for split, part in songs.items()
    }
    if any(abs(x) < float("inf") for part in loudness.values() for x in part):
        figures["levels.png"] = plots.songs_figure(
            loudness, "RMS levels of the songs", "dBFS"
        )
    everything = [song for part in songs.values() for song in part]
    if activity := stem_activity(everything, levels):
        figures["activity.png"] = plots.activity_figure(activity)
    for name, figure in figures.items():
        plots.save_figure(figure, folder / name)
    return [folder / name for name in figures]
