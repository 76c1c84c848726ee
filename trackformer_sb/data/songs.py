"""A song on disk, songs of any folder, and what was left out."""

import os
import re
import statistics
from collections import Counter, defaultdict
from typing import NamedTuple

from speechbrain.utils.logger import get_logger

from trackformer_sb.audio import AUDIO_EXTENSIONS, FILM_EXTENSIONS
from trackformer_sb.data.files import FLOOR_DB, segment_loudness, sum_levels

logger = get_logger(__name__)

MIXTURE_NAMES = {"mix", "mixture"}
STEM_NAMES = {"bass", "drums", "other", "vocals"}


class Song(NamedTuple):
    """A song on disk, and what is known of it."""

    name: str  # path below the folder of the music
    tracks: dict  # name -> tuple of absolute paths, whose sum is the track
    has_stems: bool  # or the one track is the whole mixture
    split: str = ""  # train, valid or test, where the dataset itself says so
    mixture: str = ""  # path of a finished mixture beside the stems
    seconds: float = 0.0  # of the longest track; 0 until its files are read
    headers: dict | None = None  # path -> AudioInfo, once they are read
    # path of a track -> codes of `measure_levels`, once they are decoded
    levels: dict | None = None

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

    @property
    def title(self):
        """The name without the ending of a file."""
        return self.name if self.has_stems else os.path.splitext(self.name)[0]

    def loudness(self, paths):
        """RMS level of decoded files in dBFS, and the share they sound."""
        codes = sum_levels([self.levels[path] for path in paths])
        return segment_loudness(codes, 0, self.seconds)


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

    def skip(self, files, reason):
        """Keeps what is left out, with one warning."""
        if not files:
            return
        self.skipped += [{"file": file, "reason": reason} for file in files]
        what = (
            f"{len(files)} files, {files[0]} first" if files[1:] else files[0]
        )
        self.warn(f"skipped {what}: {reason}")

    def keep(self, songs, rule):
        """The songs that a rule, Song -> reason or None, does not leave out."""
        kept, left_out = [], defaultdict(list)
        for song in songs:
            if reason := rule(song):
                left_out[reason].append(song.path)
            else:
                kept.append(song)
        for reason, paths in left_out.items():
            self.skip(paths, reason)
        return kept


def skipped_table(skipped):
    """What was left out, a line a kind of reason."""
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
    """Every file is a song; of one in two formats the first format counts."""
    names, best = defaultdict(set), {}
    for path in sorted(listing, key=_format_rank):
        title = os.path.splitext(path)[0]
        parent, name = os.path.split(title)
        names[parent].add(name.lower())
        first = best.setdefault(title, path)
        if first != path:
            findings.skip([path], f"the same song as {first}")
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
    top = os.path.abspath(folder)
    return [
        Song(_below(top, path), {"mixture": (path,)}, False)
        for path in sorted(best.values())
    ]


def stem_songs(folder, listing, findings):
    """Every folder is a song, and every file in it an instrument.

    The sum of the stems is the song, so a file named mix or mixture beside
    them is no stem.
    """
    by_folder = defaultdict(list)
    for path in sorted(listing, key=_format_rank):
        if not path.lower().endswith(FILM_EXTENSIONS):  # a clip is no stem
            by_folder[os.path.dirname(path)].append(path)
    top = os.path.abspath(folder)
    loose = by_folder.pop(top, [])
    findings.skip(loose, "not in the folder of a song")
    songs = []
    for parent, paths in sorted(by_folder.items()):
        tracks, mixture = {}, ""
        for path in paths:
            track = os.path.splitext(os.path.basename(path))[0]
            if track.lower() in MIXTURE_NAMES:
                mixture = mixture or path
            elif track in tracks:
                reason = f"the same track as {tracks[track][0]}"
                findings.skip([path], reason)
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
            f"no songs under {folder}, expected one folder a song with one "
            f"audio file an instrument; {len(loose)} of {len(listing)} audio "
            "files lie directly in the folder (finished songs are `dataset: "
            "mixtures`)"
        )
    return songs


def _below(top, path):
    """A path relative to a folder; ``relpath`` is 100 times slower."""
    return path[len(top) :].lstrip(os.sep)


def _format_rank(path):
    return AUDIO_EXTENSIONS.index(os.path.splitext(path)[1].lower()), path


def medians(songs):
    """Medians of the songs' lengths, and of decoded ones of how they sound."""
    values = defaultdict(list)
    for song in songs:
        values["minutes"].append(song.seconds / 60)
        if song.levels:
            level = max(song.loudness(song.files)[0], FLOOR_DB)
            values["dBFS RMS"].append(level)
            for name, paths in song.tracks.items() if song.has_stems else ():
                share = song.loudness(paths)[1]
                values[f"% with {name}"].append(100 * share)
    return {what: statistics.median(found) for what, found in values.items()}
