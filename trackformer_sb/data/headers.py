"""What the files of a library are: listed, and read once for all runs.

A library of a hundred thousand files takes minutes to read, so what was read
is kept in a file of the user's cache, a line of JSON each, added as it comes:
a run that was stopped goes on, and only new or changed files are read again.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from trackformer_sb.data.audio import (
    AUDIO_EXTENSIONS,
    AudioInfo,
    UnreadableAudio,
    audio_info,
)
from trackformer_sb.data.levels import AudioLevels, measure_levels

# libsndfile does not hold Python's lock
THREADS = min(32, 4 * (os.cpu_count() or 1))

# A progress bar for less than this is over before it is read.
MANY_FILES = 500


def default_cache_folder():
    """Where headers are kept: a folder of the user's cache directory.

    Returns
    -------
    Path
        ``$XDG_CACHE_HOME/trackformer_sb``, by default below ``~/.cache``.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "trackformer_sb"


def list_audio(key, folder, findings, expected):
    """Lists the audio files below a folder, links followed, hidden ones not.

    Arguments
    ---------
    key : str
        The yaml key of the folder, for messages.
    folder : str or Path
        The folder.
    findings : Findings
        Takes folders that cannot be read.
    expected : str
        What the folder should hold, for messages.

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
            listing[path] = file_stat(path)
    if not listing:
        raise ValueError(
            f"no audio files under {where}, expected {expected} "
            f"({' '.join(AUDIO_EXTENSIONS)})"
        )
    return dict(sorted(listing.items()))


def file_stat(path):
    """What tells whether a file has changed.

    Arguments
    ---------
    path : str or Path
        The file.

    Returns
    -------
    list of int or None
        Size, time of change and mode; None if there is no such file, which is
        said when it is read.
    """
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_mode]


class FileCache:
    """What was read of the files of a folder, kept from run to run.

    Errors are not kept: what could not be read is tried again.

    Arguments
    ---------
    folder : str or Path
        The folder with the music; each has a cache of its own.
    cache_folder : str or Path, optional
        Where the cache is; default ``default_cache_folder()``.

    Example
    -------
    >>> import tempfile, numpy, soundfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/song.wav"
    ...     soundfile.write(path, numpy.zeros(4000), 8000)
    ...     cache = FileCache(folder, f"{folder}/cache")
    ...     cache.headers({path: [8044, 0, 0]})[path].duration
    0.5
    """

    def __init__(self, folder, cache_folder=None):
        folder = os.path.abspath(folder)
        name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
        parent = Path(cache_folder or default_cache_folder())
        self.path = parent / f"files-{name}.jsonl"
        self._headers, self._levels = {}, {}
        lines = 0
        try:
            with open(self.path, "rb") as file:
                for line in file:
                    lines += 1
                    self._take(line)
        except FileNotFoundError:
            return
        if lines > 2 * (len(self._headers) + len(self._levels)) + 1000:
            self._rewrite()

    def _take(self, line):
        """Keeps a line; the last one of a run that was killed may be cut."""
        try:
            kind, path, stat, value = json.loads(line)
            if kind == "header":
                self._headers[path] = stat, AudioInfo(*value)
            elif kind == "levels":
                # decoded only where asked for
                self._levels[path] = stat, value
        except (ValueError, TypeError):
            pass

    def _rewrite(self):
        """Leaves out what was overtaken by later lines."""
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with open(unfinished, "w", encoding="utf-8") as file:
            for kind, kept in (
                ("header", self._headers),
                ("levels", self._levels),
            ):
                for path, (stat, value) in kept.items():
                    file.write(json.dumps([kind, path, stat, value]) + "\n")
        os.replace(unfinished, self.path)

    def headers(self, listing, progress=False):
        """The headers of files, read in parallel where they are not known.

        Arguments
        ---------
        listing : dict
            Path -> [size, time of change, mode], as ``list_audio`` returns.
        progress : bool
            Whether to show a progress bar where many files are read.

        Returns
        -------
        dict
            Path -> AudioInfo, or the UnreadableAudio that it raised.
        """
        return self._known_or_read(
            "header", self._headers, listing, audio_info, tuple, progress
        )

    def levels(self, listing, progress=False):
        """What files contain: decodes those that are not known.

        Arguments
        ---------
        listing : dict
            Path -> [size, time of change, mode], as ``list_audio`` returns.
        progress : bool
            Whether to show a progress bar where many files are read.

        Returns
        -------
        dict
            Path -> AudioLevels, or the UnreadableAudio that it raised.
        """
        found = self._known_or_read(
            "levels",
            self._levels,
            listing,
            measure_levels,
            AudioLevels.to_text,
            progress,
        )
        return {
            path: AudioLevels.from_text(value)
            if isinstance(value, str)
            else value
            for path, value in found.items()
        }

    def _known_or_read(self, kind, kept, listing, read, to_json, progress):
        unknown = [
            path
            for path, stat in listing.items()
            if path not in kept or kept[path][0] != stat or stat is None
        ]
        found = {path: kept[path][1] for path in listing.keys() & kept.keys()}
        if unknown:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with (
                # a name that is not UTF-8 is escaped by JSON
                open(self.path, "a", encoding="ascii") as file,
                ThreadPoolExecutor(THREADS) as pool,
            ):
                if file.tell() and not _ends_with_newline(self.path):
                    file.write("\n")
                for path, value in zip(
                    unknown,
                    tqdm(
                        pool.map(lambda path: _or_error(read, path), unknown),
                        desc=f"reading {kind}",
                        total=len(unknown),
                        unit="file",
                        disable=not progress or len(unknown) < MANY_FILES,
                    ),
                    strict=True,
                ):
                    found[path] = value
                    if isinstance(value, UnreadableAudio):
                        continue
                    kept[path] = listing[path], value
                    line = [kind, path, listing[path], to_json(value)]
                    file.write(json.dumps(line) + "\n")
        return {path: found[path] for path in listing}


def _or_error(read, path):
    try:
        return read(path)
    except UnreadableAudio as error:
        return error


def _ends_with_newline(path):
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
