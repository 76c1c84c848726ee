"""A song on disk, songs of any folder, and what was left out of one."""

import os
import re
from collections import Counter, defaultdict
from typing import NamedTuple

from speechbrain.utils.logger import get_logger

from trackformer_sb.data.audio import AUDIO_EXTENSIONS

logger = get_logger(__name__)

MIXTURE_NAMES = {"mix", "mixture"}
STEM_NAMES = {"bass", "drums", "other", "vocals"}
STEMS_EXPECTED = "one folder a song with one audio file an instrument"


class Song(NamedTuple):
    """A song on disk.

    Arguments
    ---------
    name : str
        Path below the folder of the music.
    tracks : dict
        Track name -> tuple of absolute paths, whose sum is the track.
    has_stems : bool
        Whether the tracks are stems, or the one track is the whole mixture.
    seconds : float
        Length of the longest track; 0 until its files are read.
    split : str
        train, valid or test where the dataset itself says so, otherwise "".
    mixture : str
        Path of a finished mixture beside the stems, or "".
    absent : tuple of str
        Classes of stems that the song is known to lack.
    """

    name: str
    tracks: dict
    has_stems: bool
    seconds: float = 0.0
    split: str = ""
    mixture: str = ""
    absent: tuple = ()

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
        if not self.has_stems:
            return self.files[0]
        return os.path.commonpath(map(os.path.dirname, self.files))


class Findings:
    """What was left out or looked odd; every entry is logged once.

    Attributes `skipped`, a list of {"file", "reason"}, and `warnings`, a list
    of messages, go into the data report.

    Arguments
    ---------
    strict : bool
        Whether the first thing that cannot be used is an error.

    Example
    -------
    >>> findings = Findings()
    >>> findings.skip(["/music/a.wav"], "truncated after 3.2 s")
    >>> findings.skip(["/music/b.wav"], "truncated after 0.1 s")
    >>> print(skipped_table(findings.skipped))
    2 left out
        2  truncated after ... s, first /music/a.wav
    """

    def __init__(self, strict=False):
        self.strict = strict
        self.skipped = []
        self.warnings = []

    def warn(self, message):
        """Logs and keeps a message."""
        logger.warning(message)
        self.warnings.append(message)

    def skip(self, files, reason, unwanted=False):
        """Keeps what is left out, with one warning.

        Arguments
        ---------
        files : list of str
            Files, or folders of songs; of none nothing is said.
        reason : str
            Why.
        unwanted : bool
            Whether nothing is wrong with them, but the settings or the layout
            of the dataset do not want them.

        Raises
        ------
        ValueError
            If `strict`, and they are wanted.
        """
        if not files:
            return
        if self.strict and not unwanted:
            raise ValueError(f"strict: {files[0]}: {reason}")
        self.skipped += [{"file": file, "reason": reason} for file in files]
        what = (
            f"{len(files)} files, {files[0]} first" if files[1:] else files[0]
        )
        self.warn(f"skipped {what}: {reason}")


def skipped_table(skipped):
    """What was left out, a line a kind of reason.

    Arguments
    ---------
    skipped : list of dict
        {"file", "reason"} each, as in data_report.json.

    Returns
    -------
    str
    """
    kinds, first = Counter(), {}
    for entry in skipped:
        # reasons differ by the files and numbers in them
        reason = re.sub(r" \([^()]*\)$", "", entry["reason"])
        kind = re.sub(r"/.*|\b\d[\d.]*", "...", reason)
        kinds[kind] += 1
        first.setdefault(kind, entry["file"])
    lines = [
        f"{count:5d}  {kind}, first {first[kind]}"
        for kind, count in kinds.most_common()
    ]
    return "\n".join([f"{len(skipped)} left out", *lines])


def mixture_songs(folder, listing, findings):
    """Every file is a song; of one in two formats the first format counts.

    Arguments
    ---------
    folder : str or Path
        The folder.
    listing : dict
        What `list_audio` returned for the folder.
    findings : Findings
        Takes the files left out.

    Returns
    -------
    list of Song
        Sorted by path.
    """
    _warn_of_stems(folder, listing, findings)
    best = {}
    for path in sorted(listing, key=_format_rank):
        first = best.setdefault(os.path.splitext(path)[0], path)
        if first != path:
            findings.skip([path], f"the same song as {first}", unwanted=True)
    top = os.path.abspath(folder)
    return [
        Song(_below(top, path), {"mixture": (path,)}, False)
        for path in sorted(best.values())
    ]


def _warn_of_stems(folder, listing, findings):
    """Warns of folders of stems, each of which would be a song."""
    names = defaultdict(set)
    for path in listing:
        parent, name = os.path.split(path)
        names[parent].add(os.path.splitext(name)[0].lower())
    like_stems = sorted(
        parent
        for parent, found in names.items()
        if found & STEM_NAMES and len(found & (STEM_NAMES | MIXTURE_NAMES)) > 1
    )
    if like_stems:
        findings.warn(
            f"{len(like_stems)} folders in {folder} look like songs with "
            f"stems, {like_stems[0]} first: with dataset: mixtures each file "
            "is a song, so that a song may be trained on and tested on; "
            "expected dataset: stems"
        )


def stem_songs(folder, listing, findings):
    """Every folder is a song, and every file in it an instrument.

    The sum of the stems is the song, so a file named mix or mixture beside
    them is no stem.

    Arguments
    ---------
    folder : str or Path
        The folder.
    listing : dict
        What `list_audio` returned for the folder.
    findings : Findings
        Takes the files left out.

    Returns
    -------
    list of Song
        Sorted by path.

    Raises
    ------
    ValueError
        If no folder below the top holds stems.
    """
    by_folder = defaultdict(list)
    for path in listing:
        by_folder[os.path.dirname(path)].append(path)
    top = os.path.abspath(folder)
    loose = by_folder.pop(top, [])
    findings.skip(loose, "not in the folder of a song", unwanted=True)
    songs = []
    for parent, paths in sorted(by_folder.items()):
        tracks, mixture = {}, ""
        for path in sorted(paths, key=_format_rank):
            track = os.path.splitext(os.path.basename(path))[0]
            if track.lower() in MIXTURE_NAMES:
                mixture = mixture or path
            elif track in tracks:
                reason = f"the same track as {tracks[track][0]}"
                findings.skip([path], reason, unwanted=True)
            else:
                tracks[track] = (path,)
        if tracks:
            tracks = dict(sorted(tracks.items()))
            name = _below(top, parent)
            songs.append(Song(name, tracks, True, mixture=mixture))
        else:
            findings.skip([parent], "no stems beside the mixture")
    if not songs:
        raise ValueError(
            f"no songs under {folder}, expected {STEMS_EXPECTED}; {len(loose)} "
            f"of {len(listing)} audio files lie directly in the folder "
            "(finished songs are `dataset: mixtures`)"
        )
    return songs


def _below(top, path):
    """A path relative to a folder; ``relpath`` is 100 times slower."""
    return path[len(top) :].lstrip(os.sep)


def _format_rank(path):
    return AUDIO_EXTENSIONS.index(os.path.splitext(path)[1].lower()), path
