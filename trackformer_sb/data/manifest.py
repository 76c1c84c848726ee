"""The segments of a split, on disk: read when asked for, never all at once.

A manifest is two files. ``<split>.jsonl`` has a line of JSON for each song;
``<split>.npy`` has a column for each segment: the number of its song, its own
number within the song, and where the line of the song begins. Both are mapped
into memory, so a loader worker holds the pages it reads, and those are shared.
"""

import json
import math
import mmap
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


class Manifest(Mapping):
    """Segments in memory: segment id -> row, in the order of songs and ids.

    A row has at least "song".

    Example
    -------
    >>> rows = {
    ...     "b_0": {"song": "b"},
    ...     "a_1": {"song": "a"},
    ...     "a_0": {"song": "a"},
    ... }
    >>> manifest = Manifest(rows)
    >>> list(manifest), manifest.index("b_0"), manifest.song_range(1)
    (['a_0', 'a_1', 'b_0'], 2, (0, 2))
    """

    def __init__(self, rows):
        self.ids = sorted(rows, key=lambda item: (rows[item]["song"], item))
        self._rows = [rows[item] for item in self.ids]
        self._index = {item: i for i, item in enumerate(self.ids)}
        names = [row["song"] for row in self._rows]
        _, self._songs = np.unique(names, return_inverse=True)

    def __len__(self):
        return len(self._songs)

    def __iter__(self):
        return iter(self.ids)

    def __getitem__(self, segment_id):
        return self.row(self.index(segment_id))

    @property
    def num_songs(self):
        """Number of songs."""
        return int(self._songs[-1]) + 1 if len(self._songs) else 0

    def index(self, segment_id):
        """Place of a segment in the order of songs and ids, or a KeyError."""
        return self._index[segment_id]

    def row(self, index):
        """The row of the segment at a place."""
        return self._rows[index]

    def song_range(self, index):
        """First place of the song of a segment, and the one after its last."""
        song = self._songs[index]
        return (
            int(np.searchsorted(self._songs, song)),
            int(np.searchsorted(self._songs, song, side="right")),
        )


class MappedManifest(Manifest):
    """Segments on disk, as ``write_manifest`` leaves them.

    A row is {"song": str, "tracks": {name: path, or list of paths to add},
    "start": seconds, "duration": seconds, "song_seconds": seconds,
    "has_stems": bool}; the id of a segment is its song and its number.

    Arguments
    ---------
    folder : str or Path
        Where the files are; relative paths of tracks are relative to it.
    split : str
        Their name without ending.
    longest : float, optional
        Of longer segments only the first so many seconds are given.

    Raises
    ------
    FileNotFoundError
        If one of the files is not there.

    Example
    -------
    >>> import tempfile
    >>> line = {"song": "a", "tracks": {"mixture": "/a.wav"}, "duration": 3.0}
    >>> line.update(hop=3.0, song_seconds=9.5, has_stems=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_manifest(folder, "train", [(line, range(3))])
    ...     manifest = MappedManifest(folder, "train")
    ...     manifest.ids[2], manifest["a_0002"]["start"]
    ('a_0002', 6.0)
    """

    def __init__(self, folder, split, longest=math.inf):
        self.folder, self.split = os.path.abspath(folder), split
        self.longest = longest
        base = Path(self.folder) / self.split
        columns = np.load(f"{base}.npy", mmap_mode="r")
        self._songs, self._numbers, self._offsets = columns
        with open(f"{base}.jsonl", "rb") as file:
            self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.ids = _Ids(self)

    # a map is not pickled, but opened again
    def __reduce__(self):
        return MappedManifest, (self.folder, self.split, self.longest)

    def _line(self, index):
        begin = int(self._offsets[index])
        return json.loads(self._lines[begin : self._lines.find(b"\n", begin)])

    def _key(self, index):
        return self._line(index)["song"], int(self._numbers[index])

    def segment_id(self, index):
        """The id of the segment at a place."""
        song, number = self._key(index)
        return f"{song}_{number:04d}"

    def index(self, segment_id):
        """Place of a segment, see ``Manifest.index``."""
        song, _, number = str(segment_id).rpartition("_")
        if number.isdecimal():
            wanted = song, int(number)
            place = bisect_left(range(len(self)), wanted, key=self._key)
            if place < len(self) and self.segment_id(place) == segment_id:
                return place
        raise KeyError(segment_id)

    def row(self, index):
        """The row of the segment at a place."""
        line = self._line(index)
        hop = line.pop("hop")
        line["start"] = round(int(self._numbers[index]) * hop, 6)
        line["duration"] = min(line["duration"], self.longest)
        tracks = line["tracks"]
        for name, files in tracks.items():
            if isinstance(files, str):
                tracks[name] = os.path.join(self.folder, files)
            else:
                tracks[name] = [os.path.join(self.folder, x) for x in files]
        return line


class _Ids(Sequence):
    """The ids of a manifest, each made when it is asked for."""

    def __init__(self, manifest):
        self.manifest = manifest

    def __len__(self):
        return len(self.manifest)

    def __getitem__(self, index):
        return self.manifest.segment_id(index)


def write_manifest(folder, split, songs):
    """Writes the songs of a split and which of their segments count.

    `songs` yields the line of a song, a dict with "song", "tracks", "duration"
    and "hop" (of its segments, in seconds), "song_seconds" and "has_stems", and
    the numbers of its segments, one or more, sorted by "song". `folder` is
    there already, `split` the name of the files.
    """
    base = Path(folder) / split
    columns, offset = [np.empty((3, 0), np.int64)], 0
    unfinished = Path(folder) / f".{split}.{os.getpid()}"
    with open(unfinished, "wb") as file:
        for line, numbers in songs:
            part = np.empty((3, len(numbers)), np.int64)
            part[0], part[1], part[2] = len(columns) - 1, numbers, offset
            columns.append(part)
            offset += file.write(json.dumps(line).encode() + b"\n")
    os.replace(unfinished, f"{base}.jsonl")
    with open(unfinished, "wb") as file:
        np.save(file, np.concatenate(columns, axis=1))
    os.replace(unfinished, f"{base}.npy")


def read_songs(folder, split):
    """The songs of a split, a dict each, as ``write_manifest`` left them."""
    with open(Path(folder) / f"{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
