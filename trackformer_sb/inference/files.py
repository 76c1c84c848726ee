"""Which files a separation reads, where its results go, and how they came."""

import json
import os
from collections import Counter
from pathlib import Path

from trackformer_sb.paths import matching

# In the folder of the results: what each of them was made of, and how.
RECORD = "trackformer.json"


def find_files(arguments, out, endings):
    """Each audio file once that files, folders and patterns stand for.

    Patterns are expanded, as the shells of Windows do not; what does not exist
    stays as it is. Below folders only files of some endings (a tuple, in lower
    case) are music, and nothing in the folder of the results, ``out``, is. A
    folder without audio is returned itself.
    """
    found = {}
    for argument in arguments:
        paths = [argument]
        if not os.path.exists(argument):
            paths = matching(argument) or paths
        for path in paths:
            below = _below(path, out, endings) if os.path.isdir(path) else []
            for one in below or [path]:
                found.setdefault(os.path.realpath(one), one)
    return list(found.values())


def _below(folder, out, endings):
    """Audio files in a folder and its folders, links followed, hidden not."""
    found, visited = [], {os.path.realpath(out)}
    if os.path.realpath(folder) in visited:
        raise ValueError(
            f"--out {out}: expected another folder than that of the music, "
            "whose results would be separated next time"
        )
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
        else:
            visited.add(real)
            folders[:] = sorted(x for x in folders if not x.startswith("."))
            found += [
                os.path.join(parent, name)
                for name in sorted(names)
                if name.lower().endswith(endings) and not name.startswith(".")
            ]
    return found


def place_files(files):
    """Folders below --out, so that no results overwrite those of another file.

    None where the name of a file is unique, else the one it comes from, below
    what all files have in common, and its ending where only that differs.

    Example
    -------
    >>> place_files(["a/x.wav", "a/y.wav", "b/x.wav", "b/x.mp3", "b/z.wav"])
    ['a', '', 'b/wav', 'b/mp3', '']
    """
    parents = [os.path.dirname(os.path.abspath(path)) for path in files]
    common = os.path.commonpath(parents)
    stems = [Path(path).stem for path in files]
    below = [os.path.relpath(parent, common) for parent in parents]
    # some disks do not tell upper case from lower case
    names = Counter(stem.lower() for stem in stems)
    beside = Counter(os.path.join(*x).lower() for x in zip(below, stems))
    places = []
    for path, folder, stem in zip(files, below, stems):
        place = ""
        if names[stem.lower()] > 1:
            if beside[os.path.join(folder, stem).lower()] > 1:
                folder = os.path.join(folder, Path(path).suffix.lstrip("."))
            place = os.path.normpath(folder)
        places.append("" if place == os.curdir else place)
    return places


def check_overwriting(planned):
    """Refuses file -> results in the place of an input or of other results."""
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


def describe(path, results, settings):
    """What results were made of, and how, and whether they are whole.

    Name, size and time of change of the file, the settings, which are plain
    values, and the sizes of the results, None for those that are not there.
    """
    stat = os.stat(path)
    sizes = {
        one.name: one.stat().st_size if one.is_file() else None
        for one in results
    }
    description = {
        "file": os.path.basename(path),
        "bytes": stat.st_size,
        "modified": stat.st_mtime,
        **settings,
        "results": sizes,
    }
    return json.loads(json.dumps(description))  # as it is read again


def read_record(out):
    """What is recorded in a folder: place of results -> their description."""
    path = Path(out, RECORD)
    return json.loads(path.read_text("ascii")) if path.is_file() else {}


def add_record(out, place, description):
    """Records the results at a place, whatever else was recorded meanwhile."""
    record = {**read_record(out), place: description}
    write_whole(Path(out, RECORD), json.dumps(record, indent=1).encode())


def write_whole(path, content):
    """Writes bytes as a file in its folder, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    growing = path.with_name(f".{path.name}.partial")
    growing.write_bytes(content)
    os.replace(growing, path)
