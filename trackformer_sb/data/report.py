"""What a catalogue sees in a folder of music, in words and pictures."""

from pathlib import Path

from trackformer_sb.data.catalogue import prepare
from trackformer_sb.data.findings import skipped_table
from trackformer_sb.data.headers import FileCache, file_stat
from trackformer_sb.data.manifest import read_songs
from trackformer_sb.data.songs import Song
from trackformer_sb.data.splits import SPLITS


def report_text(report):
    """The tables of a data report.

    Arguments
    ---------
    report : dict
        What ``catalogue.prepare`` returned.

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


def describe(folder, dataset, out_folder, decode=True, **options):
    """Catalogues a folder, and draws how long and how loud its songs are.

    Arguments
    ---------
    folder : str or Path
        The music.
    dataset : str
        See ``catalogue.prepare``.
    out_folder : str or Path
        Where manifests, data_report.json and figures/ go.
    decode : bool
        Whether to decode all files, for levels and activity, and to leave out
        what is found damaged then.
    **options
        Of ``catalogue.prepare``.

    Returns
    -------
    report : dict
        What ``catalogue.prepare`` returned.
    figures : list of Path
        The pictures.

    Raises
    ------
    FileNotFoundError, ValueError
        As ``catalogue.prepare``.
    """
    # Imported here: it needs matplotlib.
    from trackformer_sb.data.figures import catalogue_figures

    options["audio_check"] = "full" if decode else "header"
    report = prepare(folder, dataset, out_folder, **options)
    songs = {
        split: [
            Song(
                line["song"],
                {
                    name: (files,) if isinstance(files, str) else tuple(files)
                    for name, files in line["tracks"].items()
                },
                line["has_stems"],
                line["song_seconds"],
            )
            for line in read_songs(out_folder, split)
        ]
        for split in SPLITS
    }
    levels = {}
    for split, part in songs.items() if decode else ():
        # ``prepare`` has decoded them, into the cache of their folder
        elsewhere = split == "test" and options.get("test_folder")
        key = "test_folder" if elsewhere else "data_folder"
        cache = FileCache(report["settings"][key], options.get("cache_folder"))
        listing = {p: file_stat(p) for song in part for p in song.files}
        levels.update(cache.levels(listing, progress=True))
    figures = catalogue_figures(songs, levels, Path(out_folder) / "figures")
    return report, figures
