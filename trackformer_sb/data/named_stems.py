"""Songs of stems whose file names say what plays: drums, bass, vocals, other.

The layout of `dataset: stems`: a folder per song, an audio file per stem.
"""

import pathlib

import soundfile
import torch
from torchaudio.functional import resample

CLASSES = ("drums", "bass", "vocals", "other")
EXTENSIONS = (".wav", ".flac", ".ogg")
NOT_A_STEM = ("mix", "mixture")


def stem_class(name):
    """The class that the name of a stem begins with.

    Arguments
    ---------
    name : str
        File name, with or without extension.

    Returns
    -------
    str
        One of ``CLASSES``.

    Example
    -------
    >>> [stem_class(name) for name in ("perc_bonk.ogg", "Bass", "clav")]
    ['drums', 'bass', 'other']
    """
    beginnings = {"perc": "drums", "drum": "drums"}
    beginnings |= {"bass": "bass", "vocal": "vocals"}
    for beginning, one in beginnings.items():
        if name.lower().startswith(beginning):
            return one
    return "other"


def read_stems(folder, sample_rate):
    """Reads the stems of a song, mono ones as stereo if any is stereo.

    Arguments
    ---------
    folder : str or Path
        Of the song; files other than audio are left out, and so is a file
        of the mixture.
    sample_rate : int
        Wanted rate, in Hz.

    Returns
    -------
    dict
        File name without extension -> [channels, time], as long as the
        shortest stem.

    Raises
    ------
    ValueError
        If there is no stem.
    """
    stems = {}
    for path in sorted(pathlib.Path(folder).iterdir()):
        if path.suffix.lower() not in EXTENSIONS or path.stem in NOT_A_STEM:
            continue
        sig, rate = soundfile.read(path, dtype="float32", always_2d=True)
        stems[path.stem] = resample(torch.from_numpy(sig.T), rate, sample_rate)
    if not stems:
        raise ValueError(f"{folder}: expected stems as wav, flac or ogg files")
    channels = max(len(sig) for sig in stems.values())
    length = min(sig.shape[-1] for sig in stems.values())
    return {
        name: sig[:, :length].expand(channels, -1)
        for name, sig in stems.items()
    }


def sum_by_class(stems):
    """Adds the stems of each class.

    Arguments
    ---------
    stems : dict
        Name -> [channels, time].

    Returns
    -------
    dict
        Class -> [channels, time]; no class without a stem.

    Example
    -------
    >>> one = torch.ones(2, 3)
    >>> stems = sum_by_class({"horns": one, "clav": one, "bass_pad": one})
    >>> {name: float(sig[0, 0]) for name, sig in stems.items()}
    {'bass': 1.0, 'other': 2.0}
    """
    classes = {name: stem_class(name) for name in stems}
    return {
        one: sum(sig for name, sig in stems.items() if classes[name] == one)
        for one in CLASSES
        if one in classes.values()
    }


def windows(stems, length):
    """Cuts a song into windows; what is left at the end is dropped.

    Arguments
    ---------
    stems : dict
        Name -> [channels, time].
    length : int
        Of a window, in samples.

    Yields
    ------
    dict
        Name -> [channels, length].

    Example
    -------
    >>> [w["a"].tolist() for w in windows({"a": torch.arange(5)[None]}, 2)]
    [[[0, 1]], [[2, 3]]]
    """
    time = next(iter(stems.values())).shape[-1]
    for first in range(0, time - length + 1, length):
        yield {
            name: sig[:, first : first + length] for name, sig in stems.items()
        }
