"""A folder of music as manifests, split by song.

A song is a name and its tracks. In a folder of `stems` every folder with audio
files is a song and every file in it an instrument; the sum of the stems is the
song, so a file named mix or mixture beside them is left out. In a folder of
`mixtures` every audio file is a song with the single track "mixture". `demo` is
the built-in demo band, a folder of stems made on the spot. How `moisesdb`,
`musdb18hq` and `slakh2100` lie on disk is in ``layouts``.
"""

import hashlib
import json
import math
import os
from pathlib import Path

from speechbrain.utils.logger import get_logger

from trackformer_sb.data.copies import keep_apart, leave_out_copies
from trackformer_sb.data.findings import Findings
from trackformer_sb.data.headers import FileCache, list_audio
from trackformer_sb.data.library import (
    EXPECTED_IN,
    describe_files,
    fingerprint_files,
    list_songs,
    read_library,
    stat_metadata,
)
from trackformer_sb.data.manifest import write_manifest
from trackformer_sb.data.segments import SegmentFilter, song_lines
from trackformer_sb.data.songs import name_songs, same_files_once
from trackformer_sb.data.splits import (
    MIN_SONGS,
    SPLITS,
    absent_places,
    check_apart,
    make_splits,
    places_of,
    read_split_file,
)

logger = get_logger(__name__)

DATASETS = tuple(EXPECTED_IN)
SPLIT_BY = ("auto", "by_song", "from_file")
AUDIO_CHECKS = ("header", "full")
REPORT = "data_report.json"


def prepare(
    data_folder,
    dataset,
    manifest_folder,
    segment_seconds=3.0,
    segment_hop_seconds=None,
    split_ratio=(80, 10, 10),
    seed=0,
    sample_rate=44100,
    test_folder=None,
    test_dataset=None,
    split="auto",
    split_file=None,
    stem_groups=None,
    max_stems=None,
    audio_check="header",
    min_active_share=0.0,
    min_level_db=None,
    strict=False,
    cache_folder=None,
    demo_songs=60,
    demo_seconds=24.0,
):
    """Writes manifests of train, valid and test, and data_report.json.

    Nothing is written when settings, paths, sizes and times of change are those
    of the last run. Manifests are read by ``manifest.MappedManifest``.

    Arguments
    ---------
    data_folder : str or Path
        Where the music is. With `demo` it may be None: the band is then written
        to `manifest_folder`/demo_band.
    dataset : str
        demo, stems, mixtures, moisesdb, musdb18hq or slakh2100; see the head of
        this module.
    manifest_folder : str or Path
        Where the manifests go.
    segment_seconds : float
        Length of a segment in seconds; shorter songs are skipped.
    segment_hop_seconds : float, optional
        Distance of the starts of two segments; default `segment_seconds`.
    split_ratio : sequence of three numbers
        Parts of train, valid and test; every split gets at least two songs.
    seed : int
        Draws the split. The same songs are always split alike.
    sample_rate : int
        Rate of the demo band in Hz. Other music is resampled on reading.
    test_folder : str or Path, optional
        Music to test on. Then `data_folder` is split into train and valid only,
        by the first two parts of `split_ratio`, less songs that are in both.
    test_dataset : str, optional
        What `test_folder` holds, default stems.
    split : str
        "auto": as the dataset itself says, otherwise as "by_song": at random;
        "from_file": as `split_file` lists.
    split_file : str or Path, optional
        See ``splits.read_split_file``.
    stem_groups : dict, optional
        Group name -> list of patterns of track names, see
        ``layouts.group_stems``.
    max_stems : int, optional
        Songs with more stems, after grouping, are left out.
    audio_check : str
        "header": the headers of files are read, damage shows itself in
        training; "full": files are decoded once, and what is damaged, clipped,
        off centre or a copy in another format is left out.
    min_active_share : float
        Segments of train and valid of which a smaller share sounds are left
        out, in [0, 1]; above 0 all files are decoded once.
    min_level_db : float, optional
        Segments of train and valid below this level, in dBFS RMS, are left
        out; all files are decoded once.
    strict : bool
        Whether the first thing to leave out is an error instead.
    cache_folder : str or Path, optional
        Where headers are kept from run to run, see ``headers.FileCache``.
    demo_songs : int
        Number of songs of the demo band.
    demo_seconds : float
        Length of its songs in seconds.

    Returns
    -------
    dict
        The content of data_report.json: songs, hours and segments of each
        split, rates and stems of the files, what was skipped and why, warnings.

    Raises
    ------
    FileNotFoundError
        If `data_folder`, `test_folder` or `split_file` is not there.
    ValueError
        If an option is unknown, a number is out of range, a folder holds no
        usable song or too few, or a file is in train and test.

    Example
    -------
    >>> import tempfile, numpy, soundfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.mkdir(f"{folder}/songs")
    ...     for i in range(10):
    ...         path = f"{folder}/songs/{i}.wav"
    ...         soundfile.write(path, numpy.full(7 * 100, i / 10), 100)
    ...     report = prepare(f"{folder}/songs", "mixtures", f"{folder}/json")
    >>> {split: report["splits"][split]["segments"] for split in SPLITS}
    {'train': 12, 'valid': 4, 'test': 4}
    """
    if segment_hop_seconds is None:
        segment_hop_seconds = segment_seconds
    test_dataset = test_dataset or "stems"
    for key, value, valid in (
        ("dataset", dataset, DATASETS),
        ("test_dataset", test_dataset, DATASETS[1:]),
        ("split", split, SPLIT_BY),
        ("audio_check", audio_check, AUDIO_CHECKS),
    ):
        if value not in valid:
            raise ValueError(
                f"unknown {key} {value!r}, expected one of {', '.join(valid)}"
            )
    _check(
        split_ratio,
        segment_seconds=segment_seconds,
        segment_hop_seconds=segment_hop_seconds,
        sample_rate=sample_rate,
    )
    if split_file and split != "from_file":
        raise ValueError(
            f"split_file is given, expected split: from_file, got {split!r}"
        )
    segment_filter = SegmentFilter(min_active_share, min_level_db)
    manifest_folder = Path(manifest_folder)
    if dataset == "demo":
        # Imported here: real music does not need the band.
        from trackformer_sb.data.band import make_band

        data_folder = data_folder or manifest_folder / "demo_band"
        make_band(
            data_folder,
            num_songs=demo_songs,
            seconds=demo_seconds,
            sample_rate=sample_rate,
            progress=True,
        )
    sources = {"data_folder": (data_folder, dataset)}
    if test_folder:
        sources["test_folder"] = (test_folder, test_dataset)
        split_ratio = split_ratio[:2]
    settings = {
        **{key: os.path.abspath(sources[key][0] or "") for key in sources},
        "dataset": dataset,
        "test_dataset": test_dataset if test_folder else None,
        "segment_seconds": segment_seconds,
        "segment_hop_seconds": segment_hop_seconds,
        "split_ratio": list(split_ratio),
        "seed": seed,
        "sample_rate": sample_rate,
        "split": split,
        "split_file": _content(split_file) if split == "from_file" else None,
        "stem_groups": stem_groups,
        "max_stems": max_stems,
        "audio_check": audio_check,
        "min_active_share": min_active_share,
        "min_level_db": min_level_db,
        "strict": strict,
    }
    findings = Findings(strict)
    listings = {
        key: list_audio(key, folder, findings, EXPECTED_IN[kind])
        for key, (folder, kind) in sources.items()
    }
    described = [stat_metadata(*source) for source in sources.values()]
    fingerprint = hashlib.sha256(
        json.dumps([settings, listings, described]).encode()
    ).hexdigest()
    report = _last_report(manifest_folder, fingerprint)
    if report is not None:
        logger.info("%s is up to date", manifest_folder)
        return report

    found = {
        key: list_songs(
            key, *source, listings[key], findings, stem_groups, max_stems
        )
        for key, source in sources.items()
    }
    if split == "from_file":
        found["data_folder"] = read_split_file(
            split_file, found["data_folder"], findings.below(data_folder)
        )
    for key in found:
        found[key] = same_files_once(found[key], findings)
    songs = name_songs(found)
    caches = {
        key: FileCache(folder, cache_folder)
        for key, (folder, _) in sources.items()
    }
    libraries = {
        key: read_library(
            f"{key}={folder}",
            songs[key],
            listings[key],
            caches[key],
            segment_seconds,
            findings,
            decode=audio_check == "full" or segment_filter.is_on,
            check=audio_check == "full",
        )
        for key, (folder, _) in sources.items()
    }
    levels = {
        path: value
        for library in libraries.values()
        for path, value in library.levels.items()
    }
    songs = {key: library.songs for key, library in libraries.items()}
    if test_folder:
        check_apart(songs["data_folder"], songs["test_folder"])
    fingerprints = fingerprint_files(libraries, listings, caches)
    known = places_of(_read_report(manifest_folder), settings)
    songs = leave_out_copies(songs, fingerprints, levels, findings, known)
    splits = make_splits(
        songs, sources, split, split_ratio, seed, findings, known
    )
    splits = keep_apart(splits, fingerprints, findings)
    segments, left_out = {}, 0
    for name, part in splits.items():
        segments[name], dropped = song_lines(
            part,
            segment_seconds,
            segment_hop_seconds,
            findings,
            None if name == "test" else segment_filter,
            levels,
        )
        left_out += dropped
        # the filter may leave nothing of a song
        counted = {
            line["song"] for line, numbers in segments[name] if len(numbers)
        }
        splits[name] = [song for song in part if song.name in counted]
    report = {
        "settings": settings,
        "fingerprint": fingerprint,
        "splits": {
            name: {
                "songs": len(part),
                "hours": sum(song.seconds for song in part) / 3600,
                "segments": sum(len(numbers) for _, numbers in segments[name]),
                "song_names": [song.name for song in part],
                "song_paths": [song.path for song in part],
            }
            for name, part in splits.items()
        },
        "absent": absent_places(known, splits),
        "segments_left_out": left_out,
        **describe_files(splits, libraries),
        "skipped": findings.skipped,
        "warnings": findings.warnings,
    }
    _check_segments(report)
    if findings.skipped:
        logger.info("%s", findings.summary())
    _write_manifests(manifest_folder, segments, report)
    return report


def _check_segments(report):
    """Refuses splits that the filter left without two songs."""
    for name, part in report["splits"].items():
        if part["songs"] < MIN_SONGS:
            raise ValueError(
                f"segments of {part['songs']} songs of {name} pass "
                f"min_active_share={report['settings']['min_active_share']} "
                f"and min_level_db={report['settings']['min_level_db']}, "
                f"expected at least {MIN_SONGS} songs"
            )


def _content(path):
    """Hash of a file, or None where it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None


def _check(split_ratio, **positive):
    """Refuses settings that no folder could satisfy."""
    for key, value in positive.items():
        if not value > 0:
            raise ValueError(f"expected {key} > 0, got {value}")
    if len(split_ratio) != 3 or not all(0 < x < math.inf for x in split_ratio):
        raise ValueError(
            f"expected split_ratio of three positive numbers, got {split_ratio}"
        )


def _read_report(manifest_folder):
    """The report that is there, {} if none is or it was cut."""
    try:
        with open(manifest_folder / REPORT, encoding="utf-8") as file:
            report = json.load(file)
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _last_report(manifest_folder, fingerprint):
    """The report of the last run if it still holds, otherwise None."""
    manifests = [
        manifest_folder / f"{split}{ending}"
        for split in SPLITS
        for ending in (".jsonl", ".npy")
    ]
    if not all(manifest.is_file() for manifest in manifests):
        return None
    report = _read_report(manifest_folder)
    return report if report.get("fingerprint") == fingerprint else None


def _write_manifests(manifest_folder, segments, report):
    """Writes the manifests, then the report that vouches for them."""
    manifest_folder.mkdir(parents=True, exist_ok=True)
    # Killed halfway, none vouches for a mixture of old and new manifests.
    _write_json(manifest_folder / REPORT, report | {"fingerprint": None})
    for split in SPLITS:
        write_manifest(manifest_folder, split, segments[split])
    _write_json(manifest_folder / REPORT, report)


def _write_json(path, content):
    """Never leaves a part of a file under its name."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
