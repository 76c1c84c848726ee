"""What the files of a folder are: listed, and read once for all runs.

A library of a hundred thousand files takes minutes to read, so what was read
is kept in a file of the user's cache, a line of JSON each, added as it comes:
a run that was stopped goes on, and only new or changed files are read again.
"""

import base64
import hashlib
import json
import math
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from trackformer_sb.audio import (
    AUDIO_EXTENSIONS,
    UNREAD_MUSIC,
    AudioInfo,
    UnreadableAudio,
    audio_info,
    decode,
    open_audio,
    read_on,
)

logger = get_logger(__name__)

THREADS = os.cpu_count() or 1  # more would wait for Python's lock

# Levels: a byte for each 0.1 s, the RMS of the mean of the channels in half
# decibels above -100 dBFS; 0 is that or less. 255 is +27.5 dBFS, which only
# files of floating-point samples can reach.
WINDOWS_PER_SECOND = 10
FLOOR_DB = -100.0
CODES_PER_DB = 2
SOUND_DB = -60.0
POWERS = 10 ** ((FLOOR_DB + np.arange(256) / CODES_PER_DB) / 10)
POWERS[0] = 0.0

# A progress bar for less than this is over before it is read.
MANY_FILES = 500


def list_audio(folder, findings, with_unread=True):
    """Lists the audio files below a folder: absolute path -> ``file_stat``.

    Links are followed, hidden files are not listed. `findings` takes folders
    that cannot be read and, `with_unread`, music of other formats. No folder is
    a FileNotFoundError, one without audio a ValueError.
    """
    if not folder or not os.path.isdir(folder):
        raise FileNotFoundError(
            f"folder={folder} is not a folder, expected one with music"
        )
    listing, visited, unread = {}, {}, defaultdict(list)
    for parent, folders, files in os.walk(
        os.path.abspath(folder),
        followlinks=True,
        onerror=lambda error: findings.skip([error.filename], error.strerror),
    ):
        first = visited.setdefault(os.path.realpath(parent), parent)
        if first != parent:
            findings.skip([parent], f"a link to {first}")
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            # macOS leaves "._song.wav", which is no audio, beside song.wav.
            if file.startswith("."):
                continue
            extension = os.path.splitext(file)[1].lower()
            path = os.path.join(parent, file)
            if extension in AUDIO_EXTENSIONS:
                listing[path] = file_stat(path)
            elif with_unread and extension in UNREAD_MUSIC:
                unread[UNREAD_MUSIC[extension]].append(path)
    for reason, paths in unread.items():
        findings.skip(sorted(paths), reason)
    if not listing:
        raise ValueError(
            f"no audio files under {folder}, expected "
            + " ".join(AUDIO_EXTENSIONS)
        )
    return dict(sorted(listing.items()))


def file_stat(path):
    """Size, time of change and mode of a file; None where there is none."""
    if not os.path.exists(path):
        return None
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_mode]


class FileCache:
    """What was read of the files of a folder, kept from run to run.

    Each method takes paths of the listing of ``list_audio`` and returns a dict:
    path -> what was read, or the UnreadableAudio that it raised. Errors are not
    kept: what could not be read is tried again. Each folder with music has a
    cache of its own, in `cache_folder`, by default
    ``$XDG_CACHE_HOME/trackformer_sb`` or ``~/.cache/trackformer_sb``.
    """

    def __init__(self, folder, listing, cache_folder=None):
        self.listing = listing
        if cache_folder is None:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            cache_folder = Path(base) / "trackformer_sb"
        name = hashlib.sha256(os.fsencode(os.path.abspath(folder))).hexdigest()
        self.path = Path(cache_folder) / f"audio-{name[:16]}.jsonl"
        # what was read -> path -> what the file was, and the value as of JSON
        self._kept = defaultdict(dict)
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
            "facts", paths, audio_info, lambda kept: AudioInfo(*kept)
        )

    def levels(self, paths):
        """What files contain, decoded: codes of ``measure_levels``."""
        return self._read(
            "levels",
            paths,
            measure_levels,
            lambda kept: np.frombuffer(base64.b64decode(kept), np.uint8),
        )

    def fingerprints(self, paths):
        """What files sound like: ``audio_fingerprint``."""
        return self._read("prints", paths, audio_fingerprint, str)

    def _read(self, kind, paths, read, from_json):
        def read_or_error(path):
            try:
                return read(path)
            except UnreadableAudio as error:
                return error

        kept, found, unknown = self._kept[kind], {}, []
        for path in dict.fromkeys(paths):
            if path in kept and kept[path][0] == self.listing[path]:
                found[path] = from_json(kept[path][1])
            else:
                unknown.append(path)
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
                if isinstance(value, np.ndarray):
                    value = base64.b64encode(value.tobytes()).decode()
                if not isinstance(value, UnreadableAudio):
                    line = [kind, path, self.listing[path], value]
                    file.write(json.dumps(line) + "\n")
        return found

    def _opened(self):
        """The cache, open to be added to; if it cannot be written, nothing."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # a name that is not UTF-8 is escaped by JSON
            return open(self.path, "a", encoding="ascii")
        except OSError as error:
            logger.warning(
                f"cache_folder: what is read is read again next time: {error}"
            )
            return open(os.devnull, "w", encoding="ascii")


def audio_fingerprint(path):
    """What a file sounds like at three places, whatever its name and tags.

    A hash of half a second of samples each at a fifth, a half and four fifths
    of the file, in 16 bits; "" for a file that is silent there.
    """
    digest, sounds = hashlib.sha256(), False
    with open_audio(path) as audio:
        for share in (0.2, 0.5, 0.8):
            count = audio.samplerate // 2 + 1
            block = decode(audio, int(share * audio.frames), count)
            # libsndfile would make integers of float files without scaling
            block *= 32767
            with np.errstate(invalid="ignore"):  # NaN, and beyond full scale
                block = block.astype(np.int16)
            sounds = sounds or bool(block.any())
            digest.update(block.tobytes())
    return digest.hexdigest() if sounds else ""


def measure_levels(path):
    """Decodes a file from beginning to end, a second at a time.

    Returns codes of levels, uint8 [windows]; what the last window lacks counts
    as silence. Raises UnreadableAudio for a file that is damaged, cut, or holds
    NaN or infinite samples.
    """
    with open_audio(path) as audio:
        edges = np.arange(WINDOWS_PER_SECOND + 1) * audio.samplerate
        edges //= WINDOWS_PER_SECOND
        sizes = np.diff(edges)
        mean_squares = []
        while len(block := read_on(audio, audio.samplerate)):
            squares = np.square(block.mean(axis=1, dtype=np.float64))
            starts = edges[:-1][edges[:-1] < len(block)]
            sum_squares = np.add.reduceat(squares, starts)
            mean_squares.append(sum_squares / sizes[: len(starts)])
    return _codes(np.concatenate(mean_squares))


def decibels(codes):
    """Codes as levels in dBFS RMS."""
    return FLOOR_DB + codes / CODES_PER_DB


def sum_levels(several):
    """Codes of the sum of files, as far as they are not correlated.

    Powers are added; shorter files are silent at their end.

    Example
    -------
    >>> drums, voice = np.array([160, 160], "uint8"), np.array([160], "uint8")
    >>> decibels(sum_levels([drums, voice]))
    array([-17., -20.])
    """
    power = np.zeros(max(map(len, several)))
    for codes in several:
        power[: len(codes)] += POWERS[codes]
    return _codes(power)


def segment_loudness(codes, start, duration):
    """RMS level of a segment in dBFS, and for which share of it it sounds.

    The level is right within 0.25 dB, -inf for silence; what counts as sound
    is above -60 dBFS. Start and duration are in seconds. A window of which the
    segment holds a part counts as one; past the end of the file all are silent.

    Example
    -------
    >>> codes = np.array([160, 0, 0], "uint8")
    >>> segment_loudness(codes, 0, 0.1), segment_loudness(codes, 0.1, 0.2)
    ((-20.0, 1.0), (-inf, 0.0))
    """
    # 0.3 s is 2.9999999999999996 windows of 0.1 s
    first = math.floor(start * WINDOWS_PER_SECOND + 1e-6)
    end = math.ceil((start + duration) * WINDOWS_PER_SECOND - 1e-6)
    num_windows = max(end - first, 1)
    part = codes[first : first + num_windows]
    power = float(POWERS[part].sum()) / num_windows
    level = 10 * math.log10(power) if power else -math.inf
    return level, int((decibels(part) > SOUND_DB).sum()) / num_windows


def _codes(power):
    """Mean squares as codes."""
    codes = 10 * np.log10(np.maximum(power, 1e-15)) - FLOOR_DB
    return np.rint(codes * CODES_PER_DB).clip(0, 255).astype(np.uint8)


def write_json(path, content):
    """Writes a file of JSON, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(unfinished, path)
