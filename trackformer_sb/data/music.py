"""A folder of music: its songs, what is left out and why, and their split.

A song is a name and its tracks. In a folder of `stems` every folder with audio
files is a song and every file in it an instrument; the sum of the stems is the
song, so a file named mix or mixture beside them is left out. In a folder of
`mixtures` every audio file is a song with the single track "mixture". `demo` is
the built-in demo band, a folder of stems made on the spot, `midi` one that
``trackformer make-music`` has made. How `moisesdb`, `musdb18hq` and `slakh2100`
lie on disk is in ``layouts``; `shards` are read by ``shard_reading``.

Everything here goes by sorted paths, so nothing depends on the order in which a
file system lists its files.
"""

import fnmatch
import glob
import hashlib
import json
import math
import os
import re
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from numbers import Real
from pathlib import Path

import yaml
from speechbrain.utils.logger import get_logger

from trackformer_sb.data.audio import UnreadableAudio
from trackformer_sb.data.files import SILENT, FileCache, file_stat, list_audio
from trackformer_sb.data.layouts import (
    LAYOUTS,
    group_stems,
    keep_few_stems,
    moisesdb_songs,
    musdb18hq_songs,
    slakh2100_songs,
)
from trackformer_sb.data.levels import active_share, segment_level, sum_levels
from trackformer_sb.data.manifest import write_manifest
from trackformer_sb.data.report import draw_songs
from trackformer_sb.data.songs import (
    Findings,
    mixture_songs,
    skipped_table,
    stem_songs,
)

logger = get_logger(__name__)

FINDERS = {
    "stems": stem_songs,
    "midi": stem_songs,
    "mixtures": mixture_songs,
    "moisesdb": moisesdb_songs,
    "musdb18hq": musdb18hq_songs,
    "slakh2100": slakh2100_songs,
}
DATASETS = ("demo", *FINDERS, "shards")
SPLIT_BY = ("auto", "by_song", "from_file")
AUDIO_CHECKS = ("header", "full")
SPLITS = ("train", "valid", "test")
REPORT = "data_report.json"

# MixIT mixes segments of two songs: a split of one song has no pairs.
MIN_SONGS = 2

# Longer names end in a hash, for folders and files are called after songs.
LONGEST_NAME = 150


class Music:
    """A folder of music, and one to test on if there is another.

    Nothing is read before a method is called. What the last call left out is in
    `skipped`, a list of {"file", "reason"}, what looked odd in `warnings`.

    Arguments
    ---------
    folder : str or Path, optional
        Where the music is. With `demo` it may be None: the band is then written
        to `demo_band` in the folder that ``prepare`` is given.
    dataset : str
        demo, stems, midi, mixtures, moisesdb, musdb18hq, slakh2100 or shards;
        see the head of this module.
    test_folder : str or Path, optional
        Music to test on. Then `folder` is split into train and valid only, by
        the first two parts of `split_ratio`, less songs with music of this one.
    test_dataset : str
        What `test_folder` holds.
    split : str
        "auto": as the dataset itself says, otherwise as "by_song": at random;
        "from_file": as `split_file` lists.
    split_file : str or Path, optional
        Yaml or json file: {train: [...], valid: [...], test: [...]}, in each
        paths of songs below `folder`, with or without ending, or patterns of
        them with ``*``; other songs are left out.
    split_ratio : sequence of three numbers
        Parts of train, valid and test; every split gets at least two songs.
    seed : int
        Of the split at random, see ``split_songs``.
    stem_groups : dict, optional
        Group name -> list of patterns of track names, see
        ``layouts.group_stems``.
    max_stems : int, optional
        Songs with more stems, after grouping, are left out.
    audio_check : str
        "header": the headers of files are read, damage shows itself in
        training; "full": files are decoded once, damaged ones are left out.
    min_active_share : float
        Segments of train and valid of which a smaller share sounds are left
        out, in [0, 1]; above 0 all files are decoded once.
    min_level_db : float, optional
        Segments of train and valid below this level, in dBFS RMS, are left
        out; all files are decoded once.
    strict : bool
        Whether the first file that cannot be used is an error instead.
    cache_folder : str or Path, optional
        Where what was read is kept from run to run, see ``files.FileCache``.
    sample_rate : int
        Rate of the demo band in Hz. Other music is resampled on reading.
    segment_hop_seconds : float, optional
        Distance of the starts of two segments; default their length.
    shard_urls : str or list of str, optional
        With `shards`, where those to train on are, see
        ``shards.list_shards``; default all in `folder`.
    demo_songs : int
        Number of songs of the demo band.
    demo_seconds : float
        Length of its songs in seconds.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Example
    -------
    >>> import tempfile, soundfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.mkdir(f"{folder}/songs")
    ...     for i in range(10):
    ...         path = f"{folder}/songs/{i}.wav"
    ...         soundfile.write(path, [i / 10] * 700, 100)
    ...     music = Music(f"{folder}/songs", "mixtures", cache_folder=folder)
    ...     report = music.prepare(f"{folder}/manifests", segment_seconds=3.0)
    >>> {split: report["splits"][split]["segments"] for split in SPLITS}
    {'train': 12, 'valid': 4, 'test': 4}
    """

    def __init__(
        self,
        folder=None,
        dataset="mixtures",
        test_folder=None,
        test_dataset="stems",
        split="auto",
        split_file=None,
        split_ratio=(80, 10, 10),
        seed=0,
        stem_groups=None,
        max_stems=None,
        audio_check="header",
        min_active_share=0.0,
        min_level_db=None,
        strict=False,
        cache_folder=None,
        sample_rate=44100,
        segment_hop_seconds=None,
        shard_urls=None,
        demo_songs=60,
        demo_seconds=24.0,
    ):
        for name, value, known in (
            ("dataset", dataset, DATASETS),
            ("test_dataset", test_dataset, tuple(FINDERS)),
            ("split", split, SPLIT_BY),
            ("audio_check", audio_check, AUDIO_CHECKS),
        ):
            expected = f"one of {', '.join(known)}"
            _expect(name, value, expected, value in known)
        if (split == "from_file") != bool(split_file):
            raise ValueError(
                "expected split: from_file and a split_file, or neither, got "
                f"split: {split} and split_file: {split_file}"
            )
        fits = len(split_ratio) == 3 and min(split_ratio) > 0
        _expect("split_ratio", split_ratio, "three positive numbers", fits)
        fits = 0 <= min_active_share <= 1
        _expect("min_active_share", min_active_share, "0 to 1", fits)
        fits = isinstance(min_level_db, Real) and min_level_db <= 0
        fits = fits or min_level_db is None
        _expect("min_level_db", min_level_db, "dBFS, at most 0, or null", fits)
        group_stems([], stem_groups)
        keep_few_stems([], max_stems, Findings())
        self.folder, self.dataset = folder, dataset
        self.test_folder, self.test_dataset = test_folder, test_dataset
        self.split_by, self.split_file = split, split_file
        self.split_ratio = list(split_ratio)[: 2 if test_folder else 3]
        self.seed = seed
        self.stem_groups, self.max_stems = stem_groups, max_stems
        self.audio_check = audio_check
        self.min_active_share = min_active_share
        self.min_level_db = min_level_db
        self.strict = strict
        self.cache_folder = cache_folder
        self.sample_rate = sample_rate
        self.segment_hop_seconds = segment_hop_seconds
        self.shard_urls = shard_urls
        self.demo_songs, self.demo_seconds = demo_songs, demo_seconds
        self._findings, self._splits = Findings(strict), None

    @property
    def skipped(self):
        """What was left out: list of {"file", "reason"}."""
        return self._findings.skipped

    @property
    def warnings(self):
        """What looked odd: list of str."""
        return self._findings.warnings

    def songs(self, segment_seconds=0.0):
        """The usable songs of `folder`.

        Arguments
        ---------
        segment_seconds : float
            Shorter songs are left out.

        Returns
        -------
        list of Song
            With their lengths, sorted by name.

        Raises
        ------
        FileNotFoundError
            If the folder is not there.
        ValueError
            If it has no usable song.
        """
        listing = self._list()["folder"]
        return self._read("folder", listing, segment_seconds)

    def split(self, segment_seconds=0.0):
        """The usable songs of `folder` and `test_folder`, split by song.

        A song that is there twice is there once, and no file of a song to test
        on is one of another split, nor one to validate on in train.

        Arguments
        ---------
        segment_seconds : float
            Shorter songs are left out.

        Returns
        -------
        dict
            train, valid and test -> list of Song sorted by name.

        Raises
        ------
        FileNotFoundError
            If a folder or `split_file` is not there.
        ValueError
            If a folder has no usable song, or a split fewer than two.
        """
        return self._split(self._list(), segment_seconds)

    def prepare(self, out_folder, segment_seconds=3.0):
        """Writes manifests of train, valid and test, and data_report.json.

        Nothing is written when settings, paths, sizes and times of change are
        those of the last run. ``manifest.MappedManifest`` reads manifests.

        Arguments
        ---------
        out_folder : str or Path
            Where they go.
        segment_seconds : float
            Length of a segment in seconds; shorter songs are left out.

        Returns
        -------
        dict
            The content of data_report.json: songs, hours and segments of each
            split, rates and stems of the files, what was skipped and why,
            warnings.

        Raises
        ------
        FileNotFoundError, ValueError
            As ``split``, or if a length is not positive.
        """
        out_folder = Path(out_folder)
        hop = self.segment_hop_seconds or segment_seconds
        for name, value in (("segment", segment_seconds), ("segment_hop", hop)):
            _expect(f"{name}_seconds", value, "seconds above 0", value > 0)
        if self.dataset == "demo":
            # Imported here: real music does not need the band.
            from trackformer_sb.data.band import make_band

            self.folder = make_band(
                self.folder or out_folder / "demo_band",
                num_songs=self.demo_songs,
                seconds=self.demo_seconds,
                sample_rate=self.sample_rate,
                progress=True,
            )
        listings = self._list()
        settings = self._settings() | {
            "segment_seconds": segment_seconds,
            "segment_hop_seconds": hop,
        }
        fingerprint = self._fingerprint(settings, listings)
        if (out_folder / REPORT).is_file():
            text = (out_folder / REPORT).read_text(encoding="utf-8")
            report = json.loads(text)
            if report["fingerprint"] == fingerprint:
                logger.info("%s is up to date", out_folder)
                return report
        splits = self._split(listings, segment_seconds)
        rows, left_out = self._choose_segments(splits, segment_seconds, hop)
        report = {
            "settings": settings,
            "fingerprint": fingerprint,
            "splits": {
                split: {
                    "songs": len(part),
                    "hours": sum(song.seconds for _, song, _ in part) / 3600,
                    "segments": sum(len(numbers) for *_, numbers in part),
                    "song_names": [name for name, *_ in part],
                    "song_paths": [song.path for _, song, _ in part],
                }
                for split, part in rows.items()
            },
            "segments_left_out": left_out,
            **self._counts(rows),
            "skipped": self.skipped,
            "warnings": self.warnings,
        }
        if self.skipped:
            logger.info("%s", skipped_table(self.skipped))
        out_folder.mkdir(parents=True, exist_ok=True)
        # Killed halfway, none vouches for a mixture of old and new manifests.
        (out_folder / REPORT).unlink(missing_ok=True)
        for split, part in rows.items():
            lines = [
                (_line(name, song, segment_seconds, hop), numbers)
                for name, song, numbers in part
            ]
            write_manifest(out_folder, split, lines)
        unfinished = out_folder / f".{REPORT}.{os.getpid()}"
        unfinished.write_text(json.dumps(report, indent=2), encoding="utf-8")
        os.replace(unfinished, out_folder / REPORT)
        return report

    def figures(self, out_folder, segment_seconds=0.0):
        """Draws lengths, and where files are decoded levels and activity.

        Arguments
        ---------
        out_folder : str or Path
            Where the pictures go.
        segment_seconds : float
            Shorter songs are left out.

        Returns
        -------
        list of Path
            The pictures.
        """
        # those of ``prepare``, if it had anything to do
        splits = self._splits or self.split(segment_seconds)
        return draw_songs(splits, self._levels, Path(out_folder))

    @property
    def _sources(self):
        """Key -> folder and dataset of the folders with music."""
        dataset = "stems" if self.dataset == "demo" else self.dataset
        sources = {"folder": (self.folder, dataset)}
        if self.test_folder:
            sources["test_folder"] = self.test_folder, self.test_dataset
        return sources

    @property
    def _filters(self):
        """Whether segments are chosen by their levels."""
        return self.min_active_share > 0 or self.min_level_db is not None

    def _list(self):
        """The files of each folder; nothing is left out yet."""
        if self.dataset == "shards":
            raise ValueError(
                "dataset: expected music, shards are ready to be trained on"
            )
        self._findings, self._splits = Findings(self.strict), None
        self._caches, self._headers, self._levels = [], {}, {}
        return {
            key: list_audio(folder, self._findings, key)
            for key, (folder, _) in self._sources.items()
        }

    def _settings(self):
        """What the split and the segments depend on, for the report."""
        settings = {"data_folder": os.path.abspath(self.folder)}
        if self.test_folder:
            settings["test_folder"] = os.path.abspath(self.test_folder)
        return settings | {
            "dataset": self.dataset,
            "test_dataset": self.test_dataset if self.test_folder else None,
            "split_ratio": self.split_ratio,
            "seed": self.seed,
            "sample_rate": self.sample_rate,
            "split": self.split_by,
            "split_file": self.split_file and str(self.split_file),
            "stem_groups": self.stem_groups,
            "max_stems": self.max_stems,
            "audio_check": self.audio_check,
            "min_active_share": self.min_active_share,
            "min_level_db": self.min_level_db,
            "strict": self.strict,
        }

    def _fingerprint(self, settings, listings):
        """Hash of the settings and of what tells a changed file."""
        described = []
        for folder, dataset in self._sources.values():
            if dataset in LAYOUTS:
                # the files that describe songs, and lie where songs do
                marker = LAYOUTS[dataset][0]
                names = glob.glob(marker, root_dir=folder)
                names += glob.glob(f"*/{marker}", root_dir=folder)
                paths = [os.path.join(folder, name) for name in sorted(names)]
                described.append([[path, file_stat(path)] for path in paths])
        if self.split_file:
            described.append(Path(self.split_file).read_text("utf-8"))
        known = json.dumps([settings, listings, described])
        return hashlib.sha256(known.encode()).hexdigest()

    def _read(self, key, listing, segment_seconds):
        """The usable songs of a folder, sorted by name."""
        folder, dataset = self._sources[key]
        songs = FINDERS[dataset](folder, listing, self._findings)
        self._warn_of_groups(songs)
        songs = group_stems(songs, self.stem_groups)
        songs = keep_few_stems(songs, self.max_stems, self._findings)
        if self.split_file and key == "folder":
            songs = _read_split_file(self.split_file, songs)
        songs.sort(key=lambda song: song.name)
        cache = FileCache(folder, listing, self.cache_folder)
        headers = cache.headers(x for song in songs for x in song.sounds)
        songs = self._keep(songs, _unreadable(headers))
        songs = [
            song._replace(seconds=max(headers[x].duration for x in song.files))
            for song in songs
        ]
        short = f"shorter than segment_seconds={segment_seconds}"
        songs = self._keep(
            songs,
            lambda song: song.seconds < segment_seconds and short,
            unwanted=True,
        )
        if self.audio_check == "full" or self._filters:
            levels = cache.levels(x for song in songs for x in song.files)
            songs = self._keep(songs, _unreadable(levels))
            self._levels |= levels
        if not songs:
            raise ValueError(
                f"no usable songs under {key}={folder}: "
                + skipped_table(self.skipped)
            )
        odd = [
            song.name
            for song in songs
            if len({headers[path] for path in song.files}) > 1
        ]
        if odd:
            self._findings.warn(
                f"stems of {len(odd)} songs differ in length, rate or "
                f"channels, {odd[0]} first"
            )
        self._caches.append(cache)
        self._headers |= {x: headers[x] for song in songs for x in song.sounds}
        return songs

    def _keep(self, songs, rule, unwanted=False):
        """Leaves out the songs for which the rule gives a reason."""
        kept, left_out = [], defaultdict(list)
        for song in songs:
            reason = rule(song)
            if reason:
                left_out[reason].append(song.path)
            else:
                kept.append(song)
        for reason, paths in left_out.items():
            self._findings.skip(paths, reason, unwanted)
        return kept

    def _warn_of_groups(self, songs):
        """Warns of groups that no stem joins."""
        stems = sorted(
            {x for song in songs if song.has_stems for x in song.tracks}
        )
        lower = [stem.lower() for stem in stems]
        unused = [
            group
            for group, patterns in (self.stem_groups or {}).items()
            if not any(fnmatch.filter(lower, x.lower()) for x in patterns)
        ]
        if unused and stems:
            self._findings.warn(
                f"stem_groups: no stem is like those of {', '.join(unused)}; "
                f"there are {', '.join(stems[:20])}"
            )

    def _split(self, listings, segment_seconds):
        """Train, valid and test: no song and no file is in two of them."""
        read = {
            key: self._read(key, listing, segment_seconds)
            for key, listing in listings.items()
        }
        songs, tests = read["folder"], read.get("test_folder", [])
        own = self.split_by == "from_file" or (
            self.split_by == "auto" and any(song.split for song in songs)
        )
        # of songs that are one, that which is held back stays
        held_back_first = ("test", "valid", "train", "")
        if own:
            songs.sort(key=lambda song: held_back_first.index(song.split))
        else:
            songs.sort(key=lambda song: _number(song, self.seed))
        fingerprints = self._fingerprints()
        tests, songs = self._apart([tests, songs], fingerprints)
        if own:
            splits = self._own_splits(songs)
        else:
            splits = split_songs(songs, self.split_ratio, self.seed)
        if self.test_folder:
            splits["test"] = tests
        test, valid, train = self._apart(
            [splits[name] for name in held_back_first[:3]], fingerprints
        )
        self._splits = {"train": train, "valid": valid, "test": test}
        self._check_enough(self._splits)
        return self._splits

    def _own_splits(self, songs):
        """The splits that the dataset or the split file defines."""
        names = SPLITS[: len(self.split_ratio)]
        none = f"in none of {', '.join(names)}"
        songs = self._keep(
            songs,
            lambda song: song.split not in names and none,
            unwanted=True,
        )
        songs.sort(key=lambda song: song.name)
        return {
            name: [song for song in songs if song.split == name]
            for name in names
        }

    def _check_enough(self, splits):
        """Refuses splits of fewer than two songs."""
        sizes = {split: len(part) for split, part in splits.items()}
        if min(sizes.values()) < MIN_SONGS:
            raise ValueError(
                f"expected at least {MIN_SONGS} songs in each split, got "
                f"{sizes} of {self.folder} with split: {self.split_by} "
                "(by_song splits all songs at random); "
                + skipped_table(self.skipped)
            )

    def _fingerprints(self):
        """Path -> what is equal for files that sound alike.

        Only files of equal length, rate and channels are read.
        """
        count = Counter(self._headers.values())
        alike = [x for x, info in self._headers.items() if count[info] > 1]
        fingerprints = {path: path for path in self._headers}
        for cache in self._caches:
            read = cache.fingerprints(x for x in alike if x in cache.listing)
            for path, value in read.items():
                if not isinstance(value, UnreadableAudio):
                    fingerprints[path] = value
        return fingerprints

    def _apart(self, groups, fingerprints):
        """Leaves out copies, and songs with music of an earlier group.

        A copy has all its files in common with an earlier song. As remixes do,
        songs of one group may share some of their files.
        """
        originals, held, apart = {}, {}, []
        for group in groups:
            kept, heard = [], {}
            for song in group:
                files = tuple(sorted(fingerprints[x] for x in song.files))
                sounds = {fingerprints[x] for x in song.sounds}
                sounds = [x for x in sounds if not x.startswith(SILENT)]
                shared = next((held[x] for x in sounds if x in held), None)
                if files in originals:
                    reason = f"a copy of {originals[files]}"
                elif shared:
                    reason = f"it has music of the held-out song {shared}"
                else:
                    kept.append(song)
                    originals[files] = song.path
                    heard |= dict.fromkeys(sounds, song.path)
                    continue
                self._findings.skip([song.path], reason, unwanted=True)
            held |= heard
            apart.append(kept)
        return apart

    def _choose_segments(self, splits, segment_seconds, hop):
        """Split -> name, song, segments; and how many segments do not count.

        Only whole segments count, one every hop, and of train and valid only
        those that are as active and as loud as asked.
        """
        rows, left_out, silent = {split: [] for split in SPLITS}, 0, []
        least = -math.inf if self.min_level_db is None else self.min_level_db
        for split, name, song in _safe_names(splits):
            # Lengths and hops in decimal seconds are not exact.
            hops = (song.seconds - segment_seconds) / hop + 1e-6
            numbers = list(range(math.floor(hops) + 1))
            chosen = numbers
            if split != "test" and self._filters:
                codes = sum_levels([self._levels[path] for path in song.files])
                chosen = []
                for i in numbers:
                    what = codes, i * hop, segment_seconds
                    active = active_share(*what) >= self.min_active_share
                    if active and segment_level(*what) >= least:
                        chosen.append(i)
            left_out += len(numbers) - len(chosen)
            if chosen:
                rows[split].append((name, song, chosen))
            else:
                silent.append(song.path)
        reason = "no segment passes min_active_share and min_level_db"
        self._findings.skip(silent, reason, unwanted=True)
        self._check_enough(rows)
        return rows, left_out

    def _counts(self, rows):
        """How many files of which rate and channels, songs of which stem."""
        songs = [song for part in rows.values() for _, song, _ in part]
        infos = [self._headers[path] for song in songs for path in song.files]
        stems = [x for song in songs if song.has_stems for x in song.tracks]
        return {
            "sample_rates": dict(Counter(str(x.sample_rate) for x in infos)),
            "channels": dict(Counter(str(x.channels) for x in infos)),
            "stems": dict(Counter(stems).most_common()),
        }


def _expect(name, value, expected, fits):
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _unreadable(read):
    """A rule: songs with a file that could not be read are left out."""

    def rule(song):
        errors = [read[path] for path in song.files]
        errors = [x for x in errors if isinstance(x, UnreadableAudio)]
        if not errors:
            return None
        reason = str(errors[0]).removeprefix(f"{errors[0].path}: ")
        if not song.has_stems:
            return reason
        return f"{reason} ({os.path.relpath(errors[0].path, song.path)})"

    return rule


def _line(name, song, segment_seconds, hop):
    """The line of a song in a manifest."""
    return {
        "song": name,
        "tracks": {
            track: paths[0] if len(paths) == 1 else list(paths)
            for track, paths in song.tracks.items()
        },
        "duration": segment_seconds,
        "hop": hop,
        "song_seconds": song.seconds,
        "has_stems": song.has_stems,
    }


def _safe_names(splits):
    """Split, name and song, sorted by name: unique, A-Z a-z 0-9 _ . - only.

    Names that would be equal (case aside), or too long for that of a file, end
    in a hash.
    """
    groups = defaultdict(list)
    for split, songs in splits.items():
        for song in songs:
            safe = re.sub(r"[^A-Za-z0-9_.-]", "_", _without_ending(song))
            groups[safe.lower()].append((split, safe, song))
    named = []
    for group in groups.values():
        for split, safe, song in group:
            if len(group) > 1 or len(safe) > LONGEST_NAME:
                # fsencode, because a path need not be valid UTF-8.
                path = os.fsencode(f"{split}/{song.name}")
                digest = hashlib.sha256(path).hexdigest()[:8]
                safe = f"{safe[:LONGEST_NAME]}_{digest}"
            named.append((split, safe, song))
    return sorted(named, key=lambda item: item[1])


def _without_ending(song):
    return song.name if song.has_stems else os.path.splitext(song.name)[0]


def _composed(name):
    """A name in the letters that most systems use; macOS takes some apart."""
    return unicodedata.normalize("NFC", name)


def _number(song, seed):
    """A number in [0, 1) that depends on a seed and the song's name alone."""
    text = os.fsencode(f"{seed}/{_composed(_without_ending(song))}")
    digest = hashlib.sha256(text).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_songs(songs, split_ratio, seed):
    """Splits songs at random, so that a library that grows keeps its split.

    Each song has a number in [0, 1) that depends on the seed and its name
    alone. Numbers below the share of test are tested on, from there to that of
    valid validated on. A split that has fewer than two songs then gets those
    of the next numbers.

    Arguments
    ---------
    songs : list of Song
        Usable songs in any order.
    split_ratio : sequence of numbers
        Parts of train, valid and, if there are three, test.
    seed : int
        Of the numbers.

    Returns
    -------
    dict
        Split -> list of Song sorted by name.

    Example
    -------
    >>> from trackformer_sb.data.songs import Song
    >>> songs = [Song(f"song_{i}", {}, has_stems=True) for i in range(1000)]
    >>> splits = split_songs(songs, (80, 10, 10), seed=0)
    >>> {split: len(part) for split, part in splits.items()}
    {'train': 787, 'valid': 97, 'test': 116}
    """
    names = SPLITS[: len(split_ratio)]
    songs = sorted(songs, key=lambda song: _number(song, seed))
    numbers = [_number(song, seed) for song in songs]
    splits, begin, share = {}, 0, 0.0
    for later in range(len(names) - 1, 0, -1):
        share += split_ratio[later] / sum(split_ratio)
        end = max(bisect_left(numbers, share), begin + MIN_SONGS)
        end = max(begin, min(end, len(songs) - MIN_SONGS * later))
        splits[names[later]] = songs[begin:end]
        begin = end
    splits["train"] = songs[begin:]
    return {
        name: sorted(splits[name], key=lambda song: song.name) for name in names
    }


def _read_split_file(path, songs):
    """Gives songs the splits that a file lists, "" to those it does not."""
    where = f"split_file={path}"
    with open(path, encoding="utf-8") as file:
        # names stay as they are written, 010 and no as well
        lists = yaml.load(file, yaml.BaseLoader)
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
        for name in {song.name, _without_ending(song)}:
            by_name[_composed(name)].append(i)
    found = {}
    for split, names in lists.items():
        for name in map(_composed, names):
            matches = by_name.get(name) or [
                i
                for known, numbers in by_name.items()
                if fnmatch.fnmatchcase(known, name)
                for i in numbers
            ]
            if not matches:
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
