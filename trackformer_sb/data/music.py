"""A folder of music: its songs, what is left out and why, and their split.

A song is a name and its tracks. In a folder of `stems` every folder with audio
files is a song and every file in it an instrument; the sum of the stems is the
song, so a file named mix or mixture beside them is left out. In a folder of
`mixtures` every audio file is a song with the single track "mixture". `demo` is
the built-in demo band, a folder of stems made on the spot, `midi` one that
``trackformer make-music`` has made. How `moisesdb`, `musdb18hq` and `slakh2100`
lie on disk is in ``layouts``; `shards` are read by ``shards``.

Everything here goes by sorted paths, so nothing depends on the order in which a
file system lists its files.
"""

import dataclasses
import fnmatch
import functools
import hashlib
import json
import math
import os
import re
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from pathlib import Path

import yaml
from speechbrain.utils.logger import get_logger

from trackformer_sb.audio import UnreadableAudio
from trackformer_sb.data.files import (
    FileCache,
    file_stat,
    list_audio,
    segment_loudness,
    sum_levels,
    write_json,
)
from trackformer_sb.data.layouts import LAYOUTS, dataset_songs, group_stems
from trackformer_sb.data.manifest import write_manifest
from trackformer_sb.data.songs import (
    Findings,
    medians,
    mixture_songs,
    skipped_table,
    stem_songs,
)
from trackformer_sb.paths import expanded

logger = get_logger(__name__)

FINDERS = {
    "stems": stem_songs,
    "midi": stem_songs,
    "mixtures": mixture_songs,
    **{name: functools.partial(dataset_songs, name) for name in LAYOUTS},
}
SPLITS = ("train", "valid", "test")
# raised when songs or their lengths are found in another way
VERSION = 2
REPORT = "data_report.json"

# MixIT mixes segments of two songs: a split of one song has no pairs.
MIN_SONGS = 2

# Longer names end in a hash, for folders and files are called after songs.
LONGEST_NAME = 150


@dataclasses.dataclass
class Music:
    """A folder of music, and one to test on if there is another.

    Nothing is read before a method is called. What the last call left out, and
    what looked odd, is in `findings`, see ``songs.Findings``.

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
    cache_folder : str or Path, optional
        Where what was read is kept from run to run, see ``files.FileCache``.
    sample_rate : int
        Rate of the demo band in Hz. Other music is resampled on reading.
    segment_hop_seconds : float, optional
        Distance of the starts of two segments; default their length.
    shard_urls : str, optional
        With `shards`, where those to train on are if not in `folder`, with {}
        for their names, see ``shards.ShardedMixtures``.
    demo_songs, demo_seconds : int, float
        Number of songs of the demo band, and their length in seconds.

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

    folder: str | Path | None = None
    dataset: str = "mixtures"
    test_folder: str | Path | None = None
    test_dataset: str = "stems"
    split: str = "auto"
    split_file: str | Path | None = None
    split_ratio: tuple | list = (80, 10, 10)
    seed: int = 0
    stem_groups: dict | None = None
    max_stems: int | None = None
    audio_check: str = "header"
    min_active_share: float | int = 0.0
    min_level_db: float | int | None = None
    cache_folder: str | Path | None = None
    sample_rate: int = 44100
    segment_hop_seconds: float | int | None = None
    shard_urls: str | None = None
    demo_songs: int = 60
    demo_seconds: float | int = 24.0

    def __post_init__(self):
        for name in ("folder", "test_folder", "split_file", "cache_folder"):
            setattr(self, name, expanded(getattr(self, name)))
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            if not isinstance(value, kind):
                kind = getattr(kind, "__name__", kind)
                raise ValueError(
                    f"{field.name}: expected {kind}, got {value!r}"
                )
        for name, known in (
            ("dataset", ("demo", *FINDERS, "shards")),
            ("test_dataset", FINDERS),
            ("split", ("auto", "by_song", "from_file")),
            ("audio_check", ("header", "full")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f"{name}: expected one of {', '.join(known)}, got {value!r}"
                )
        if (self.split == "from_file") != bool(self.split_file):
            raise ValueError(
                "split_file: expected a file with split: from_file only, got "
                f"{self.split_file!r} with split: {self.split}"
            )
        if len(self.split_ratio) != 3 or min(self.split_ratio) <= 0:
            raise ValueError(
                "split_ratio: expected three positive numbers, got "
                f"{self.split_ratio}"
            )
        group_stems([], self.stem_groups)
        self.findings = Findings()

    def songs(self, segment_seconds=0.0):
        """The usable songs of `folder`, with what was read of them, by name.

        Songs shorter than a segment are left out. Raises FileNotFoundError if
        the folder is not there, ValueError if it has no usable song.
        """
        self._list(self._sources[:1])
        return self._read(*self._sources[0], segment_seconds)

    def prepare(self, out_folder, segment_seconds=3.0):
        """Splits by song; writes a manifest a split, and data_report.json.

        A song that is there twice is there once, and no file of a song to test
        on is one of another split, nor one to validate on in train. Nothing is
        written when settings, paths, sizes and times of change are those of the
        last run. ``manifest.MappedManifest`` reads manifests.

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
        FileNotFoundError
            If a folder or `split_file` is not there.
        ValueError
            If a folder has no usable song, or a split fewer than two.
        """
        out_folder = Path(out_folder)
        if self.dataset == "demo":
            # Imported here: real music does not need the band.
            from trackformer_sb.data.band import make_band

            self.folder = make_band(
                self.folder or out_folder / "demo_band",
                num_songs=self.demo_songs,
                seconds=self.demo_seconds,
                sample_rate=self.sample_rate,
            )
        self._list(self._sources)
        hop = self.segment_hop_seconds or segment_seconds
        settings = self._settings() | {
            "segment_seconds": segment_seconds,
            "segment_hop_seconds": hop,
        }
        fingerprint = self._fingerprint(settings)
        if (out_folder / REPORT).is_file():
            text = (out_folder / REPORT).read_text(encoding="utf-8")
            report = json.loads(text)
            if report["fingerprint"] == fingerprint:
                logger.info("%s is up to date", out_folder)
                return report
        rows, left_out = self._rows(self._split(segment_seconds), settings)
        songs = [song for part in rows.values() for song, *_ in part]
        infos = [song.headers[path] for song in songs for path in song.files]
        stems = [x for song in songs if song.has_stems for x in song.tracks]
        report = {
            "settings": settings,
            "fingerprint": fingerprint,
            "splits": {
                split: {
                    "songs": len(part),
                    "hours": sum(song.seconds for song, *_ in part) / 3600,
                    "segments": sum(len(numbers) for *_, numbers in part),
                    "song_names": [line["song"] for _, line, _ in part],
                    "song_paths": [song.path for song, *_ in part],
                }
                for split, part in rows.items()
            },
            "segments_left_out": left_out,
            "sample_rates": dict(Counter(str(x.sample_rate) for x in infos)),
            "channels": dict(Counter(str(x.channels) for x in infos)),
            "stems": dict(Counter(stems).most_common()),
            "medians": medians(songs),
            "skipped": self.findings.skipped,
            "warnings": self.findings.warnings,
        }
        if self.findings.skipped:
            logger.info("%s", skipped_table(self.findings.skipped))
        out_folder.mkdir(parents=True, exist_ok=True)
        # Killed halfway, none vouches for a mixture of old and new manifests.
        (out_folder / REPORT).unlink(missing_ok=True)
        for split, part in rows.items():
            write_manifest(out_folder, split, [row[1:] for row in part])
        write_json(out_folder / REPORT, report)
        return report

    @property
    def _sources(self):
        """Folders with music, and what they hold: `folder`, `test_folder`."""
        dataset = "stems" if self.dataset == "demo" else self.dataset
        sources = [(self.folder, dataset)]
        if self.test_folder:
            sources.append((self.test_folder, self.test_dataset))
        return sources

    @property
    def _chooses(self):
        """Whether segments are chosen by what they sound like."""
        return self.min_active_share > 0 or self.min_level_db is not None

    def _list(self, sources):
        """Lists the files of folders; nothing is left out yet."""
        if self.dataset == "shards":
            raise ValueError(
                "dataset: expected music, shards are ready to be trained on"
            )
        self.findings = Findings()
        self._listings = {
            # the known datasets have notes beside their audio
            folder: list_audio(folder, self.findings, dataset not in LAYOUTS)
            for folder, dataset in sources
        }
        files = {k: v for x in self._listings.values() for k, v in x.items()}
        self._cache = FileCache(self.folder, files, self.cache_folder)

    def _settings(self):
        """What the split and the segments depend on, as of JSON."""
        settings = dataclasses.asdict(self)
        del settings["cache_folder"]
        for key in ("folder", "test_folder"):
            settings[key] = settings[key] and os.path.abspath(settings[key])
        return json.loads(json.dumps(settings, default=str))

    def _fingerprint(self, settings):
        """Hash of the settings and of what tells a changed file."""
        # the files that describe songs, and lie where songs do
        described = [
            (path, file_stat(path))
            for folder, dataset in self._sources
            if dataset in LAYOUTS
            for depth in ("", "*/")
            for path in sorted(
                Path(folder).glob(depth + LAYOUTS[dataset].marker)
            )
        ]
        if self.split_file:
            described.append(Path(self.split_file).read_text("utf-8"))
        listings = [*self._listings.values()]
        known = json.dumps(
            [VERSION, settings, listings, described], default=str
        )
        return hashlib.sha256(known.encode()).hexdigest()

    def _read(self, folder, dataset, segment_seconds):
        """The usable songs of a folder, sorted by name."""
        keep, cache = self.findings.keep, self._cache
        songs = FINDERS[dataset](folder, self._listings[folder], self.findings)
        songs = group_stems(songs, self.stem_groups)
        if self.split_file and folder == self.folder:
            songs = _read_split_file(self.split_file, songs)
        songs.sort(key=lambda song: song.name)
        songs = keep(
            songs,
            lambda song: (
                song.has_stems
                and len(song.tracks) > (self.max_stems or math.inf)
                and f"more than max_stems={self.max_stems} stems"
            ),
        )
        headers = cache.headers(x for song in songs for x in song.sounds)
        songs = [
            song._replace(
                headers={x: headers[x] for x in song.sounds},
                seconds=max(headers[x].duration for x in song.files),
            )
            for song in keep(songs, _unreadable(headers))
        ]
        short = f"shorter than segment_seconds={segment_seconds}"
        songs = keep(
            songs,
            lambda song: song.seconds < segment_seconds and short,
        )
        if self.audio_check == "full" or self._chooses:
            levels = cache.levels(x for song in songs for x in song.files)
            songs = [
                song._replace(levels={x: levels[x] for x in song.files})
                for song in keep(songs, _unreadable(levels))
            ]
        if not songs:
            raise ValueError(
                f"no usable songs under {folder}: "
                + skipped_table(self.findings.skipped)
            )
        return songs

    def _split(self, segment_seconds):
        """Train, valid and test: no song and no file is in two of them."""
        songs, tests = self._read(*self._sources[0], segment_seconds), []
        if self.test_folder:
            tests = self._read(*self._sources[1], segment_seconds)
        own = self.split == "from_file" or (
            self.split == "auto" and any(song.split for song in songs)
        )
        # of songs that are one, that which is held back stays
        held_back_first = ("test", "valid", "train", "")
        if own:
            songs.sort(key=lambda song: held_back_first.index(song.split))
        else:
            songs.sort(key=lambda song: _number(song, self.seed))
        alike = self._alike(songs + tests)
        tests, songs = self._apart([tests, songs], alike)
        names = SPLITS[:2] if self.test_folder else SPLITS
        if own:
            none = f"in none of {', '.join(names)}"
            songs = self.findings.keep(
                sorted(songs, key=lambda song: song.name),
                lambda song: song.split not in names and none,
            )
            splits = {
                name: [song for song in songs if song.split == name]
                for name in names
            }
        else:
            ratio = self.split_ratio[: len(names)]
            splits = split_songs(songs, ratio, self.seed)
        if self.test_folder:
            splits["test"] = tests
        test, valid, train = self._apart(
            [splits[name] for name in held_back_first[:3]], alike
        )
        return {"train": train, "valid": valid, "test": test}

    def _alike(self, songs):
        """Path -> what is equal for files that sound alike; "" for silence.

        Only files are read whose length, rate and channels are those of a file
        of another song.
        """
        headers = {k: v for song in songs for k, v in song.headers.items()}
        count = Counter(x for song in songs for x in set(song.headers.values()))
        alike = {path: path for path in headers}
        read = self._cache.fingerprints(
            path for path, info in headers.items() if count[info] > 1
        )
        for path, found in read.items():
            if not isinstance(found, UnreadableAudio):
                alike[path] = found
        return alike

    def _apart(self, groups, alike):
        """Leaves out copies, and songs with music of an earlier group.

        A copy has all its files in common with an earlier song. As remixes do,
        songs of one group may share some of their files.
        """
        originals, held, apart = {}, {}, []

        def rule(song):
            files = tuple(sorted(filter(None, (alike[x] for x in song.files))))
            original = originals.get(files)
            if original and files:
                return f"a copy of {original}"
            for sound in map(alike.get, song.sounds):
                if sound in held:
                    return f"it has music of the held-out song {held[sound]}"
            originals[files] = song.path
            return None

        for group in groups:
            apart.append(self.findings.keep(group, rule))
            for song in apart[-1]:
                for path in filter(alike.get, song.sounds):
                    held[alike[path]] = song.path
        return apart

    def _rows(self, splits, settings):
        """Split -> song, its line in a manifest, numbers of its segments.

        Only whole segments count, one every hop, and of train and valid only
        those that are as active and as loud as asked. Also returns how many do
        not count.
        """
        seconds = settings["segment_seconds"]
        hop = settings["segment_hop_seconds"]
        least = -math.inf if self.min_level_db is None else self.min_level_db
        rows, left_out, silent = {split: [] for split in SPLITS}, 0, []
        for split, name, song in _safe_names(splits):
            # Lengths and hops in decimal seconds are not exact.
            hops = (song.seconds - seconds) / hop + 1e-6
            numbers = chosen = range(math.floor(hops) + 1)
            if split != "test" and self._chooses:
                codes = sum_levels([*song.levels.values()])
                chosen = []
                for i in numbers:
                    level, share = segment_loudness(codes, i * hop, seconds)
                    if level >= least and share >= self.min_active_share:
                        chosen.append(i)
            left_out += len(numbers) - len(chosen)
            if chosen:
                line = {
                    "song": name,
                    "tracks": {
                        track: paths[0] if len(paths) == 1 else list(paths)
                        for track, paths in song.tracks.items()
                    },
                    "duration": seconds,
                    "hop": hop,
                    "song_seconds": song.seconds,
                    "has_stems": song.has_stems,
                }
                rows[split].append((song, line, chosen))
            else:
                silent.append(song.path)
        reason = "no segment passes min_active_share and min_level_db"
        self.findings.skip(silent, reason)
        sizes = {split: len(part) for split, part in rows.items()}
        if min(sizes.values()) < MIN_SONGS:
            raise ValueError(
                f"expected at least {MIN_SONGS} songs in each split, got "
                f"{sizes} of {self.folder} with split: {self.split} "
                "(by_song splits all songs at random); "
                + skipped_table(self.findings.skipped)
            )
        return rows, left_out


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


def _safe_names(splits):
    """Split, name and song, sorted by name: unique, A-Z a-z 0-9 _ . - only.

    Names that would be equal (case aside), or too long for that of a file, end
    in a hash.
    """
    named = [
        (split, re.sub(r"[^A-Za-z0-9_.-]", "_", song.title), song)
        for split, songs in splits.items()
        for song in songs
    ]
    count = Counter(safe.lower() for _, safe, _ in named)
    for i, (split, safe, song) in enumerate(named):
        if count[safe.lower()] > 1 or len(safe) > LONGEST_NAME:
            # fsencode, because a path need not be valid UTF-8.
            path = os.fsencode(f"{split}/{song.name}")
            digest = hashlib.sha256(path).hexdigest()[:8]
            named[i] = split, f"{safe[:LONGEST_NAME]}_{digest}", song
    return sorted(named, key=lambda item: item[1])


def _composed(name):
    """A name in the letters that most systems use; macOS takes some apart."""
    return unicodedata.normalize("NFC", name)


def _number(song, seed):
    """A number in [0, 1) that depends on a seed and the song's name alone."""
    text = os.fsencode(f"{seed}/{_composed(song.title)}")
    digest = hashlib.sha256(text).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_songs(songs, split_ratio, seed):
    """Splits songs at random, so that a library that grows keeps its split.

    Each song has a number in [0, 1) that depends on the seed and its name
    alone. Numbers below the share of test are tested on, from there to that of
    valid validated on. A split that has fewer than two songs then gets those
    of the next numbers. Returns split -> list of Song sorted by name.
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
    with open(path, encoding="utf-8") as file:
        # names stay as they are written, 010 and no as well
        lists = yaml.load(file, yaml.BaseLoader)
    if (
        not isinstance(lists, dict)
        or not set(lists) <= set(SPLITS)
        or not all(isinstance(names, list) for names in lists.values())
    ):
        raise ValueError(
            f"{path}: expected lists of songs under {', '.join(SPLITS)} only"
        )
    known = defaultdict(set)
    for song in songs:
        for name in (song.name, song.title):
            known[_composed(name)].add(song.name)
    found = {}
    for split, names in lists.items():
        for name in map(_composed, names):
            fits = [name]
            if name not in known:
                # brackets are part of a name
                fits = fnmatch.filter(known, name.replace("[", "[[]"))
            if not fits:
                raise ValueError(f"{path}: no song {name!r} ({split})")
            for match in set().union(*(known[x] for x in fits)):
                if found.setdefault(match, split) != split:
                    raise ValueError(
                        f"{path}: {match!r} is in {found[match]} and in {split}"
                    )
    return [song._replace(split=found.get(song.name, "")) for song in songs]
