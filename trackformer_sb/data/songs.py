"""The songs of a folder: found, named, measured, with what is left out noted.

Everything here goes by sorted paths, so a catalogue does not depend on the
order in which a file system lists its files.
"""

import functools
import hashlib
import os
import re
from collections import defaultdict
from typing import NamedTuple

from trackformer_sb.data.audio import AUDIO_EXTENSIONS, UnreadableAudio

# Of songs that are one, that which is tested on stays.
KEEP_FIRST = ("test", "valid", "train", "")
MIXTURE_NAMES = {"mix", "mixture"}
STEM_NAMES = MIXTURE_NAMES | {"bass", "drums", "other", "vocals"}

# Longer names end in a hash, for folders and files are called after songs.
LONGEST_NAME = 150

# Songs whose stems differ are named up to this number: in some datasets all do.
NAMED = 5

STEMS_EXPECTED = "one folder a song with one audio file an instrument"
EXPECTED = {
    "demo": STEMS_EXPECTED,
    "stems": STEMS_EXPECTED,
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
        Track name -> tuple of absolute paths, whose sum is the track.
    has_stems : bool
        Whether the tracks are stems, or the one track is the whole mixture.
    seconds : float
        Length of the longest track; 0 until `usable_songs`.
    split : str
        train, valid or test where the dataset itself says so, otherwise "".
    mixture : str
        Path of a finished mixture beside the stems, or "".
    """

    name: str
    tracks: dict
    has_stems: bool
    seconds: float = 0.0
    split: str = ""
    mixture: str = ""

    @property
    def files(self):
        """The paths of all tracks, in their order."""
        return [path for paths in self.tracks.values() for path in paths]

    @property
    def sounds(self):
        """The paths of all tracks, and of a mixture beside them."""
        return [*self.files, *filter(None, [self.mixture])]

    @property
    def path(self):
        """The folder of the stems, or the file of the mixture."""
        track = self.files[0]
        return os.path.dirname(track) if self.has_stems else track


def find_songs(key, folder, dataset, listing, findings):
    """Groups audio files into songs.

    Arguments
    ---------
    key : str
        The yaml key of the folder, for messages.
    folder : str or Path
        The folder.
    dataset : str
        stems (one folder a song; demo alike) or mixtures (one file a song).
    listing : dict
        What `headers.list_audio` returned for the folder.
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
        _warn_of_stems(f"{key}={folder}", listing, findings)
        best = {}
        for path in sorted(listing, key=_format_rank):
            first = best.setdefault(os.path.splitext(path)[0], path)
            if first != path:
                reason = f"the same song as {first}"
                findings.skip(path, reason, unwanted=True)
        return [
            Song(path[len(top) :].lstrip(os.sep), {"mixture": (path,)}, False)
            for path in sorted(best.values())
        ]
    return _stem_songs(f"{key}={folder}", top, listing, findings)


def _warn_of_stems(where, listing, findings):
    """Warns of folders of stems, each of which would be a song."""
    names = defaultdict(set)
    for path in listing:
        folder, name = os.path.split(path)
        names[folder].add(os.path.splitext(name)[0].lower())
    folders = sorted(
        folder
        for folder, found in names.items()
        if len(found & STEM_NAMES) > 1 and found & STEM_NAMES - MIXTURE_NAMES
    )
    if folders:
        findings.warn(
            f"{len(folders)} folders in {where} look like songs with stems, "
            f"{folders[0]} first: with dataset: mixtures each file is a song, "
            "so that a song may be trained on and tested on; expected dataset: "
            "stems"
        )


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
        findings.skip(path, "not in the folder of a song", True, True)
    songs = []
    for parent, paths in sorted(by_folder.items()):
        tracks, mixture = {}, ""
        for path in sorted(paths, key=_format_rank):
            track = os.path.splitext(os.path.basename(path))[0]
            if track.lower() in MIXTURE_NAMES:
                mixture = mixture or path
            elif track in tracks:
                reason = f"the same track as {tracks[track][0]}"
                findings.skip(path, reason, unwanted=True)
            else:
                tracks[track] = (path,)
        if tracks:
            name = os.path.relpath(parent, top)
            tracks = dict(sorted(tracks.items()))
            songs.append(Song(name, tracks, True, mixture=mixture))
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
        The same with new names; those that would be equal (case aside), or
        too long for the name of a file, end in a hash of key and path.

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
            if len(group) > 1 or len(safe) > LONGEST_NAME:
                # fsencode, because a path need not be valid UTF-8.
                path = os.fsencode(f"{key}/{songs[key][i].name}")
                digest = hashlib.sha256(path).hexdigest()[:8]
                safe = f"{safe[:LONGEST_NAME]}_{digest}"
            named[key][i] = songs[key][i]._replace(name=safe)
    return named


@functools.lru_cache(maxsize=1024)
def _real_folder(folder):
    return os.path.realpath(folder)


def real_path(path):
    """Where a file really is, asking once for each folder.

    Arguments
    ---------
    path : str
        Absolute path.

    Returns
    -------
    str
    """
    if os.path.islink(path):
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    return os.path.join(_real_folder(folder), name)


def same_files_once(songs, findings):
    """Leaves out songs that are links to the files of another one.

    Arguments
    ---------
    songs : list of Song
        In any order.
    findings : Findings
        Takes the songs left out.

    Returns
    -------
    list of Song
        One song of each set of files, that of a test split first.
    """
    first_with, unique = {}, []
    for song in sorted(songs, key=lambda song: KEEP_FIRST.index(song.split)):
        files = frozenset(map(real_path, song.files))
        if files in first_with:
            reason = f"the same as {first_with[files]}"
            findings.skip(song.path, reason, unwanted=True)
        else:
            first_with[files] = song.path
            unique.append(song)
    return unique


def usable_songs(where, songs, headers, segment_seconds, findings):
    """Keeps songs that can be read and are long enough.

    Arguments
    ---------
    where : str
        Yaml key and folder of the songs, for messages.
    songs : list of Song
        The songs found there.
    headers : dict
        Path -> AudioInfo or UnreadableAudio, for all files of the songs.
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
    songs = sorted(songs, key=lambda song: song.name)
    errors = skip_unreadable(songs, headers, findings)
    measured, odd = [], []
    for song in songs:
        if not errors.keys().isdisjoint(song.files):
            continue
        infos = {headers[path] for path in song.files}
        if len(infos) > 1:
            odd.append(f"stems of {song.name} differ: {_spread(infos)}")
        seconds = max(info.duration for info in infos)
        measured.append(song._replace(seconds=seconds))
    for message in odd[:NAMED]:
        findings.warn(message)
    if len(odd) > NAMED:
        findings.warn(f"stems of {len(odd) - NAMED} more songs differ")
    if not measured:
        raise ValueError(
            f"no readable songs under {where}: {len(errors)} of "
            f"{len(headers)} audio files cannot be read, first "
            f"{next(iter(errors.values()))}"
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
            findings.skip(song.path, reason, True, True)
    return usable


def skip_unreadable(songs, read, findings):
    """Notes the files of songs that could not be read.

    Arguments
    ---------
    songs : list of Song
        The songs.
    read : dict
        Path -> what was read of the file, or the UnreadableAudio raised.
    findings : Findings
        Takes the files.

    Returns
    -------
    dict
        Path -> UnreadableAudio.
    """
    errors = {}
    for song in songs:
        bad = [p for p in song.files if isinstance(read[p], UnreadableAudio)]
        for path in bad:
            if path not in errors:
                errors[path] = read[path]
                reason = str(read[path]).removeprefix(f"{path}: ")
                if len(song.files) > 1:
                    reason += "; its song is left out"
                findings.skip(path, reason)
    return errors


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
