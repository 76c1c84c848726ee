"""What the files of a folder are: listed, and read once for all runs.

A library of a hundred thousand files takes minutes to read, so what was read
is kept in a file of the user's cache, a line of JSON each, added as it comes:
a run that was stopped goes on, and only new or changed files are read again.
"""

import base64
import hashlib
import json
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
from trackformer_sb.data.levels import measure_levels

logger = get_logger(__name__)

# libsndfile does not hold Python's lock
THREADS = min(32, 4 * (os.cpu_count() or 1))

# Audio that libsndfile does not read, worth a word.
OTHER_EXTENSIONS = frozenset(
    ".m4a .aac .mp4 .wma .ape .wv .mpc .alac .ac3 .dsf .dff .tta".split()
)

# A progress bar for less than this is over before it is read.
MANY_FILES = 500

# What the fingerprint of a silent file begins with.
SILENT = "silent "


def list_audio(folder, findings, key="folder"):
    """Lists the audio files below a folder, links followed, hidden ones not.

    Arguments
    ---------
    folder : str or Path
        The folder.
    findings : Findings
        Takes folders that cannot be read, and files of other formats.
    key : str
        Which folder it is, for messages.

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
    if not folder or not os.path.isdir(folder):
        raise FileNotFoundError(
            f"{key}={folder} is not a folder, expected one with music (or "
            "dataset=demo, which needs none)"
        )
    listing, others = {}, defaultdict(list)
    visited = {}
    top = os.path.realpath(folder)
    for parent, folders, files in os.walk(
        os.path.abspath(folder),
        followlinks=True,
        onerror=lambda error: findings.skip([error.filename], error.strerror),
    ):
        # A link to a folder above would bring in what is beside the music.
        real = os.path.realpath(parent)
        above = real != top and os.path.commonpath([real, top]) == real
        if real in visited or above:
            reason = f"a link to {visited.get(real, 'a folder above')}"
            findings.skip([parent], reason, unwanted=True)
            folders.clear()
            continue
        visited[real] = parent
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            # macOS leaves "._song.wav", which is no audio, beside song.wav.
            if file.startswith("."):
                continue
            extension = os.path.splitext(file)[1].lower()
            path = os.path.join(parent, file)
            if extension in AUDIO_EXTENSIONS:
                listing[path] = file_stat(path)
            elif extension in OTHER_EXTENSIONS:
                others[extension].append(path)
    readable = " ".join(AUDIO_EXTENSIONS)
    for extension, paths in sorted(others.items()):
        reason = f"{extension} is not read, convert to one of {readable}"
        findings.skip(sorted(paths), reason)
    if not listing:
        raise ValueError(
            f"no audio files under {key}={folder}, expected {readable}"
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

    Each method takes paths of the listing and returns a dict: path -> what was
    read, or the UnreadableAudio that it raised. Errors are not kept: what could
    not be read is tried again.

    Arguments
    ---------
    folder : str or Path
        The folder with the music; each has a cache of its own.
    listing : dict
        Path -> [size, time of change, mode], as ``list_audio`` returns.
    cache_folder : str or Path, optional
        Where the cache is; default ``$XDG_CACHE_HOME/trackformer_sb``, where
        the variable is not set below ``~/.cache``.

    Example
    -------
    >>> import tempfile, soundfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/song.wav"
    ...     soundfile.write(path, np.zeros(4000), 8000)
    ...     cache = FileCache(folder, {path: file_stat(path)}, folder)
    ...     cache.headers([path])[path].duration
    0.5
    """

    def __init__(self, folder, listing, cache_folder=None):
        self.listing = listing
        if cache_folder is None:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            cache_folder = Path(base) / "trackformer_sb"
        name = hashlib.sha256(os.fsencode(os.path.abspath(folder))).hexdigest()
        self.path = Path(cache_folder) / f"audio-{name[:16]}.jsonl"
        # what was read -> path -> what the file was, and the value as of JSON
        self._kept = {"headers": {}, "levels": {}, "fingerprints": {}}
        if self.path.is_file():
            with open(self.path, "rb") as file:
                for line in file:
                    # a kill may have cut a line
                    with suppress(ValueError):
                        kind, path, stat, value = json.loads(line)
                        self._kept[kind][path] = stat, value

    def headers(self, paths):
        """Headers of files: AudioInfo."""
        return self._read(
            "headers", paths, audio_info, list, lambda kept: AudioInfo(*kept)
        )

    def levels(self, paths):
        """What files contain, decoded: codes of ``measure_levels``."""
        return self._read(
            "levels",
            paths,
            measure_levels,
            lambda codes: base64.b64encode(codes.tobytes()).decode(),
            lambda kept: np.frombuffer(base64.b64decode(kept), np.uint8),
        )

    def fingerprints(self, paths):
        """What files sound like: ``audio_fingerprint``."""
        return self._read("fingerprints", paths, audio_fingerprint, str, str)

    def _read(self, kind, paths, read, to_json, from_json):
        def read_or_error(path):
            try:
                return read(path)
            except UnreadableAudio as error:
                return error

        kept, found = self._kept[kind], dict.fromkeys(paths)
        known = [
            path
            for path in found
            if path in kept and kept[path][0] == self.listing[path]
        ]
        for path in known:
            found[path] = from_json(kept[path][1])
        unknown = [path for path in found if found[path] is None]
        if not unknown:
            return found
        with self._opened() as file, ThreadPoolExecutor(THREADS) as pool:
            values = tqdm(
                pool.map(read_or_error, unknown),
                desc=f"reading {kind}",
                total=len(unknown),
                unit="file",
                disable=len(unknown) < MANY_FILES,
            )
            for path, value in zip(unknown, values):
                found[path] = value
                if not isinstance(value, UnreadableAudio):
                    kept[path] = self.listing[path], to_json(value)
                    file.write(json.dumps([kind, path, *kept[path]]) + "\n")
        return found

    def _opened(self):
        """The cache, open to be added to; if it cannot be written, nothing."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # a name that is not UTF-8 is escaped by JSON
            return open(self.path, "a", encoding="ascii")
        except OSError as error:
            logger.warning(
                f"cache_folder: {self.path} cannot be written ("
                f"{error.strerror}), so what is read now is read again next "
                "time"
            )
            return open(os.devnull, "w", encoding="ascii")


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
