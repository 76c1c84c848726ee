"""What the files of a library are: listed, and read once for all runs.

A library of a hundred thousand files takes minutes to read, so what was read
is kept in a file of the user's cache, a line of JSON each, added as it comes:
a run that was stopped goes on, and only new or changed files are read again.
"""

import hashlib
import json
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from trackformer_sb.data.audio import (
    AUDIO_EXTENSIONS,
    AudioInfo,
    UnreadableAudio,
    audio_info,
    open_audio,
)
from trackformer_sb.data.levels import AudioLevels, measure_levels

logger = get_logger(__name__)

# libsndfile does not hold Python's lock
THREADS = min(32, 4 * (os.cpu_count() or 1))

# Audio that libsndfile does not read, worth a word.
OTHER_EXTENSIONS = frozenset(
    ".m4a .aac .mp4 .wma .ape .wv .mpc .alac .ac3 .dsf .dff .tta".split()
)

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


# What the fingerprint of a silent file begins with.
SILENT = "silent "


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
    listing, others = {}, defaultdict(list)
    visited = {}
    top = os.path.realpath(folder)
    for parent, folders, files in os.walk(
        os.path.abspath(folder),
        followlinks=True,
        onerror=lambda error: findings.skip(error.filename, error.strerror),
    ):
        # A link to a folder above would bring in what is beside the music.
        real = os.path.realpath(parent)
        above = real != top and os.path.commonpath([real, top]) == real
        if real in visited or above:
            reason = f"a link to {visited.get(real, 'a folder above')}"
            findings.skip(parent, reason, unwanted=True)
            folders.clear()
            continue
        visited[real] = parent
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            # macOS leaves "._song.wav", which is no audio, beside song.wav.
            extension = os.path.splitext(file)[1].lower()
            path = os.path.join(parent, file)
            if file.startswith("."):
                continue
            if extension in AUDIO_EXTENSIONS:
                listing[path] = file_stat(path)
            elif extension in OTHER_EXTENSIONS:
                others[extension].append(path)
    for extension, paths in sorted(others.items()):
        findings.warn(
            f"skipped {len(paths)} {extension} files, {paths[0]} first: a "
            f"format that libsndfile does not read, convert to one of "
            f"{' '.join(AUDIO_EXTENSIONS)}"
        )
        for path in sorted(paths):
            findings.skip(path, f"{extension} is not read", quiet=True)
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
        # what was read -> path -> what the file was, and the value as of json
        self._kept = {"header": {}, "levels": {}, "sound": {}}
        lines = 0
        try:
            with open(self.path, "rb") as file:
                for line in file:
                    lines += 1
                    self._take(line)
        except OSError:
            return
        if lines > 2 * sum(map(len, self._kept.values())) + 1000:
            with suppress(OSError):  # it may be for reading only
                self._rewrite()

    def _take(self, line):
        """Keeps a line; the last one of a run that was killed may be cut."""
        try:
            kind, path, stat, value = json.loads(line)
            self._kept[kind][path] = stat, value
        except (ValueError, TypeError, KeyError):
            pass

    def _rewrite(self):
        """Leaves out what was overtaken by later lines."""
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with open(unfinished, "w", encoding="utf-8") as file:
            for kind, kept in self._kept.items():
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
            "header", listing, audio_info, list, _info, progress
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
        return self._known_or_read(
            "levels",
            listing,
            measure_levels,
            AudioLevels.to_text,
            AudioLevels.from_text,
            progress,
        )

    def fingerprints(self, listing, progress=False):
        """Fingerprints of what files sound like, see ``audio_fingerprint``.

        Arguments
        ---------
        listing : dict
            Path -> [size, time of change, mode], as ``list_audio`` returns.
        progress : bool
            Whether to show a progress bar where many files are read.

        Returns
        -------
        dict
            Path -> str, or the UnreadableAudio that it raised.
        """
        return self._known_or_read(
            "sound", listing, audio_fingerprint, str, str, progress
        )

    def _opened(self):
        """The cache, open to be added to; None if it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # a name that is not UTF-8 is escaped by JSON
            file = open(self.path, "a", encoding="ascii")
        except OSError as error:
            logger.warning(
                f"cache_folder: {self.path} cannot be written ("
                f"{error.strerror}), so what is read now is read again next "
                "time"
            )
            return None
        if file.tell() and not _ends_with_newline(self.path):
            file.write("\n")
        return file

    def _known_or_read(self, kind, listing, read, to_json, from_json, progress):
        kept, found = self._kept[kind], {}
        for path, stat in listing.items():
            if stat is not None and path in kept and kept[path][0] == stat:
                # a damaged cache is one that knows less
                with suppress(ValueError, TypeError, AttributeError):
                    found[path] = from_json(kept[path][1])
        unknown = [path for path in listing if path not in found]
        if unknown:
            with (
                self._opened() or nullcontext() as file,
                ThreadPoolExecutor(THREADS) as pool,
            ):
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
                    kept[path] = listing[path], to_json(value)
                    if file is not None:
                        line = [kind, path, *kept[path]]
                        file.write(json.dumps(line) + "\n")
        return {path: found[path] for path in listing}


def audio_fingerprint(path):
    """What a file sounds like at three places, whatever its name and tags.

    Arguments
    ---------
    path : str or Path
        The audio file.

    Returns
    -------
    str
        Hash of half a second of samples each at a fifth, a half and four
        fifths of the file, in 16 bits; ``SILENT`` and a hash of the bytes of a
        file silent there.

    Raises
    ------
    UnreadableAudio
        If they cannot be decoded.
    """
    digest, sounds = hashlib.sha256(), False
    with open_audio(path) as audio:
        for share in (0.2, 0.5, 0.8):
            audio.seek(int(share * audio.frames))
            block = audio.read(audio.samplerate // 2 + 1, dtype="float32")
            # libsndfile would make integers of float files without scaling
            block = np.rint(np.nan_to_num(block).clip(-1, 1) * 32767)
            block = block.astype(np.int16)
            sounds = sounds or bool(block.any())
            digest.update(block.tobytes())
    if not sounds:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return SILENT + digest.hexdigest()
    return digest.hexdigest()


def _info(value):
    return AudioInfo(*value)


def _or_error(read, path):
    try:
        return read(path)
    except UnreadableAudio as error:
        return error


def _ends_with_newline(path):
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
