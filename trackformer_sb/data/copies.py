"""The same song twice: under another name, or in another form."""

import numpy as np

from trackformer_sb.data.headers import SILENT
from trackformer_sb.data.levels import FLOOR_DB, POWERS, sum_levels
from trackformer_sb.data.songs import KEEP_FIRST
from trackformer_sb.data.splits import MIN_SONGS, place_of

# Measured on real music. The level curves of 34 songs and of their mp3, Opus,
# 16 kHz, quieter and 50 ms later copies correlate by 0.977 and more and differ
# by 0.36 dB at most (standard deviation). Those of 103 songs and stems cut to
# one length, two by two, correlate by 0.90 at most; but two stems of one song
# by 0.986, which differ by 1.56 dB.
SAME_CORRELATION = 0.96
SAME_DEVIATION_DB = 1.0

# Curves are smoothed over 0.7 s: those of two copies a fraction of a window
# apart would have little in common otherwise (0.52 in the worst song).
OUTLINE_WINDOW = np.hanning(9)[1:-1]
OUTLINE_RANGE_DB = 40.0
MAX_SHIFT = 2  # windows
SHIFT_STEP = 0.25  # windows

# Less says nothing: all short sounds that die away look alike.
MIN_SAME_WINDOWS = 30
MIN_SPREAD_DB = 0.3

# Level curves are first compared by this many points at once, all with all.
CURVE_POINTS = 32  # a song has at least about 4 s
CURVE_CORRELATION = 0.9
LENGTH_TOLERANCE = 0.5  # seconds
# Of other excerpts of one song, which repeat themselves, the curves of 11 of
# 621 agreed at 5 s, of 3 of 389 at 8 s, and of none at 10 s.
MIN_CURVE_SECONDS = 10.0


def find_copies(songs, fingerprints, levels=None):
    """Which songs are copies of an earlier one.

    Songs are copies if their files sound alike, whatever their names and tags;
    with levels also if their level curves agree, as those of a wav file and
    its mp3 do.

    Arguments
    ---------
    songs : list of Song
        With their lengths; the first of a set of copies is the original.
    fingerprints : dict
        Path -> what is equal for files that sound alike.
    levels : dict, optional
        Path -> AudioLevels of all files.

    Returns
    -------
    dict
        Number of a copy -> number of the original.

    Example
    -------
    >>> from trackformer_sb.data.songs import Song
    >>> songs = [Song(name, {"mixture": (name,)}, False) for name in "abc"]
    >>> find_copies(songs, {"a": 7, "b": 8, "c": 7})
    {2: 0}
    """
    copies, first_with = {}, {}
    for i, song in enumerate(songs):
        files = tuple(sorted(fingerprints[path] for path in song.files))
        first = first_with.setdefault(files, i)
        if first != i:
            copies[i] = first
    if levels:
        _find_recordings(songs, levels, copies)
    return copies


def leave_out_copies(songs, fingerprints, levels, findings, known=None):
    """Leaves out songs that are there twice, in favour of those to test on.

    Of another folder to test on, no file is trained on, be it the mixture or a
    single stem.

    Arguments
    ---------
    songs : dict
        "data_folder", and "test_folder" if there is one -> list of Song.
    fingerprints : dict
        Path -> what is equal for files that sound alike, mixtures among them.
    levels : dict
        Path -> AudioLevels of all files, or empty.
    findings : Findings
        Takes the songs left out.
    known : dict, optional
        Where songs were in an earlier run, see ``splits.places_of``.

    Returns
    -------
    dict
        The same without copies.
    """

    def rank(song):
        return KEEP_FIRST.index(song.split or place_of(song, known or {}))

    order = [
        (key, i)
        for key in sorted(songs, reverse=True)
        for i in sorted(
            range(len(songs[key])),
            key=lambda i: rank(songs[key][i]),
        )
    ]
    everything = [songs[key][i] for key, i in order]
    tested = {}
    for song in songs.get("test_folder", ()):
        for sound in _sounds(song, fingerprints):
            tested.setdefault(sound, song.path)
    reasons = {}
    for copy, first in find_copies(everything, fingerprints, levels).items():
        which = "the test song " if order[first][0] == "test_folder" else ""
        reasons[copy] = f"a copy of {which}{everything[first].path}"
    for i, song in enumerate(everything):
        sounds = _sounds(song, fingerprints)
        of = next((tested[x] for x in sounds if x in tested), None)
        if of and order[i][0] == "data_folder" and i not in reasons:
            reasons[i] = f"it has music of the test song {of}"
    for i, reason in sorted(reasons.items()):
        findings.skip(everything[i].path, reason, unwanted=True)
    gone = {order[i] for i in reasons}
    return {
        key: [song for i, song in enumerate(group) if (key, i) not in gone]
        for key, group in songs.items()
    }


def _sounds(song, fingerprints):
    """Fingerprints of the files of a song that are not silent."""
    found = (fingerprints[path] for path in song.sounds)
    return [x for x in found if not x.startswith(SILENT)]


def keep_apart(splits, fingerprints, findings):
    """Leaves out songs that share a file with one that is held back.

    As remixes do, or an instrumental version: no file of a test song is trained
    on or validated on, and none of a validation song is trained on.

    Arguments
    ---------
    splits : dict
        Split -> list of Song.
    fingerprints : dict
        Path -> what is equal for files that sound alike.
    findings : Findings
        Takes the songs left out.

    Returns
    -------
    dict
        The same without those songs.

    Raises
    ------
    ValueError
        If fewer than two songs of a split are left.
    """
    held, apart = {}, {}
    for name in sorted(splits, key=KEEP_FIRST.index):
        apart[name] = []
        for song in splits[name]:
            sounds = _sounds(song, fingerprints)
            of = next((held[x] for x in sounds if x in held), None)
            if of is None:
                apart[name].append(song)
            else:
                reason = "it has music of the {} song {}".format(*of)
                findings.skip(song.path, reason, unwanted=True)
        for song in apart[name]:
            for sound in _sounds(song, fingerprints):
                held.setdefault(sound, (name, song.path))
        if len(apart[name]) < MIN_SONGS:
            raise ValueError(
                f"{len(apart[name])} songs of {name} are left, expected at "
                f"least {MIN_SONGS}: others have music of songs to evaluate on"
            )
    return {name: apart[name] for name in splits}


def _find_recordings(songs, levels, copies):
    """Adds songs whose level curves agree to the copies."""
    kept = [
        i
        for i, song in enumerate(songs)
        if i not in copies and song.seconds >= MIN_CURVE_SECONDS
    ]
    kept.sort(key=lambda i: songs[i].seconds)
    sums = {i: sum_levels([levels[p] for p in songs[i].files]) for i in kept}
    curves = np.stack([_curve(sums[i]) for i in kept]) if kept else []
    seconds = np.array([songs[i].seconds for i in kept])
    for place, i in enumerate(kept):
        end = np.searchsorted(seconds, seconds[place] + LENGTH_TOLERANCE)
        alike = curves[place + 1 : end] @ curves[place] > CURVE_CORRELATION
        for step in np.flatnonzero(alike):
            j = kept[place + 1 + step]
            if same_recording(sums[i], sums[j]):
                first, later = sorted((_first(i, copies), _first(j, copies)))
                if first != later:
                    copies[later] = first


def _first(i, copies):
    while i in copies:
        i = copies[i]
    return i


def _curve(level):
    """The centred level curve [points] of unit norm; 0 if it is constant."""
    outline = _outline(level.codes)
    if len(outline) < CURVE_POINTS:
        return np.zeros(CURVE_POINTS, np.float32)
    # means, not samples: a copy may begin a part of a window later
    edges = np.linspace(0, len(outline), CURVE_POINTS + 1).astype(int)
    curve = np.add.reduceat(outline, edges[:-1]) / np.diff(edges)
    curve = (curve - curve.mean()).astype(np.float32)
    return curve / max(float(np.linalg.norm(curve)), 1e-3)


def same_recording(first, second):
    """Whether two files are one recording in two formats, rates or gains.

    Their smoothed level curves are compared at all shifts of up to 0.2 s.

    Arguments
    ---------
    first, second : AudioLevels
        Of the files.

    Returns
    -------
    bool
        True if the curves are of one length within 0.2 s and, but for a gain,
        of one shape. False where they say too little: below about 4 s, silent,
        or of one level throughout.

    Example
    -------
    >>> from trackformer_sb.data.levels import AudioLevels
    >>> song = np.random.default_rng(0).integers(120, 180, 600)
    >>> song, quieter, other = (
    ...     AudioLevels(codes.astype("uint8"), 0.5, 0.0, 0.0)
    ...     for codes in (song, song - 12, song[::-1])
    ... )
    >>> same_recording(song, quieter), same_recording(song, other)
    (True, False)
    """
    if abs(len(first.codes) - len(second.codes)) > MAX_SHIFT:
        return False
    first, second = _outline(first.codes), _outline(second.codes)
    count = min(len(first), len(second)) - 2 * MAX_SHIFT
    if count < MIN_SAME_WINDOWS:
        return False
    places = np.arange(count) + MAX_SHIFT
    for shift in np.arange(-MAX_SHIFT, MAX_SHIFT + SHIFT_STEP / 2, SHIFT_STEP):
        # half each, as in between two windows both are smoothed
        one = np.interp(places + shift / 2, np.arange(len(first)), first)
        two = np.interp(places - shift / 2, np.arange(len(second)), second)
        one, two = one - one.mean(), two - two.mean()
        spread = one.std() * two.std()
        if (
            spread > MIN_SPREAD_DB**2
            and (one * two).mean() > SAME_CORRELATION * spread
            and (one - two).std() < SAME_DEVIATION_DB
        ):
            return True
    return False


def _outline(codes):
    """The smoothed level curve in dB, its quiet parts levelled."""
    if len(codes) < len(OUTLINE_WINDOW):
        return np.zeros(0)
    window = OUTLINE_WINDOW / OUTLINE_WINDOW.sum()
    power = np.convolve(POWERS[codes], window, "valid")
    decibels = 10 * np.log10(np.maximum(power, 10 ** (FLOOR_DB / 10)))
    loud = np.percentile(decibels, 95)
    return np.maximum(decibels, loud - OUTLINE_RANGE_DB)
