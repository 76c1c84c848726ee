"""Train, valid and test: no song is in two of them."""

import filecmp
import os
from collections import defaultdict

import numpy as np

SPLITS = ("train", "valid", "test")

# MixIT mixes segments of two songs: a split of one song has no pairs.
MIN_SONGS = 2


def split_songs(where, songs, split_ratio, seed):
    """Splits songs at random, the same for the same names and seed.

    Arguments
    ---------
    where : str
        Yaml key and folder the songs are from, for messages.
    songs : list of Song
        Usable songs in any order.
    split_ratio : sequence of numbers
        Parts of train, valid and, if there are three, test. They are rounded to
        whole songs, at least two in each split.
    seed : int
        Seed of the shuffle.

    Returns
    -------
    dict
        Split -> list of Song sorted by name.

    Raises
    ------
    ValueError
        If there are fewer than two songs a split.

    Example
    -------
    >>> from trackformer_sb.data.songs import Song
    >>> songs = [Song(f"song_{i}", {}, has_stems=True) for i in range(30)]
    >>> splits = split_songs("data_folder=/music", songs, (80, 10, 10), seed=0)
    >>> {split: len(part) for split, part in splits.items()}
    {'train': 24, 'valid': 3, 'test': 3}
    """
    names = SPLITS[: len(split_ratio)]
    if len(songs) < MIN_SONGS * len(names):
        raise ValueError(
            f"found {len(songs)} usable songs under {where}, expected at least "
            f"{MIN_SONGS * len(names)}: {MIN_SONGS} each for {', '.join(names)}"
        )
    total = sum(split_ratio)
    sizes = [
        max(MIN_SONGS, round(len(songs) * part / total))
        for part in split_ratio[1:]
    ]
    # The smallest splits are rounded up; train gets the rest, two at least.
    while sum(sizes) > len(songs) - MIN_SONGS:
        sizes[sizes.index(max(sizes))] -= 1
    songs = sorted(songs, key=lambda song: song.name)
    order = np.random.default_rng(seed).permutation(len(songs))
    ends = np.cumsum([len(songs) - sum(sizes), *sizes])
    return {
        name: [songs[i] for i in sorted(part)]
        for name, part in zip(names, np.split(order, ends[:-1]), strict=True)
    }


def songs_not_in_test(songs, test_songs, findings):
    """The songs to train on less those that are test songs under another path.

    Arguments
    ---------
    songs : list of Song
        Songs for train and valid.
    test_songs : list of Song
        Songs for test.
    findings : Findings
        Takes the songs left out.

    Returns
    -------
    list of Song
        Those whose files do not equal, by name and content, a test song's.

    Raises
    ------
    ValueError
        If one and the same file is in both.
    """
    paths = [path for song in songs for path in song.tracks.values()]
    real_paths = set(map(os.path.realpath, paths))
    for song in test_songs:
        for path in song.tracks.values():
            if os.path.realpath(path) in real_paths:
                raise ValueError(
                    f"{path} of test_folder is in data_folder as well: a test "
                    "song must not be trained on"
                )
    by_files = defaultdict(list)
    for song in test_songs:
        by_files[_files_and_sizes(song)].append(song)
    kept = []
    for song in songs:
        copies = by_files.get(_files_and_sizes(song), ())
        copy = next((c for c in copies if _same_content(song, c)), None)
        if copy is None:
            kept.append(song)
        else:
            findings.skip(song.path, f"a copy of the test song {copy.path}")
    return kept


def _files_and_sizes(song):
    return tuple(
        sorted(
            (os.path.basename(path), os.path.getsize(path))
            for path in song.tracks.values()
        )
    )


def _same_content(song, other):
    pairs = zip(
        sorted(song.tracks.values(), key=os.path.basename),
        sorted(other.tracks.values(), key=os.path.basename),
        strict=True,
    )
    return all(filecmp.cmp(a, b, shallow=False) for a, b in pairs)
