"""A folder of music from its listing to songs that can be used."""

import glob
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch

from trackformer_sb.data.audio import UnreadableAudio, read_segment
from trackformer_sb.data.headers import THREADS, file_stat
from trackformer_sb.data.layouts import (
    LAYOUTS,
    group_stems,
    keep_few_stems,
    moisesdb_songs,
    musdb18hq_songs,
    slakh2100_songs,
)
from trackformer_sb.data.songs import (
    EXPECTED,
    find_songs,
    skip_unreadable,
    usable_songs,
)
from trackformer_sb.truncation import find_cut

FINDERS = {
    "moisesdb": moisesdb_songs,
    "musdb18hq": musdb18hq_songs,
    "slakh2100": slakh2100_songs,
}

# What a folder of each dataset should hold, for messages.
EXPECTED_IN = {**EXPECTED, **{name: LAYOUTS[name][3] for name in FINDERS}}

# A share of samples at full scale that is heard as distortion, and an offset
# that costs a decibel of range.
MAX_CLIPPED_SHARE = 0.01
MAX_DC_OFFSET = 0.1

# A mixture that differs from the sum of its stems by more than this, in dB
# relative to the mixture, has something that no stem has.
MIXTURE_TOLERANCE_DB = -30.0
CHECKED_SECONDS = 2.0

OGG = (".ogg", ".opus")


class Library(NamedTuple):
    """The usable songs of a folder, and what is known of their files.

    songs : list of Song, with names and lengths, sorted by name.
    headers : dict, path -> AudioInfo.
    levels : dict, path -> AudioLevels; empty where nothing was decoded.
    """

    songs: list
    headers: dict
    levels: dict


def stat_metadata(folder, dataset):
    """What tells whether the files that describe songs have changed.

    Arguments
    ---------
    folder : str or Path
        The folder.
    dataset : str
        See ``list_songs``.

    Returns
    -------
    dict
        Path -> ``headers.file_stat``; empty where only audio counts.
    """
    marker, *_ = LAYOUTS.get(dataset, ("",))
    if not marker.endswith((".json", ".yaml")):
        return {}
    patterns = marker, os.path.join("*", marker)
    paths = [x for part in patterns for x in glob.glob(part, root_dir=folder)]
    return {x: file_stat(os.path.join(folder, x)) for x in sorted(paths)}


def list_songs(
    key, folder, dataset, listing, findings, stem_groups=None, max_stems=None
):
    """The songs of a dataset, named by their paths, not read yet.

    Arguments
    ---------
    key : str
        The yaml key of the folder, for messages.
    folder : str or Path
        The folder.
    dataset : str
        stems, mixtures, demo or one of ``FINDERS``.
    listing : dict
        What ``headers.list_audio`` returned for the folder.
    findings : Findings
        Takes what is left out.
    stem_groups : dict, optional
        See ``layouts.group_stems``.
    max_stems : int, optional
        See ``layouts.keep_few_stems``.

    Returns
    -------
    list of Song

    Raises
    ------
    ValueError
        If there are none.
    """
    if dataset in FINDERS:
        songs = FINDERS[dataset](folder, listing, findings)
    else:
        songs = find_songs(key, folder, dataset, listing, findings)
    stems = sorted(
        {track for song in songs if song.has_stems for track in song.tracks}
    )
    songs = group_stems(songs, stem_groups)
    unused = [
        pattern
        for patterns in (stem_groups or {}).values()
        for pattern in patterns
        if not any(fnmatchcase(stem.lower(), pattern.lower()) for stem in stems)
    ]
    if unused and stems:
        findings.warn(
            f"stem_groups: no stem is like {', '.join(unused)}; there are "
            f"{', '.join(stems[:20])}"
        )
    return keep_few_stems(songs, max_stems, findings)


def read_library(
    where, songs, listing, cache, segment_seconds, findings, decode, check
):
    """Reads the files of songs and keeps the songs that can be used.

    Arguments
    ---------
    where : str
        Yaml key and folder, for messages.
    songs : list of Song
        With their final names.
    listing : dict
        What ``headers.list_audio`` returned for the folder.
    cache : FileCache
        What was read in earlier runs.
    segment_seconds : float
        The length a song must have.
    findings : Findings
        Takes what is left out.
    decode : bool
        Whether to decode the files for their levels.
    check : bool
        Whether clipped files and files with an offset are left out.

    Returns
    -------
    Library

    Raises
    ------
    ValueError
        If no song is left.
    """
    headers = cache.headers(_of(songs, listing), progress=True)
    songs = usable_songs(where, songs, headers, segment_seconds, findings)
    check_mixtures(songs, findings)
    levels = {}
    if decode:
        levels = cache.levels(_of(songs, listing), progress=True)
        bad = set(skip_unreadable(songs, levels, findings))
        if check:
            bad |= _skip_distorted(songs, levels, findings)
        songs = [song for song in songs if bad.isdisjoint(song.files)]
        if not songs:
            raise ValueError(
                f"no usable songs under {where}: {len(bad)} files are damaged, "
                f"first {min(bad)}"
            )
    if check:
        warn_of_open_ends(songs, findings)
    headers = {path: headers[path] for song in songs for path in song.files}
    return Library(songs, headers, levels)


def fingerprint_files(libraries, listings, caches):
    """What is equal for files that sound alike, mixtures beside stems too.

    Only files of equal length, rate and channels are read.

    Arguments
    ---------
    libraries : dict
        Yaml key of a folder -> Library.
    listings, caches : dict
        The same keys -> what ``headers.list_audio`` returned, and FileCache.

    Returns
    -------
    dict
        Path -> fingerprint, or the path itself where nothing is like it.
    """
    infos = {}
    for key, library in libraries.items():
        mixtures = [song.mixture for song in library.songs if song.mixture]
        read = caches[key].headers({p: listings[key][p] for p in mixtures})
        infos[key] = {**library.headers, **read}
    count = Counter(info for part in infos.values() for info in part.values())
    fingerprints = {}
    for key, part in infos.items():
        alike = {
            path: listings[key][path]
            for path, info in part.items()
            if count[info] > 1 and not isinstance(info, UnreadableAudio)
        }
        read = caches[key].fingerprints(alike, progress=True)
        for path in part:
            value = read.get(path, path)
            unread = isinstance(value, UnreadableAudio)
            fingerprints[path] = path if unread else value
    return fingerprints


def describe_files(splits, libraries):
    """How many files of which rate and channels, songs of which stem.

    Arguments
    ---------
    splits : dict
        Split -> list of Song.
    libraries : dict
        Yaml key of a folder -> Library.

    Returns
    -------
    dict
        "sample_rates", "channels" and "stems", each a dict of counts.
    """
    files = {
        path: library.headers[path]
        for part in splits.values()
        for song in part
        for path in song.files
        for library in libraries.values()
        if path in library.headers
    }
    return {
        "sample_rates": dict(
            Counter(str(info.sample_rate) for info in files.values())
        ),
        "channels": dict(
            Counter(str(info.channels) for info in files.values())
        ),
        "stems": dict(
            Counter(
                track
                for part in splits.values()
                for song in part
                if song.has_stems
                for track in song.tracks
            ).most_common()
        ),
    }


def _of(songs, listing):
    """The part of a listing that songs are made of."""
    return {path: listing[path] for song in songs for path in song.files}


def _skip_distorted(songs, levels, findings):
    """Paths of clipped files and of files with an offset."""
    bad = set()
    for song in songs:
        for path in song.files:
            level = levels[path]
            if isinstance(level, UnreadableAudio) or path in bad:
                continue
            if level.clipped_share > MAX_CLIPPED_SHARE:
                share = 100 * level.clipped_share
                reason = f"clipped, {share:.1f} % of it is at full scale"
            elif abs(level.dc_offset) > MAX_DC_OFFSET:
                reason = f"a DC offset of {level.dc_offset:.2f}"
            else:
                continue
            bad.add(path)
            findings.skip(path, reason)
    return bad


def warn_of_open_ends(songs, findings):
    """Warns of Ogg files that may have been cut, or nobody ended.

    Arguments
    ---------
    songs : list of Song
        Readable songs.
    findings : Findings
        Takes the warning.
    """
    files = {path for song in songs for path in song.files}
    files = sorted(path for path in files if path.lower().endswith(OGG))
    with ThreadPoolExecutor(THREADS) as pool:
        cuts = dict(zip(files, pool.map(find_cut, files)))
    found = [path for path in files if cuts[path] and not cuts[path].certain]
    if found:
        findings.warn(
            f"{len(found)} Ogg files, {found[0]} first: {cuts[found[0]].reason}"
        )


def check_mixtures(songs, findings):
    """Warns of mixtures that are not the sum of their stems.

    Compares two seconds in the middle of each song that has a mixture.

    Arguments
    ---------
    songs : list of Song
        Readable songs with their lengths.
    findings : Findings
        Takes the warnings.
    """
    mixed = [song for song in songs if song.mixture]
    with ThreadPoolExecutor(THREADS) as pool:
        for song, error in zip(mixed, pool.map(_mixture_error_db, mixed)):
            if error is None:
                findings.warn(f"{song.mixture}: cannot be read, the sum counts")
            elif error > MIXTURE_TOLERANCE_DB:
                findings.warn(
                    f"{song.mixture}: differs from the sum of its stems by "
                    f"{error:.0f} dB; the sum counts"
                )


def _mixture_error_db(song):
    """Energy of mixture less stems over that of the mixture, in dB."""
    start = max(0.0, song.seconds / 2 - CHECKED_SECONDS / 2)
    what = start, CHECKED_SECONDS, 44100
    try:
        mixture = read_segment(song.mixture, *what)
        rest = mixture.clone()
        for path in song.files:
            rest -= read_segment(path, *what)
    except UnreadableAudio:
        return None
    energy = mixture.square().mean() + 1e-10
    return float(10 * torch.log10((rest.square().mean() + 1e-20) / energy))
