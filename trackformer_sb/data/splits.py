"""Train, valid and test: no song is in two of them."""

import fnmatch
import json
import os
import unicodedata
from collections import defaultdict

import numpy as np
import yaml

from trackformer_sb.data.songs import real_path

SPLITS = ("train", "valid", "test")

# Settings that splits go by; others leave out songs, or segments of them.
SPLIT_KEYS = (
    *("data_folder", "dataset", "test_folder", "test_dataset"),
    *("split", "split_file", "split_ratio", "seed"),
)

# MixIT mixes segments of two songs: a split of one song has no pairs.
MIN_SONGS = 2


def make_splits(songs, sources, split, split_ratio, seed, findings, known=None):
    """Train, valid and test, as the dataset says or at random.

    Arguments
    ---------
    songs : dict
        "data_folder", and "test_folder" if there is one -> list of usable Song.
    sources : dict
        The same keys -> (folder, dataset), for messages.
    split : str
        auto, by_song or from_file: as the dataset or the file says, where auto
        splits at random what has no splits, by_song everything.
    split_ratio, seed
        See ``split_songs``.
    findings : Findings
        Takes songs that belong to no split.
    known : dict, optional
        What ``places_of`` an earlier run with these settings returned: a
        library that has grown keeps its split, and what is new is trained on.

    Returns
    -------
    dict
        Split -> list of Song sorted by name.

    Raises
    ------
    ValueError
        If a split has fewer than two songs.
    """
    where = f"data_folder={sources['data_folder'][0]}"
    to_split, tests = songs["data_folder"], songs.get("test_folder")
    own = split == "from_file" or any(song.split for song in to_split)
    if split == "by_song" or not own:
        splits = _kept_split(to_split, known, split_ratio)
        if splits is None:
            if known:
                findings.warn(
                    f"of an earlier split of {where} too few songs are left: "
                    "songs are split anew, and some that were tested on may "
                    "be trained on"
                )
            splits = split_songs(where, to_split, split_ratio, seed)
    else:
        splits = own_splits(where, to_split, findings, tests is not None)
    if tests is not None:
        if len(tests) < MIN_SONGS:
            raise ValueError(
                f"found {len(tests)} usable songs under "
                f"test_folder={sources['test_folder'][0]}, expected at least "
                f"{MIN_SONGS}"
            )
        splits["test"] = tests
    return splits


def places_of(report, settings):
    """Where songs were in an earlier run.

    Arguments
    ---------
    report : dict
        Of that run, see ``catalogue.prepare``.
    settings : dict
        Those of now.

    Returns
    -------
    dict
        ("path" or "name", that of a song) -> split. A song whose file has got
        another format since is known by its name alone. Empty if a setting
        that splits go by is another one.
    """
    asked, before = json.loads(json.dumps(settings)), report.get("settings", {})
    if any(before.get(key) != asked.get(key) for key in SPLIT_KEYS):
        return {}
    return {
        (kind, value): split
        # reports of earlier versions have no paths, and none that are absent
        for key in ("absent", "splits")
        for split, part in report.get(key, {}).items()
        for kind in ("name", "path")
        for value in part.get(f"song_{kind}s", ())
    }


def absent_places(known, splits):
    """Where songs were that are not there now, and may come back.

    Arguments
    ---------
    known : dict
        What ``places_of`` returned.
    splits : dict
        Split -> list of Song now.

    Returns
    -------
    dict
        Split -> {"song_names": [...], "song_paths": [...]}, for a report.
    """
    there = {
        place
        for part in splits.values()
        for song in part
        for place in (("name", song.name), ("path", song.path))
    }
    absent = {}
    for (kind, value), split in known.items():
        if (kind, value) not in there:
            part = absent.setdefault(
                split, {"song_names": [], "song_paths": []}
            )
            part[f"song_{kind}s"].append(value)
    return absent


def place_of(song, known):
    """The split that a song was in, "" if it is new.

    Arguments
    ---------
    song : Song
        The song.
    known : dict
        What ``places_of`` returned.

    Returns
    -------
    str
    """
    # by its path first: another song may have got the name
    keys = (("path", song.path), ("name", song.name))
    return next((known[key] for key in keys if key in known), "")


def _kept_split(songs, known, split_ratio):
    """The split of an earlier run, if enough of it is left."""
    if not known:
        return None
    splits = {name: [] for name in SPLITS[: len(split_ratio)]}
    for song in sorted(songs, key=lambda song: song.name):
        place = place_of(song, known)
        splits[place if place in splits else "train"].append(song)
    if min(map(len, splits.values())) < MIN_SONGS:
        return None
    return splits


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


def own_splits(where, songs, findings, tested_elsewhere=False):
    """The splits that the dataset itself defines.

    Arguments
    ---------
    where : str
        Yaml key and folder the songs are from, for messages.
    songs : list of Song
        Usable songs, with their `split`.
    findings : Findings
        Takes songs that belong to no split.
    tested_elsewhere : bool
        Whether there is another folder to test on: then the songs of the test
        split are left out, too.

    Returns
    -------
    dict
        Split -> list of Song sorted by name.

    Raises
    ------
    ValueError
        If a split has fewer than two songs.
    """
    names = SPLITS[:2] if tested_elsewhere else SPLITS
    splits = {name: [] for name in names}
    for song in sorted(songs, key=lambda song: song.name):
        if song.split in splits:
            splits[song.split].append(song)
        elif song.split:
            reason = "a test song, and test_folder is given"
            findings.skip(song.path, reason, unwanted=True)
        else:
            findings.skip(song.path, "in no split", unwanted=True)
    for name, part in splits.items():
        if len(part) < MIN_SONGS:
            raise ValueError(
                f"found {len(part)} {name} songs under {where}, expected at "
                f"least {MIN_SONGS}; with split=by_song all songs are split by "
                "split_ratio"
            )
    return splits


def _composed(name):
    """A name in the letters that most systems use; macOS takes some apart."""
    return unicodedata.normalize("NFC", name)


def _ways_to_name(path):
    """A path, without its ending, and the folders that it is in."""
    yield from (path, os.path.splitext(path)[0])
    while path := os.path.dirname(path):
        yield path


def read_split_file(path, songs, left_out=()):
    """Gives songs the splits that a file lists.

    Arguments
    ---------
    path : str or Path
        Yaml or json file: {train: [...], valid: [...], test: [...]}, in each
        paths of songs relative to the data folder, with or without ending,
        or patterns of them with ``*``.
    songs : list of Song
        Named by their path relative to the data folder.
    left_out : collection of str
        Paths of what else there is, relative to the data folder: named in the
        file, they are no error.

    Returns
    -------
    list of Song
        With their `split`; "" for those that are not listed.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not of this form, names a song that is not there, or one for
        two splits.
    """
    where = f"split_file={path}"
    if not path or not os.path.isfile(path):
        raise FileNotFoundError(
            f"{where} is not a file, expected a yaml with lists of songs for "
            f"{', '.join(SPLITS)} (split=from_file)"
        )
    with open(path, encoding="utf-8") as file:
        try:
            # names stay as they are written, 010 and no as well
            lists = yaml.load(file, yaml.BaseLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} is no yaml: {error}") from error
    if (
        not isinstance(lists, dict)
        or not set(lists) <= set(SPLITS)
        or not all(isinstance(names, list) for names in lists.values())
    ):
        raise ValueError(
            f"{where}: expected lists of songs under {', '.join(SPLITS)} only"
        )
    by_name = defaultdict(list)
    for i, song in enumerate(songs):
        for name in {song.name, os.path.splitext(song.name)[0]}:
            by_name[_composed(name)].append(i)
    # a file may be why a folder above it is no song
    without = {_composed(part) for x in left_out for part in _ways_to_name(x)}
    without -= {
        _composed(x) for song in songs for x in _ways_to_name(song.name)
    }
    found = {}
    for split, names in lists.items():
        for name in map(_composed, map(str, names)):
            matches = by_name.get(name) or [
                i
                for known, numbers in by_name.items()
                if fnmatch.fnmatchcase(known, name)
                for i in numbers
            ]
            gone = name in without or fnmatch.filter(without, name)
            if not matches and not gone:
                raise ValueError(f"{where}: no song {name!r} ({split})")
            for i in matches:
                if found.setdefault(i, split) != split:
                    raise ValueError(
                        f"{where}: {songs[i].name!r} is in {found[i]} and "
                        f"in {split}"
                    )
    return [
        song._replace(split=found.get(i, "")) for i, song in enumerate(songs)
    ]


def check_apart(songs, test_songs):
    """Refuses a file that is to be trained and tested on.

    Arguments
    ---------
    songs : list of Song
        Songs for train and valid.
    test_songs : list of Song
        Songs for test.

    Raises
    ------
    ValueError
        If one and the same file is in both.
    """
    real_paths = {real_path(p) for song in songs for p in song.sounds}
    for song in test_songs:
        for path in song.sounds:
            if real_path(path) in real_paths:
                raise ValueError(
                    f"{path} of test_folder is in data_folder as well: a test "
                    "song must not be trained on"
                )
