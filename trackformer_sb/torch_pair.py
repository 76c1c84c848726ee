"""Whether the torch and torchaudio that are installed load side by side.

From 2.11 on torchaudio's metadata admits every newer torch, yet its library
loads beside some of them only, and the error comes from inside of SpeechBrain.
"""

import sys
from importlib import metadata

TESTED = "2.11.0"  # of both, as in requirements.lock
# Releases on the registry do not say for what they were built.
REGISTRY_BUILD = "cu130"
BUILDS = ("cpu", "cu", "rocm")
# torchaudio -> first and last torch that it loads beside, found by trying
TORCH_BESIDE = {
    (2, 11, 0): ((2, 11), (2, 14)),
    (2, 11, 1): ((2, 13), (2, 15)),
}


def _split(version):
    """Numbers and build of a version.

    Example
    -------
    >>> _split("2.11.0+cpu"), _split("2.11.0")
    (((2, 11, 0), 'cpu'), ((2, 11, 0), ''))
    """
    release, _, build = version.partition("+")
    return tuple(int(x) for x in release.split(".") if x.isdigit()), build


def fits(torch, torchaudio):
    """Whether two releases load side by side.

    Arguments
    ---------
    torch, torchaudio : str
        Versions as in the metadata of the installed packages.

    Returns
    -------
    bool
        Whether it was tried and loaded. Other releases of torchaudio fit the
        torch of their own number.

    Example
    -------
    >>> fits("2.11.0", "2.11.0"), fits("2.11.0", "2.11.1")
    (True, False)
    """
    (release, build), (audio, audio_build) = _split(torch), _split(torchaudio)
    builds = build or REGISTRY_BUILD, audio_build or REGISTRY_BUILD
    known = all(label.startswith(BUILDS) for label in builds)
    if known and builds[0] != builds[1]:
        return False
    minor = release[:2]
    if audio < min(TORCH_BESIDE):
        return minor == audio[:2]
    first, last = TORCH_BESIDE.get(audio, (minor, minor))
    return first <= minor <= last


def check_pair():
    """Looks at the metadata, before torchaudio loads.

    Raises
    ------
    ImportError
        In one line: both versions, and the command that mends them.
    """
    try:
        found = [metadata.version(name) for name in ("torch", "torchaudio")]
    except metadata.PackageNotFoundError:
        return  # its import says so
    if not fits(*found):
        torch, torchaudio = found
        raise ImportError(
            f"torch {torch} and torchaudio {torchaudio} do not load side by "
            f"side; mend it by: {sys.executable} -m pip install "
            f"--force-reinstall torch=={TESTED} torchaudio=={TESTED}"
        )


def exit_unless_pair_fits():
    """``check_pair`` for scripts: its line in place of a traceback.

    Raises
    ------
    SystemExit
        With exit code 1, the line on standard error.
    """
    try:
        check_pair()
    except ImportError as error:
        sys.exit(str(error))
