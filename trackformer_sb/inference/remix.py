"""Which outputs of a separator to keep, to sum into groups, and to remix."""

import re

import numpy as np

NONE = "none"
REMIX = "remix"

# What a part of a text may be: name=0+1 or 0, and name:-3, 0:-inf or name@0.5.
OUTPUTS = re.compile(
    r"\s*(?:([^=\s][^=]*?)\s*=\s*(\d+(?:\s*\+\s*\d+)*)|(\d+))\s*"
)
GAINS = re.compile(r"\s*(\S.*?)\s*([:@])\s*([+-]?(?:\d+\.?\d*|\.\d+)|-inf)\s*")


def _parsed(text, form, expected):
    """What a form finds in each part of a text between commas."""
    matches = [form.fullmatch(part) for part in text.split(",")]
    if not all(matches):
        raise ValueError(f"expected {expected}, got {text!r}")
    return [match.groups() for match in matches]


def _parse_outputs(text):
    """Pairs of name and numbers of outputs."""
    if text.strip().lower() == NONE:
        return []
    pairs = []
    expected = "outputs as in 0,2 or drums=0+3,rest=1+2 or none"
    for name, several, one in _parsed(text, OUTPUTS, expected):
        indices = tuple(map(int, (several or one).split("+")))
        pairs.append((name or f"source{indices[0]}", indices))
    return pairs


def check_outputs(outputs, num_spks):
    """Which outputs of a model to write: name -> tuple of their numbers.

    They are given so, or as text: ``0,2`` or ``drums=0+3,rest=1+2``, where an
    output by itself is named ``source`` and its number; ``none`` is no output,
    None all of them.

    Example
    -------
    >>> check_outputs(None, 2)
    {'source0': (0,), 'source1': (1,)}
    >>> check_outputs("0,drums=1+3", 4)
    {'source0': (0,), 'drums': (1, 3)}
    """
    if outputs is None:
        outputs = {f"source{i}": (i,) for i in range(num_spks)}
    pairs = outputs.items() if isinstance(outputs, dict) else ()
    if isinstance(outputs, str):
        pairs = _parse_outputs(outputs)
    checked = {}
    for name, indices in pairs:
        # a remix would take numbers for outputs
        taken = name.lower() == REMIX or name.isdecimal()
        if taken or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(
                "expected names of letters, digits, '.', '-' and '_' other "
                f"than {REMIX} and numbers, got {name!r}"
            )
        # song_Drums.wav and song_drums.wav are one file on some disks
        if name.lower() in map(str.lower, checked):
            raise ValueError(f"the name {name} occurs twice in {outputs!r}")
        known = set(indices) <= set(range(num_spks))
        if not indices or not known or len(set(indices)) < len(indices):
            raise ValueError(
                f"{name}: expected outputs from 0 to {num_spks - 1}, each "
                f"once, got {', '.join(map(str, indices)) or 'none'}"
            )
        checked[name] = tuple(indices)
    return checked


def chosen_stems(text, groups):
    """Some named stems, by their names, and the rest as one.

    Example
    -------
    >>> groups = {"drums": (0, 1), "vocals": (2, 3), "other": (4, 5)}
    >>> chosen_stems("vocals", groups)
    {'vocals': (2, 3), 'rest': (0, 1, 4, 5)}
    """
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in (groups or {})]
    if unknown:
        has = ", ".join(groups) if groups else "no names"
        raise ValueError(
            f"stems: this model has {has}; got {', '.join(unknown)}"
        )
    chosen = {name: tuple(groups[name]) for name in names}
    left = [x for name in groups if name not in chosen for x in groups[name]]
    rest = "the_rest" if "rest" in chosen else "rest"
    return chosen | ({rest: tuple(left)} if left else {})


def _parse_remix(text):
    """Gains in dB and pans, of outputs by number or name."""
    expected = "gains in dB and pans (other@0.5), as in 0:-inf,3:+3"
    found = {":": {}, "@": {}}
    for key, kind, value in _parsed(text, GAINS, expected):
        found[kind][int(key) if key.isdecimal() else key] = float(value)
    return found[":"], found["@"]


def _of_outputs(values, outputs, num_spks):
    """A value for each output, [num_spks], from those of some; 0 of others."""
    found = np.zeros(num_spks)
    for key, value in values.items():
        indices = outputs.get(key, (key,))
        if not set(indices) <= set(range(num_spks)):
            raise ValueError(
                f"remix: expected outputs from 0 to {num_spks - 1} or one of "
                f"{', '.join(outputs) or 'no groups'}, got {key!r}"
            )
        found[list(indices)] = value
    return found


def mix_gains(outputs, remix, num_spks, stems=None):
    """What is written, as mixes of all outputs of a model.

    ``outputs`` are as of ``check_outputs``. ``remix`` is None, or outputs, by
    number or by a name among them or among ``stems``, -> gains in dB, or text
    as in ``0:-inf,drums:+3,other@0.5``, the last a pan; outputs it does not
    name stay as they are. Returns names, "remix" last, gains, float32 [names,
    num_spks], and pans, [num_spks].
    """
    rows = {
        name: [float(i in indices) for i in range(num_spks)]
        for name, indices in outputs.items()
    }
    pans, known = {}, (stems or {}) | outputs
    if remix is not None:
        if isinstance(remix, str):
            remix, pans = _parse_remix(remix)
        rows[REMIX] = 10 ** (_of_outputs(remix, known, num_spks) / 20)
        if not all(-1 <= pan <= 1 for pan in pans.values()):
            raise ValueError(
                f"pan: expected -1 (left) to 1 (right), got {pans}"
            )
    gains = np.array(list(rows.values()), "float32")
    places = _of_outputs(pans, known, num_spks).astype("float32")
    return list(rows), gains.reshape(-1, num_spks), places


def pan_matrix(pan, channels):
    """What moves sound to the left, -1, or to the right, 1, [2, channels].

    As the StereoPannerNode of the Web Audio API does: of stereo, the far side
    goes over to the near one, and 0 changes nothing. Mono keeps its power; at 0
    both sides are what it was.

    Example
    -------
    >>> (pan_matrix(-1, 2) @ [0.5, 0.2]).round(2).tolist()
    [0.7, 0.0]
    >>> [pan_matrix(x, 1).round(2).T.tolist() for x in (0, 1 / 3, 1)]
    [[[1.0, 1.0]], [[0.71, 1.22]], [[0.0, 1.41]]]
    """
    if channels == 1:
        angle = (pan + 1) * np.pi / 4
        return np.sqrt(2) * np.array([[np.cos(angle)], [np.sin(angle)]])
    if channels != 2:
        raise ValueError(f"pan: expected 1 or 2 channels, got {channels}")
    angle = abs(pan) * np.pi / 2
    to_left = np.array([[1, np.sin(angle)], [0, np.cos(angle)]])
    return to_left if pan < 0 else to_left[::-1, ::-1]
