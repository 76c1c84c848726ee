"""Paths as users write them, and names as file systems take them."""

import glob
import hashlib
import os

# File systems take 255 bytes; what is made of a file has more in its name.
LONGEST_NAME = 200


def expanded(path):
    """A path with ~ and environment variables in it, unless it exists as it is.

    None stays None.

    Example
    -------
    >>> os.environ["DISK"] = "/mnt/disk"
    >>> expanded("$DISK/music"), expanded("~/music") == "~/music"
    ('/mnt/disk/music', False)
    """
    if not path or os.path.exists(path):
        return path
    return os.path.expandvars(os.path.expanduser(path))


def shortened(name):
    """A name that others are made of; a long one is cut and ends in a hash.

    Example
    -------
    >>> shortened("song"), len(os.fsencode(shortened("é" * 125)))
    ('song', 209)
    """
    encoded = os.fsencode(name)
    if len(encoded) <= LONGEST_NAME:
        return name
    begin = encoded[:LONGEST_NAME].decode("utf-8", "ignore")
    return f"{begin}_{hashlib.sha256(encoded).hexdigest()[:8]}"


def matching(pattern):
    """Sorted files of a pattern; what exists of its beginning is no pattern.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.mkdir(f"{folder}/Best [2020]")
    ...     open(f"{folder}/Best [2020]/a.mp3", "w").close()
    ...     [found] = matching(f"{folder}/Best [2020]/*.mp3")
    ...     os.path.relpath(found, folder)
    'Best [2020]/a.mp3'
    """
    literal, parts = pattern, []
    while literal and not os.path.exists(literal):
        literal, name = os.path.split(literal)
        parts.insert(0, name)
    wild = os.path.join(glob.escape(literal), *parts)
    return sorted(glob.glob(wild, recursive=True))
