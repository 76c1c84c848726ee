"""A folder of music as SpeechBrain manifests, split by song.

A song is a name and its tracks. In a folder of `stems` every folder with audio
files is a song and every file in it an instrument; the sum of the stems is the
song, so a file named mix or mixture beside them is left out. In a folder of
`mixtures` every audio file is a song with the single track "mixture". `demo` is
the built-in demo band, a folder of stems made on the spot.
"""

import hashlib
import json
import math
import os
from pathlib import Path

from speechbrain.utils.logger import get_logger

from trackformer_sb.data.songs import (
    Findings,
    find_songs,
    list_audio,
    name_songs,
    usable_songs,
)
from trackformer_sb.data.splits import (
    MIN_SONGS,
    SPLITS,
    songs_not_in_test,
    split_songs,
)

logger = get_logger(__name__)

DATASETS = ("demo", "stems", "mixtures")
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
    demo_songs=60,
    demo_seconds=24.0,
):
    """Writes train.json, valid.json, test.json and data_report.json.

    A manifest has one entry a segment: {segment_id: {"song": str, "tracks":
    {name: path}, "start": seconds, "duration": seconds, "has_stems": bool}}.
    Nothing is written when settings, paths, sizes and times of change are those
    of the last run.

    Arguments
    ---------
    data_folder : str or Path
        Where the music is. With `demo` it may be None: the band is then written
        to `manifest_folder`/demo_band.
    dataset : str
        demo, stems or mixtures; see the head of this module.
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
        stems (default) or mixtures: what `test_folder` holds.
    demo_songs : int
        Number of songs of the demo band.
    demo_seconds : float
        Length of its songs in seconds.

    Returns
    -------
    dict
        The content of data_report.json: songs, hours and segments of each
        split, skipped files with the reason, warnings.

    Raises
    ------
    FileNotFoundError
        If `data_folder` or `test_folder` is not there.
    ValueError
        If the dataset is unknown, a number is out of range, a folder holds no
        usable song or too few, or a file is in train and test.

    Example
    -------
    >>> import tempfile, numpy, soundfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.mkdir(f"{folder}/songs")
    ...     for i in range(10):
    ...         path = f"{folder}/songs/{i}.wav"
    ...         soundfile.write(path, numpy.zeros(7 * 100), 100)
    ...     report = prepare(f"{folder}/songs", "mixtures", f"{folder}/json")
    >>> {split: report["splits"][split]["segments"] for split in SPLITS}
    {'train': 12, 'valid': 4, 'test': 4}
    """
    if segment_hop_seconds is None:
        segment_hop_seconds = segment_seconds
    test_dataset = test_dataset or "stems"
    _check(
        dataset,
        test_dataset,
        split_ratio,
        segment_seconds=segment_seconds,
        segment_hop_seconds=segment_hop_seconds,
        sample_rate=sample_rate,
    )
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
    }
    findings = Findings()
    listings = {
        key: list_audio(key, *source, findings)
        for key, source in sources.items()
    }
    fingerprint = hashlib.sha256(
        json.dumps([settings, listings]).encode()
    ).hexdigest()
    report = _last_report(manifest_folder, fingerprint)
    if report is not None:
        logger.info("%s is up to date", manifest_folder)
        return report

    songs = name_songs(
        {
            key: find_songs(key, *source, listings[key], findings)
            for key, source in sources.items()
        }
    )
    songs = {
        key: usable_songs(
            key, sources[key][0], songs[key], segment_seconds, findings
        )
        for key in sources
    }
    if test_folder:
        songs["data_folder"] = songs_not_in_test(
            songs["data_folder"], songs["test_folder"], findings
        )
    splits = split_songs(
        f"data_folder={data_folder}", songs["data_folder"], split_ratio, seed
    )
    if test_folder:
        splits["test"] = songs["test_folder"]
        if len(splits["test"]) < MIN_SONGS:
            raise ValueError(
                f"found {len(splits['test'])} usable songs under "
                f"test_folder={test_folder}, expected at least {MIN_SONGS}"
            )
    segments = {
        split: _segments(part, segment_seconds, segment_hop_seconds)
        for split, part in splits.items()
    }
    report = {
        "settings": settings,
        "fingerprint": fingerprint,
        "splits": {
            split: {
                "songs": len(part),
                "hours": sum(song.seconds for song in part) / 3600,
                "segments": len(segments[split]),
                "song_names": [song.name for song in part],
            }
            for split, part in splits.items()
        },
        "skipped": findings.skipped,
        "warnings": findings.warnings,
    }
    _write_manifests(manifest_folder, segments, report)
    return report


def _check(dataset, test_dataset, split_ratio, **positive):
    """Refuses settings that no folder could satisfy."""
    for key, value, valid in (
        ("dataset", dataset, DATASETS),
        ("test_dataset", test_dataset, DATASETS[1:]),
    ):
        if value not in valid:
            raise ValueError(
                f"unknown {key} {value!r}, expected one of {', '.join(valid)}"
            )
    for key, value in positive.items():
        if not value > 0:
            raise ValueError(f"expected {key} > 0, got {value}")
    if len(split_ratio) != 3 or min(split_ratio) <= 0:
        raise ValueError(
            f"expected split_ratio of three positive numbers, got {split_ratio}"
        )


def _segments(songs, segment_seconds, hop_seconds):
    """The manifest of a split: only whole segments, one every hop."""
    segments = {}
    for song in songs:
        # Lengths and hops in decimal seconds are not exact.
        hops = (song.seconds - segment_seconds) / hop_seconds + 1e-6
        for i in range(math.floor(hops) + 1):
            segments[f"{song.name}_{i:04d}"] = {
                "song": song.name,
                "tracks": song.tracks,
                "start": round(i * hop_seconds, 6),
                "duration": segment_seconds,
                "has_stems": song.has_stems,
            }
    return segments


def _last_report(manifest_folder, fingerprint):
    """The report of the last run if it still holds, otherwise None."""
    manifests = [manifest_folder / f"{split}.json" for split in SPLITS]
    if not all(manifest.is_file() for manifest in manifests):
        return None
    try:
        with open(manifest_folder / REPORT, encoding="utf-8") as file:
            report = json.load(file)
    except (OSError, ValueError):
        return None
    return report if report.get("fingerprint") == fingerprint else None


def _write_manifests(manifest_folder, segments, report):
    """Writes the manifests, then the report that vouches for them."""
    manifest_folder.mkdir(parents=True, exist_ok=True)
    # Killed halfway, no report is left for a mixture of old and new manifests.
    (manifest_folder / REPORT).unlink(missing_ok=True)
    for split in SPLITS:
        _write_json(manifest_folder / f"{split}.json", segments[split])
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
