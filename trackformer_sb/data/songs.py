"""The songs of a folder: found, named, measured, with what is left out noted.

Everything here goes by sorted paths, so a catalogue does not depend on the
order in which a file system lists its files.
"""

import hashlib
import os
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from speechbrain.utils.logger import get_logger

from trackformer_sb.data.audio import (
    AUDIO_EXTENSIONS,
    UnreadableAudio,
    audio_info,
)

logger = get_logger(__name__)

MIXTURE_NAMES = ("mix", "mixture")
HEADER_THREADS = 8

EXPECTED = {
    "demo": "one folder a song with one audio file an instrument",
    "stems": "one folder a song with one audio file an instrument",
    "mixtures": "audio files, each of them a song",
}


class Song(NamedTuple):
    """A song on disk.

    Arguments
    ---------
    name : str
        Path relative to the data folder until `name_songs`, then unique and of
        A-Z a-z 0-9 _ . - only.
    tracks : dict
        Track name -> absolute path.
    has_stems : bool
        Whether the tracks are stems, or the one track is the whole mixture.
    seconds : float
        Length of the longest track; 0 until `usable_songs`.
    """

    name: str
    tracks: dict
    has_stems: bool
    seconds: float = 0.0

    @property
    def path(self):
        """The folder of the stems, or the file of the mixture."""
        track = next(iter(self.tracks.values()))
        return os.path.dirname(track) if self.has_stems else track


class Findings:
    """What was left out or looked odd; every entry is logged once.

    Attributes `skipped`, a list of {"file", "reason"}, and `warnings`, a list
    of messages, go into the data report.
    """

    def __init__(self):
        self.skipped = []
        self.warnings = []

    def warn(self, message):
        """Logs and keeps a message."""
        logger.warning(message)
        self.warnings.append(message)

    def skip(self, file, reason, quiet=False):
        """Keeps a file that is left out, with a warning unless `quiet`."""
        self.skipped.append({"file": str(file), "reason": reason})
        if not quiet:
            self.warn(f"skipped {file}: {reason}")


def list_audio(key, folder, dataset, findings):
    """Lists the audio files below a folder, links followed, hidden ones not.

    Arguments
    ---------
    key : str
        The yaml key of the folder, for messages.
    folder : str or Path
        The folder.
    dataset : str
        What it should hold: stems or mixtures.
    findings : Findings
        Takes folders that cannot be read.

    Returns
    -------
    dict
        Absolute path -> [size, time of change, mode], sorted by path.

    Raises
    ------
    FileNotFoundError
        If the folder is not there.
    ValueError
        If it holds no audio file.
    """
    where = f"{key}={folder}"
    if not folder or not os.path.isdir(folder):
        raise FileNotFoundError(
            f"{where} is not a folder, expected one with music (or "
            "dataset=demo, which needs none)"
        )
    listing = {}
    visited = set()
    for parent, folders, files in os.walk(
        os.path.abspath(folder),
        followlinks=True,
        onerror=lambda error: findings.skip(error.filename, error.strerror),
    ):
        # A link to a folder above would never end.
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            # macOS leaves "._song.wav", which is no audio, beside song.wav.
            extension = os.path.splitext(file)[1].lower()
            if file.startswith(".") or extension not in AUDIO_EXTENSIONS:
                continue
            path = os.path.join(parent, file)
            try:
                stat = os.stat(path)
                listing[path] = [stat.st_size, stat.st_mtime_ns, stat.st_mode]
            except OSError:  # A dangling link: reading its header says so.
                listing[path] = None
    if not listing:
        raise ValueError(
            f"no audio files under {where}, expected {EXPECTED[dataset]} "
            f"({' '.join(AUDIO_EXTENSIONS)})"
        )
    return dict(sorted(listing.items()))


def find_songs(key, folder, dataset, listing, findings):
    """Groups audio files into songs; the same files make one song only.

    Arguments
    ---------
    key : str
        The yaml key of the folder, for messages.
    folder : str or Path
        The folder.
    dataset : str
        stems (one folder a song; demo alike) or mixtures (one file a song).
    listing : dict
        What `list_audio` returned for the folder.
    findings : Findings
        Takes the files left out.

    Returns
    -------
    list of Song
        Named by their path relative to the folder, not measured yet.

    Raises
    ------
    ValueError
        If no folder below the top holds stems.
    """
    top = os.path.abspath(folder)
    if dataset == "mixtures":
        songs = [
            Song(os.path.relpath(path, top), {"mixture": path}, False)
            for path in listing
        ]
    else:
        songs = _stem_songs(f"{key}={folder}", top, listing, findings)
    first_with = {}
    unique = []
    for song in songs:
        files = frozenset(map(os.path.realpath, song.tracks.values()))
        if files in first_with:
            findings.skip(song.path, f"the same as {first_with[files]}")
        else:
            first_with[files] = song.path
            unique.append(song)
    return unique


def _stem_songs(where, top, listing, findings):
    """One song for every folder below the top that holds stems."""
    by_folder = defaultdict(list)
    for path in listing:
        by_folder[os.path.dirname(path)].append(path)
    loose = by_folder.pop(top, [])
    if loose:
        findings.warn(
            f"skipped {len(loose)} audio files directly in {where}, expected "
            f"{EXPECTED['stems']}"
        )
    for path in loose:
        findings.skip(path, "not in the folder of a song", quiet=True)
    songs = []
    for parent, paths in sorted(by_folder.items()):
        tracks = {}
        for path in sorted(paths, key=_format_rank):
            track = os.path.splitext(os.path.basename(path))[0]
            if track.lower() in MIXTURE_NAMES:
                continue
            if track in tracks:
                findings.skip(path, f"the same track as {tracks[track]}")
            else:
                tracks[track] = path
        if tracks:
            tracks = dict(sorted(tracks.items()))
            songs.append(Song(os.path.relpath(parent, top), tracks, True))
        else:
            findings.skip(parent, "no stems beside the mixture")
    if not songs:
        raise ValueError(
            f"no songs under {where}, expected {EXPECTED['stems']}; "
            f"{len(loose)} of {len(listing)} audio files lie directly in the "
            "folder (finished songs are `dataset: mixtures`)"
        )
    return songs


def _format_rank(path):
    return AUDIO_EXTENSIONS.index(os.path.splitext(path)[1].lower()), path


def name_songs(songs):
    """Gives the songs of all folders names that are safe and unique.

    Arguments
    ---------
    songs : dict
        Yaml key of a folder -> list of Song named by relative path.

    Returns
    -------
    dict
        The same with new names; those that would be equal (case aside) end in
        a hash of key and path.

    Example
    -------
    >>> paths = ["a b.wav", "a+b.wav", "c/d.wav"]
    >>> songs = [Song(path, {}, has_stems=False) for path in paths]
    >>> named = name_songs({"data_folder": songs})
    >>> [song.name for song in named["data_folder"]]
    ['a_b_eb5a0f59', 'a_b_cc26973c', 'c_d']
    """
    groups = defaultdict(list)
    for key, group in songs.items():
        for i, song in enumerate(group):
            base = song.name
            if not song.has_stems:
                base = os.path.splitext(base)[0]
            safe = re.sub(r"[^A-Za-z0-9_.-]", "_", base)
            groups[safe.lower()].append((key, i, safe))
    named = {key: list(group) for key, group in songs.items()}
    for group in groups.values():
        for key, i, safe in group:
            if len(group) > 1:
                # fsencode, because a path need not be valid UTF-8.
                path = os.fsencode(f"{key}/{songs[key][i].name}")
                safe += "_" + hashlib.sha256(path).hexdigest()[:8]
            named[key][i] = songs[key][i]._replace(name=safe)
    return named


def usable_songs(key, folder, songs, segment_seconds, findings):
    """Reads all headers; keeps songs that can be read and are long enough.

    Arguments
    ---------
    key : str
        The yaml key of the folder, for messages.
    folder : str or Path
        The folder.
    songs : list of Song
        The songs found there.
    segment_seconds : float
        The length a song must have, in seconds.
    findings : Findings
        Takes unreadable files (a song with one is left out whole), short songs
        and a warning for every song whose stems differ in format.

    Returns
    -------
    list of Song
        With their length, sorted by name.

    Raises
    ------
    ValueError
        If no song is left.
    """
    where = f"{key}={folder}"
    paths = sorted({p for song in songs for p in song.tracks.values()})
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        infos = dict(zip(paths, pool.map(_info_or_error, paths), strict=True))
    errors = {p: e for p, e in infos.items() if isinstance(e, UnreadableAudio)}
    for path, error in errors.items():
        findings.skip(path, str(error).removeprefix(f"{path}: "))
    measured = []
    for song in sorted(songs, key=lambda song: song.name):
        if errors.keys() & song.tracks.values():
            continue
        headers = {infos[path] for path in song.tracks.values()}
        if len(headers) > 1:
            findings.warn(f"stems of {song.name} differ: {_spread(headers)}")
        seconds = max(info.duration for info in headers)
        measured.append(song._replace(seconds=seconds))
    if not measured:
        raise ValueError(
            f"no readable songs under {where}: {len(errors)} of {len(paths)} "
            f"audio files cannot be read, first {next(iter(errors.values()))}"
        )
    usable = [song for song in measured if song.seconds >= segment_seconds]
    if not usable:
        longest = max(measured, key=lambda song: song.seconds)
        raise ValueError(
            f"all {len(measured)} songs under {where} are shorter than "
            f"segment_seconds={segment_seconds}; the longest, {longest.name}, "
            f"has {longest.seconds:.3f} s"
        )
    if len(usable) < len(measured):
        findings.warn(
            f"skipped {len(measured) - len(usable)} of {len(measured)} songs "
            f"under {where}: shorter than segment_seconds={segment_seconds}"
        )
    for song in measured:
        if song.seconds < segment_seconds:
            reason = f"{song.seconds:.3f} s is shorter than a segment"
            findings.skip(song.path, reason, quiet=True)
    return usable


def _info_or_error(path):
    try:
        return audio_info(path)
    except UnreadableAudio as error:
        return error


def _spread(headers):
    """In which ways the headers of a song differ, smallest to largest."""
    fields = (
        ("length", "s", [round(info.duration, 3) for info in headers]),
        ("rate", "Hz", [info.sample_rate for info in headers]),
        ("channels", "", [info.channels for info in headers]),
    )
    return (
        ", ".join(
            f"{name} {min(values)} to {max(values)} {unit}".rstrip()
            for name, unit, values in fields
            if len(set(values)) > 1
        )
        or "length by less than a millisecond"
    )
