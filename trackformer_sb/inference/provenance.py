"""What made a separated file: the comment in it, and whether it still holds."""

import hashlib
import json
import os

import soundfile
import torch
from PIL import Image

import trackformer_sb

LIBRARY = "trackformer_sb"
PICTURE = ".png"

# Of a file these bytes at either end are looked at, and its size.
ENDS = 2**20


def model_digest(modules):
    """A name for what modules compute: layers, their settings and weights.

    Arguments
    ---------
    modules : dict
        Modules by name.

    Returns
    -------
    str
        12 hexadecimal digits.

    Example
    -------
    >>> model_digest({"masknet": torch.nn.ReLU()})
    '261f11e4fb83'
    """
    digest = hashlib.sha256()
    for name, module in modules.items():
        digest.update(f"{name}: {module}".encode())
        for key, value in module.state_dict().items():
            digest.update(key.encode())
            # numpy has no bfloat16
            content = value.detach().cpu().flatten().view(torch.uint8)
            digest.update(content.numpy().tobytes())
        for key, part in module.named_modules():
            # what their makers left out of the representation
            plain = {
                k: v
                for k, v in vars(part).items()
                if k != "training" and isinstance(v, (str, int, float))
            }
            digest.update(f"{key}: {sorted(plain.items())}".encode())
    return digest.hexdigest()[:12]


def file_digest(path):
    """A name for what is in a file, from its size and its two ends.

    Arguments
    ---------
    path : str or Path
        The file.

    Returns
    -------
    str
        12 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(str(size).encode())
        for start in (0, max(0, size - ENDS)):
            file.seek(start)
            digest.update(file.read(ENDS))
    return digest.hexdigest()[:12]


def provenance(path, modules, **options):
    """The comment that separated files carry.

    Arguments
    ---------
    path : str or Path
        The audio file.
    modules : dict
        Of the separator, by name.
    **options : dict
        What else the samples depend on; plain values.

    Returns
    -------
    str
        Name and version of the library, and JSON: the same for the same
        samples.
    """
    options = {
        "file": file_digest(path),
        "model": model_digest(modules),
        **options,
    }
    return f"{LIBRARY} {trackformer_sb.__version__} {json.dumps(options)}"


def up_to_date(path, written, comment):
    """Whether a file has been separated in this way since it last changed.

    Arguments
    ---------
    path : str or Path
        The audio file.
    written : list of Path
        What its separation writes, as of ``output_paths``.
    comment : str
        Of ``provenance``.

    Returns
    -------
    bool
        Whether all of them are there, none is older than the file, and each
        has this comment.
    """
    changed = os.stat(path).st_mtime
    return all(
        one.is_file()
        and one.stat().st_mtime >= changed
        and _comment(one) == comment
        for one in written
    )


def _comment(path):
    """The comment of a sound or a picture; none if it is damaged or cut."""
    try:
        if path.suffix == PICTURE:
            with Image.open(path) as picture:
                picture.load()
                return picture.info.get("Comment")
        with soundfile.SoundFile(os.fsencode(path)) as file:
            # the last frame of a cut flac cannot be read
            file.seek(max(0, file.frames - 1))
            return file.comment if len(file.read(1)) else None
    except (soundfile.SoundFileError, OSError, ValueError, SyntaxError):
        return None  # the last two are Pillow's of damaged pictures
