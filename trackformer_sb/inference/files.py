"""Which files a separation reads, and where its results go."""

import glob
import os
from collections import Counter

# What the name of a folder with unfinished results ends in.
PARTIAL = ".partial"


def find_files(arguments, out, endings):
    """The audio files that arguments mean.

    Arguments
    ---------
    arguments : list of str
        Files, folders, and globs that the shell has not expanded. What does
        not exist is returned as it is.
    out : str
        Folder of the results, left out below the folders, and of what globs
        stand for.
    endings : tuple of str
        Of audio files, in lower case; files named one by one may have others.

    Returns
    -------
    list of str
        Each file once, those of a folder in the order of their names. A folder
        without audio is returned itself.

    Raises
    ------
    ValueError
        If a glob stands for nothing but what is in the folder of the results.

    Example
    -------
    >>> find_files(["song.wav", "./song.wav"], "sources", (".wav",))
    ['song.wav']
    """
    out = os.path.realpath(out)
    found = {}
    for argument in arguments:
        for path in _without_results(argument, _expand(argument, endings), out):
            below = [path]
            if os.path.isdir(path):
                below = _below(path, out, endings)
                # with "**", folders come one by one and inside of each other
                below = below or ([path] if path == argument else [])
            for one in below:
                found.setdefault(os.path.realpath(one), one)
    return list(found.values())


def _is_below(path, folder):
    """Whether a path is inside of a folder that has no links in its name."""
    parent = os.path.dirname(os.path.realpath(path))
    return os.path.commonpath([parent, folder]) == folder


def _without_results(argument, paths, out):
    """What a glob stands for, less results of an earlier separation."""
    begin = argument
    while glob.has_magic(begin):
        begin = os.path.dirname(begin)
    # a pattern that begins in a folder beside the results asks for none
    if paths == [argument] or _is_below(begin or os.curdir, out):
        return paths
    others = [path for path in paths if not _is_below(path, out)]
    if not others:
        raise ValueError(
            f"{argument}: expected another folder than that of the results, "
            f"{out}, which has all that it stands for"
        )
    return others


def _expand(argument, endings):
    """What a glob stands for: all, or the audio if there is some."""
    if os.path.exists(argument):
        return [argument]
    paths = sorted(glob.glob(argument, recursive=True))
    audio = [
        path
        for path in paths
        if path.lower().endswith(endings) or os.path.isdir(path)
    ]
    return audio or paths or [argument]


def _below(folder, out, endings):
    """Audio files in a folder and its folders, less hidden ones.

    Links are followed, but not to a folder that is there already, or above.
    """
    found, visited = [], {out}
    top = os.path.realpath(folder)
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        above = real != top and os.path.commonpath([real, top]) == real
        if real in visited or above:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(x for x in folders if not x.startswith("."))
        found += [
            os.path.join(parent, name)
            for name in sorted(names)
            if name.lower().endswith(endings) and not name.startswith(".")
        ]
    return found


def name_of(reader):
    """The name of an open file, for messages.

    Arguments
    ---------
    reader : soundfile.SoundFile
        The file.

    Returns
    -------
    str
    """
    name = reader.name
    return os.fsdecode(name) if isinstance(name, bytes) else str(name)


def place_files(files):
    """Where the results of each file go, so that none overwrites another's.

    Arguments
    ---------
    files : list of str
        Different files.

    Returns
    -------
    list of tuple
        (folder below --out, beginning of the names) of each file: no folder
        where the name is unique, else the one it comes from, below what all
        files have in common. Files that differ only in their endings keep
        them.

    Example
    -------
    >>> place_files(["a/x.wav", "a/y.wav", "b/x.wav", "b/x.mp3"])
    [('a', 'x'), ('', 'y'), ('b', 'x.wav'), ('b', 'x.mp3')]
    """
    parents = [os.path.dirname(os.path.abspath(path)) for path in files]
    common = os.path.commonpath(parents) if parents else ""
    names = [os.path.basename(path) for path in files]
    stems = [os.path.splitext(name)[0] for name in names]
    below = [os.path.relpath(parent, common) for parent in parents]
    below = ["" if folder == os.curdir else folder for folder in below]
    places = [
        (("", stem), (folder, stem), (folder, name))
        for folder, stem, name in zip(below, stems, names)
    ]
    chosen = [0] * len(files)
    while True:
        placed = [place[i] for place, i in zip(places, chosen)]
        # some disks do not tell upper case from lower case
        keys = [os.path.join(*place).lower() for place in placed]
        count = Counter(keys)
        moving = [
            i
            for i, key in enumerate(keys)
            if count[key] > 1 and chosen[i] + 1 < len(places[i])
        ]
        if not moving:
            return placed
        for i in moving:
            chosen[i] += 1


def check_overwriting(planned):
    """Refuses results in the place of an input or of other results.

    Arguments
    ---------
    planned : dict
        File -> paths of its results.

    Raises
    ------
    ValueError
        Naming the file, the result and the file that is in its way.

    Example
    -------
    >>> check_overwriting({"a.wav": ["a_source0.wav"], "b.wav": ["a.wav"]})
    Traceback (most recent call last):
        ...
    ValueError: b.wav: its result a.wav would overwrite a.wav or a result \
of it; expected another --out
    """
    taken = {os.path.realpath(path): path for path in planned}
    for path, results in planned.items():
        for result in results:
            place = os.path.realpath(result)
            if place in taken:
                raise ValueError(
                    f"{path}: its result {result} would overwrite "
                    f"{taken[place]} or a result of it; expected another --out"
                )
            taken[place] = path
