"""How the datasets of the field lie on disk, read into songs.

The layouts are those of the documentation that each function names. A song that
lacks a file is left out; another case or format (s00.wav for S00.flac) is fine.
"""

import glob
import json
import os
import unicodedata
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

import yaml

from trackformer_sb.data.songs import Song

MUSDB18_STEMS = ("bass", "drums", "other", "vocals")

# "validation_tracks" of musdb/configs/mus.yaml in sigsep/sigsep-mus-db.
MUSDB18_VALIDATION = (
    "ANiMAL - Rockshow; Actions - One Minute Smile; Alexander Ross - Goodbye "
    "Bolero; Clara Berry And Wooldog - Waltz For My Victims; Fergessen - Nos "
    "Palpitants; James May - On The Line; Johnny Lokke - Promises & Lies; Leaf "
    "- Summerghost; Meaxic - Take A Step; Patrick Talbot - A Reason To Leave; "
    "Skelpolu - Human Mistakes; Traffic Experiment - Sirens; Triviul - "
    "Angelsaint; Young Griffo - Pennies"
).split("; ")

# Folder of songs -> split; the songs of `omitted` are in none.
_SPLITS = {"": "", "train": "train", "validation": "valid", "test": "test"}
_SPLITS["omitted"] = None


def _moisesdb_files(song_folder):
    """MoisesDB (Pereira et al., arXiv 2307.15913): data.json names the tracks.

    A stem is the sum of its tracks (moisesdb/track.py of moises-ai/moises-db);
    those with bleed (has_bleed) are kept, with a warning.
    """
    with open(os.path.join(song_folder, "data.json"), encoding="utf-8") as file:
        data = json.load(file)
    for stem in _entry(data, "stems", list):
        name = _entry(stem, "stemName", str)
        for track in _entry(stem, "tracks", list):
            ending = _entry(track, "extension", str).lstrip(".")
            file = f"{_entry(track, 'id', str)}.{ending}"
            yield name, os.path.join(name, file), bool(track.get("has_bleed"))


def _musdb18_files(song_folder):
    """MUSDB18-HQ (Rafii et al., doi 10.5281/zenodo.3338373): always four."""
    return [(stem, f"{stem}.wav", False) for stem in MUSDB18_STEMS]


def _slakh2100_files(song_folder):
    """Slakh2100 (Manilow et al., arXiv 1909.08494): metadata.yaml has stems.

    Those with audio_rendered are summed by inst_class. Songs in `omitted`
    repeat a MIDI file and are left out (READMEs of ethman/slakh-utils).
    """
    path = os.path.join(song_folder, "metadata.yaml")
    with open(path, encoding="utf-8") as file:
        data = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for name, stem in _entry(data, "stems", dict).items():
        if _entry(stem, "audio_rendered", bool):
            # Not data["audio_dir"]: one song of Slakh2100-redux has it wrong.
            file = os.path.join("stems", f"{name}.flac")
            yield _entry(stem, "inst_class", str), file, False


class Layout(NamedTuple):
    """How the songs of a dataset lie on disk.

    `marker` is a pattern of a file of every song, `source` what names its
    stems, `mixture` the file that is their sum or "", `expected` all in a line.
    `read` yields of the folder of a song each file: name of its stem, path,
    whether it has bleed.
    """

    marker: str
    source: str
    mixture: str
    expected: str
    read: Callable


LAYOUTS = {
    "moisesdb": Layout(
        "*/data.json",
        "data.json",
        "",
        "<track uuid>/data.json and <track uuid>/<stemName>/<id>.<extension>",
        _moisesdb_files,
    ),
    "musdb18hq": Layout(
        "*/*/vocals.*",
        "MUSDB18-HQ",
        "mixture.wav",
        "{train,test}/<artist - title>/{bass,drums,other,vocals,mixture}.wav",
        _musdb18_files,
    ),
    "slakh2100": Layout(
        "*/*/metadata.yaml",
        "metadata.yaml",
        "mix.flac",
        "{train,validation,test}/Track*/{metadata.yaml,mix.flac,stems/*.flac}",
        _slakh2100_files,
    ),
}


def dataset_songs(dataset, folder, listing, findings):
    """The songs of a dataset of ``LAYOUTS``, sorted, named by their folders.

    `folder` is that of the dataset, or the one above, with moisesdb_v0.1,
    musdb18hq or slakh2100_flac_redux, `listing` what `list_audio` returned for
    it. `findings` takes the songs and files left out. If no song is found, a
    ValueError says which dataset it looks like.

    Example
    -------
    >>> from trackformer_sb.data.songs import Findings
    >>> files = ("drums", "bass", "other", "vocals", "mixture")
    >>> paths = [f"/music/test/Artist - Title/{file}.wav" for file in files]
    >>> listing, findings = dict.fromkeys(paths), Findings()
    >>> (song,) = dataset_songs("musdb18hq", "/music", listing, findings)
    >>> song.split, list(song.tracks)
    ('test', ['bass', 'drums', 'other', 'vocals'])
    """
    _, source, sum_name, expected, read = LAYOUTS[dataset]
    root, files, loose = _search(dataset, folder, listing)
    findings.skip(loose, "not in the folder of a song")
    songs, bleeding = [], []
    omitted = [name for name in files if _SPLITS[os.path.dirname(name)] is None]
    if omitted:
        findings.warn(f"left out {len(omitted)} songs of {root}omitted")
    for name in sorted(files.keys() - omitted):
        song_folder = os.path.join(root, name)
        try:
            # A file that is named twice must not be summed twice.
            wanted = list(dict.fromkeys(read(song_folder)))
            if not wanted:
                raise ValueError("no stem")
        except (OSError, ValueError, yaml.YAMLError) as error:
            words = getattr(error, "strerror", None) or str(error)
            reason = " ".join(words.split())
            findings.skip([os.path.join(song_folder, source)], reason)
            continue
        alike = {_key(path): path for path in files[name]}
        tracks, missing = {}, []
        for stem, file, _ in wanted:
            path = os.path.join(song_folder, file)
            other = alike.pop(_key(path), None)
            found = path if path in listing else other
            if found:
                tracks[stem] = (*tracks.get(stem, ()), found)
            else:
                missing.append(path)
        if missing:
            reason = f"missing ({len(missing)} of {len(wanted)} in {source})"
            findings.skip(missing[:1], reason)
            continue
        tracks = dict(sorted(tracks.items()))
        group, title = os.path.split(name)
        usual = group == "train" and title in MUSDB18_VALIDATION
        split = "valid" if usual else _SPLITS[group]
        mixture = alike.get(_key(os.path.join(song_folder, sum_name)), "")
        songs.append(Song(name, tracks, True, split, mixture))
        bleeding += [name for _, _, has_bleed in wanted if has_bleed]
        extra = sorted({*files[name]} - {*songs[-1].files, mixture})
        findings.skip(extra, f"not in {source}")
    if not songs:
        fits = [d for d in LAYOUTS if _search(d, folder, listing)[1]]
        why = f"it looks like dataset: {[*fits, 'stems or mixtures'][0]}"
        why = f"all {len(files)} found were skipped" if files else why
        raise ValueError(f"no songs under {folder}, expected {expected}; {why}")
    if bleeding:
        num = f"{len(bleeding)} tracks with bleed in {len(set(bleeding))} songs"
        findings.warn(f"kept {num} of {folder} (has_bleed)")
    return songs


def _search(dataset, folder, listing):
    """Root of a dataset, files of each song, and those of none."""
    marker = LAYOUTS[dataset].marker
    top = os.path.abspath(folder)
    names = glob.glob("*/", root_dir=top)
    inner = sorted(x for x in names if x.lower().startswith(dataset[:5]))
    for root in (os.path.join(top, name) for name in ("", *inner)):
        below = {p[len(root) :]: p for p in listing if p.startswith(root)}
        marked = glob.glob(marker, root_dir=root)
        marked += [part for part in below if fnmatchcase(part, marker)]
        names = set(map(os.path.dirname, marked))
        files = {n: [] for n in names if os.path.dirname(n) in _SPLITS}
        if not files:
            continue
        for part, path in below.items():
            name = os.sep.join(part.split(os.sep)[: marker.count("/")])
            if part != name and os.path.dirname(name) in _SPLITS:
                files.setdefault(name, []).append(path)
        inside = {path for paths in files.values() for path in paths}
        return root, files, [path for path in listing if path not in inside]
    return top, {}, []


def _key(path):
    """The same for any format, case and encoding of accents."""
    return unicodedata.normalize("NFC", os.path.splitext(path)[0]).casefold()


def _entry(mapping, key, kind):
    """A value that must be there and of that kind."""
    value = mapping.get(key) if isinstance(mapping, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"expected {key} of {kind.__name__}, got {value!r}")
    return value


def group_stems(songs, stem_groups):
    """Sums the tracks of a group, such as all keyboards, to one track.

    `stem_groups` is None or group -> list of patterns of track names (* any
    text, ? any letter, case ignored). A track joins the first group that
    matches; others keep their name, and so join a group of that name. Tracks
    are sorted by name; songs without stems are left as they are.

    Example
    -------
    >>> tracks = {"bass": ("b",), "other_keys": ("k",), "piano": ("p", "q")}
    >>> songs = [Song("song", tracks, has_stems=True)]
    >>> group_stems(songs, {"keys": ["Piano", "*keys"]})[0].tracks
    {'bass': ('b',), 'keys': ('k', 'p', 'q')}
    """
    if stem_groups is None:
        return list(songs)
    if not isinstance(stem_groups, dict) or not all(
        isinstance(patterns, list) for patterns in stem_groups.values()
    ):
        raise ValueError(
            "expected stem_groups of {group: [pattern, ...]}, got "
            f"{stem_groups}"
        )
    pairs = [(g, p.lower()) for g, each in stem_groups.items() for p in each]
    grouped = []
    for song in songs:
        tracks = {}
        for track, paths in song.tracks.items():
            fits = (g for g, p in pairs if fnmatchcase(track.lower(), p))
            group = next(fits, track) if song.has_stems else track
            tracks[group] = (*tracks.get(group, ()), *paths)
        grouped.append(song._replace(tracks=dict(sorted(tracks.items()))))
    return grouped
