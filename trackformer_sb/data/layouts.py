"""How the datasets of the field lie on disk, read into songs.

The layouts are those of the documentation that each function names. A song that
lacks a file is left out; another case or format (s00.wav for S00.flac) is fine.
"""

import glob
import json
import os
import unicodedata
from fnmatch import fnmatchcase

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

# A file of every song, what names its stems, their sum, and all in a line.
LAYOUTS = {
    "moisesdb": (
        "*/data.json",
        "data.json",
        "",
        "<track uuid>/data.json and <track uuid>/<stemName>/<id>.<extension>",
    ),
    "musdb18hq": (
        "*/*/vocals.*",
        "MUSDB18-HQ",
        "mixture.wav",
        "{train,test}/<artist - title>/{bass,drums,other,vocals,mixture}.wav",
    ),
    "slakh2100": (
        "*/*/metadata.yaml",
        "metadata.yaml",
        "mix.flac",
        "{train,validation,test}/Track*/{metadata.yaml,mix.flac,stems/*.flac}",
    ),
}
# Folder of songs -> split; the songs of `omitted` are in none.
_SPLITS = {"": "", "train": "train", "validation": "valid", "test": "test"}
_SPLITS["omitted"] = None


def moisesdb_songs(folder, listing, findings):
    """The songs of MoisesDB (Pereira et al., arXiv 2307.15913).

    A stem is the sum of its tracks `<track uuid>/<stemName>/<id>.<extension>`,
    which `<track uuid>/data.json` names (moisesdb/track.py of
    moises-ai/moises-db). Those with bleed (has_bleed) are kept, with a warning.

    Arguments
    ---------
    folder : str or Path
        The folder of the track uuids, or the one above, with moisesdb_v0.1.
    listing : dict
        What `list_audio` returned for the folder.
    findings : Findings
        Takes the songs and files left out.

    Returns
    -------
    list of Song
        Named by track uuid, sorted.

    Raises
    ------
    ValueError
        If no song is found.

    Example
    -------
    >>> import tempfile
    >>> from trackformer_sb.data.songs import Findings
    >>> tracks = [{"id": i, "extension": "wav"} for i in ("b7", "a9")]
    >>> data = {"stems": [{"stemName": "guitar", "tracks": tracks}]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.mkdir(f"{folder}/f40ff")
    ...     with open(f"{folder}/f40ff/data.json", "w") as file:
    ...         json.dump(data, file)
    ...     paths = [f"{folder}/f40ff/guitar/{i}.wav" for i in ("a9", "b7")]
    ...     songs = moisesdb_songs(folder, dict.fromkeys(paths), Findings())
    >>> [os.path.basename(path) for path in songs[0].tracks["guitar"]]
    ['b7.wav', 'a9.wav']
    """
    return _songs("moisesdb", folder, listing, findings, _moisesdb_files)


def _moisesdb_files(song_folder):
    """Yields stem, file and whether it has bleed."""
    with open(os.path.join(song_folder, "data.json"), encoding="utf-8") as file:
        data = json.load(file)
    for stem in _entry(data, "stems", list):
        name = _entry(stem, "stemName", str)
        for track in _entry(stem, "tracks", list):
            ending = _entry(track, "extension", str).lstrip(".")
            file = f"{_entry(track, 'id', str)}.{ending}"
            yield name, os.path.join(name, file), bool(track.get("has_bleed"))


def musdb18hq_songs(folder, listing, findings):
    """The songs of MUSDB18-HQ (Rafii et al., doi 10.5281/zenodo.3338373).

    `{train,test}/<artist - title>/` holds bass, drums, other, vocals and
    mixture, their sum; 14 songs of train are the usual validation split
    (musdb/configs/mus.yaml of sigsep/sigsep-mus-db).

    Arguments
    ---------
    folder : str or Path
        The folder with train and test, or the one above, with musdb18hq.
    listing : dict
        What `list_audio` returned for the folder.
    findings : Findings
        Takes the songs and files left out.

    Returns
    -------
    list of Song
        Named by folder and title, sorted, with split and mixture.

    Raises
    ------
    ValueError
        If no song is found.

    Example
    -------
    >>> from trackformer_sb.data.songs import Findings
    >>> files = ("drums", "bass", "other", "vocals", "mixture")
    >>> paths = [f"/music/test/Artist - Title/{file}.wav" for file in files]
    >>> songs = musdb18hq_songs("/music", dict.fromkeys(paths), Findings())
    >>> songs[0].split, list(songs[0].tracks)
    ('test', ['bass', 'drums', 'other', 'vocals'])
    """
    songs = _songs("musdb18hq", folder, listing, findings, _musdb18_files)
    usual = {os.path.join("train", title) for title in MUSDB18_VALIDATION}
    return [s._replace(split="valid") if s.name in usual else s for s in songs]


def _musdb18_files(song_folder):
    return [(stem, f"{stem}.wav", False) for stem in MUSDB18_STEMS]


def slakh2100_songs(folder, listing, findings):
    """The songs of Slakh2100 (Manilow et al., arXiv 1909.08494).

    `{train,validation,test}/TrackXXXXX/metadata.yaml` names the stems; those
    with audio_rendered are summed by inst_class. Songs in `omitted` repeat a
    MIDI file and are left out (READMEs of ethman/slakh-utils).

    Arguments
    ---------
    folder : str or Path
        The folder of the splits, or the one above, with slakh2100_flac_redux.
    listing : dict
        What `list_audio` returned for the folder.
    findings : Findings
        Takes the songs and files left out, and how many songs are omitted.

    Returns
    -------
    list of Song
        Named by folder and TrackXXXXX, sorted, with split and mixture.

    Raises
    ------
    ValueError
        If no song is found.

    Example
    -------
    >>> from trackformer_sb.data.songs import Findings
    >>> paths = [f"/music/train/A - B/{stem}.wav" for stem in MUSDB18_STEMS]
    >>> slakh2100_songs("/music", dict.fromkeys(paths), Findings())
    ... # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: no songs under /music, ...; it looks like dataset: musdb18hq
    """
    return _songs("slakh2100", folder, listing, findings, _slakh2100_files)


def _slakh2100_files(song_folder):
    """Yields class of instruments, file and that it has no bleed."""
    path = os.path.join(song_folder, "metadata.yaml")
    with open(path, encoding="utf-8") as file:
        data = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for name, stem in _entry(data, "stems", dict).items():
        if _entry(stem, "audio_rendered", bool):
            # Not data["audio_dir"]: one song of Slakh2100-redux has it wrong.
            file = os.path.join("stems", f"{name}.flac")
            yield _entry(stem, "inst_class", str), file, False


def group_stems(songs, stem_groups):
    """Sums the tracks of a group, such as all keyboards, to one track.

    Arguments
    ---------
    songs : list of Song
        Those without stems are left as they are.
    stem_groups : dict or None
        Group -> list of patterns of track names (* any text, ? any letter, case
        ignored). A track joins the first group that matches; others keep their
        name, and so join a group of that name.

    Returns
    -------
    list of Song
        With tracks sorted by name.

    Raises
    ------
    ValueError
        If `stem_groups` is anything else.

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
        isinstance(group, str)
        and isinstance(patterns, (list, tuple))
        and all(isinstance(pattern, str) for pattern in patterns)
        for group, patterns in stem_groups.items()
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


def keep_few_stems(songs, max_stems, findings):
    """Leaves out songs with many stems.

    Arguments
    ---------
    songs : list of Song
        Those without stems are kept.
    max_stems : int or None
        The most tracks a song may have, at least 1; None keeps all songs.
    findings : Findings
        Takes the songs left out.

    Returns
    -------
    list of Song
        Those with at most `max_stems` tracks.

    Raises
    ------
    ValueError
        If `max_stems` is anything else, or no song is left.

    Example
    -------
    >>> from trackformer_sb.data.songs import Findings
    >>> tracks = {"bass": ("bass.wav",), "drums": ("kick.wav", "snare.wav")}
    >>> len(keep_few_stems([Song("duo", tracks, True)], 2, Findings()))
    1
    """
    if max_stems is None:
        return list(songs)
    if type(max_stems) is not int or max_stems < 1:
        raise ValueError(f"expected max_stems of 1 or more, got {max_stems!r}")
    few, many = [], []
    for song in songs:
        fits = len(song.tracks) <= max_stems or not song.has_stems
        (few if fits else many).append(song)
    reason = f"more than {max_stems=} stems"
    if many and not few:
        raise ValueError(f"all {len(many)} songs have {reason}")
    findings.skip([song.path for song in many], reason, unwanted=True)
    return few


def _songs(dataset, folder, listing, findings, read):
    """Songs of the stems and files that `read` returns for a folder."""
    _, source, sum_name, expected = LAYOUTS[dataset]
    root, files, loose = _search(dataset, folder, listing)
    findings.skip(loose, "not in the folder of a song", unwanted=True)
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
        split = _SPLITS[os.path.dirname(name)]
        mixture = alike.get(_key(os.path.join(song_folder, sum_name)), "")
        songs.append(Song(name, tracks, True, 0.0, split, mixture))
        bleeding += [name for _, _, has_bleed in wanted if has_bleed]
        extra = sorted({*files[name]} - {*songs[-1].files, mixture})
        findings.skip(extra, f"not in {source}", unwanted=True)
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
    marker = LAYOUTS[dataset][0]
    top = os.path.abspath(folder)
    # An archive unpacks to moisesdb_v0.1, musdb18hq or slakh2100_flac_redux.
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
