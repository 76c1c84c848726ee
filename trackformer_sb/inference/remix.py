"""Which outputs of a separator to keep, to sum into groups, and to remix.

Imports nothing heavy, so that the command line can check its arguments at
once.
"""

import re

NONE = "none"
REMIX = "remix"

# Beyond this nothing of music is left in 32 bits.
MAX_GAIN_DB = 120.0


def parse_outputs(text):
    """Reads which outputs to write.

    Arguments
    ---------
    text : str
        Numbers of outputs and sums of them with a name, separated by commas:
        ``0,2`` or ``drums=0+3,rest=1+2``; ``none`` for no output at all.

    Returns
    -------
    dict
        Name -> tuple of the numbers of its outputs. An output by itself is
        named ``source`` and its number.

    Raises
    ------
    ValueError
        If the text is of another form, or a name occurs twice or cannot be
        part of a file name.

    Example
    -------
    >>> parse_outputs("0,drums=1+3")
    {'source0': (0,), 'drums': (1, 3)}
    """
    outputs = {}
    if text.strip().lower() == NONE:
        return outputs
    for part in text.split(","):
        name, equals, numbers = part.strip().rpartition("=")
        if not re.fullmatch(r"\s*\d+(\s*\+\s*\d+)*\s*", numbers):
            raise ValueError(
                "expected outputs as in 0,2 or drums=0+3,rest=1+2 or none, "
                f"got {text!r}"
            )
        indices = tuple(int(number) for number in numbers.split("+"))
        if not equals:
            if len(indices) > 1:
                raise ValueError(
                    f"expected a name for the sum {numbers.strip()}, as in "
                    f"drums={numbers.strip()}, got {text!r}"
                )
            name = f"source{indices[0]}"
        outputs[_new_name(name.strip(), outputs, text)] = indices
        if len(set(indices)) < len(indices):
            raise ValueError(f"an output occurs twice in {part.strip()!r}")
    return outputs


def _new_name(name, outputs, text):
    """A name that can be part of a file name, and is not yet taken."""
    taken = name.lower() == REMIX or name.isdecimal()
    if taken or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            "expected names of letters, digits, '.', '-' and '_' other than "
            f"{REMIX} and numbers, got {name!r}"
        )
    # song_Drums.wav and song_drums.wav are one file on some disks
    if name.lower() in map(str.lower, outputs):
        raise ValueError(f"the name {name} occurs twice in {text!r}")
    return name


def chosen_stems(text, groups):
    """Some named stems, and the rest as one.

    Arguments
    ---------
    text : str
        Names, separated by commas.
    groups : dict or None
        Name -> outputs of all stems, None where a model has no names.

    Returns
    -------
    dict
        Name -> tuple of outputs; "rest" is what is left, if anything.

    Raises
    ------
    ValueError
        If the model has no stem of a name.

    Example
    -------
    >>> groups = {"drums": (0, 1), "vocals": (2, 3), "other": (4, 5)}
    >>> chosen_stems("vocals", groups)
    {'vocals': (2, 3), 'rest': (0, 1, 4, 5)}
    """
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in (groups or {})]
    if unknown:
        has = ", ".join(groups) if groups else "no names: try --outputs"
        raise ValueError(
            f"stems: this model has {has}; got {', '.join(unknown)}"
        )
    chosen = {name: tuple(groups[name]) for name in names}
    left = [x for name in groups if name not in chosen for x in groups[name]]
    rest = "the_rest" if "rest" in chosen else "rest"
    return chosen | ({rest: tuple(left)} if left else {})


def parse_remix(text):
    """Reads the gains of a remix.

    Arguments
    ---------
    text : str
        Outputs, by number or by the name of a group, with gains in dB:
        ``0:-inf,3:+3`` mutes output 0 and raises output 3 by 3 dB.

    Returns
    -------
    dict
        Number or name -> gain in dB, below infinity.

    Raises
    ------
    ValueError
        If the text is of another form, or an output occurs twice.

    Example
    -------
    >>> parse_remix("0:-inf,drums:+3")
    {0: -inf, 'drums': 3.0}
    """
    gains = {}
    for part in text.split(","):
        key, _, gain = part.rpartition(":")
        key = key.strip()
        try:
            decibels = float(gain)
        except ValueError:
            decibels = float("nan")
        if not key or not decibels < float("inf"):
            raise ValueError(
                "expected outputs and gains in dB, as in 0:-inf,3:+3, got "
                f"{text!r}"
            )
        key = int(key) if key.isdecimal() else key
        if key in gains:
            raise ValueError(f"the output {key} occurs twice in {text!r}")
        gains[key] = decibels
    return gains


def check_outputs(outputs, num_spks):
    """Which outputs of a model to write, by name.

    Arguments
    ---------
    outputs : dict or str or None
        As of ``parse_outputs``, or its argument; None for all outputs.
    num_spks : int
        Number of outputs of the model.

    Returns
    -------
    dict
        Name -> tuple of numbers of outputs.

    Raises
    ------
    ValueError
        If the model has no such output, a group has none or one twice, or a
        name cannot be part of a file name.

    Example
    -------
    >>> check_outputs(None, 2)
    {'source0': (0,), 'source1': (1,)}
    """
    if outputs is None:
        return {f"source{i}": (i,) for i in range(num_spks)}
    if isinstance(outputs, str):
        outputs = parse_outputs(outputs)
    checked = {}
    for name, indices in outputs.items():
        # names become file names, those of a dict as well
        checked[_new_name(name, checked, outputs)] = indices
        if not indices or len(set(indices)) < len(indices):
            raise ValueError(
                f"{name}: expected outputs, each once, got {indices}"
            )
        for index in indices:
            _check_index(index, num_spks, name)
    return outputs


def remix_gains(remix, outputs, num_spks):
    """The factors by which the outputs enter a remix.

    Arguments
    ---------
    remix : dict or str
        As of ``parse_remix``, or its argument. Outputs it does not name stay
        as they are.
    outputs : dict
        As of ``check_outputs``: the groups whose names may be used.
    num_spks : int
        Number of outputs of the model.

    Returns
    -------
    list of float
        One factor an output.

    Raises
    ------
    ValueError
        If the model has no such output, there is no such group, or an output
        is in two of them.

    Example
    -------
    >>> remix_gains("0:-inf,voice:-20", {"voice": (1, 3)}, num_spks=4)
    [0.0, 0.1, 1.0, 0.1]
    """
    if isinstance(remix, str):
        remix = parse_remix(remix)
    factors = {}
    for key, decibels in remix.items():
        if key not in outputs and not isinstance(key, int):
            raise ValueError(
                f"remix: expected the number of an output or one of "
                f"{', '.join(outputs) or 'no groups'}, got {key!r}"
            )
        for index in outputs[key] if key in outputs else (key,):
            _check_index(index, num_spks, REMIX)
            if index in factors:
                raise ValueError(f"remix: two gains for the output {index}")
            if not decibels <= MAX_GAIN_DB:
                raise ValueError(
                    f"remix: expected gains up to {MAX_GAIN_DB:g} dB, got "
                    f"{decibels} for {key}"
                )
            factors[index] = 10 ** (decibels / 20)
    return [factors.get(index, 1.0) for index in range(num_spks)]


def _check_index(index, num_spks, name):
    if not 0 <= index < num_spks:
        raise ValueError(
            f"{name}: expected outputs from 0 to {num_spks - 1}, got {index}"
        )


def loudest_first(energies):
    """The order of outputs by their energy.

    Arguments
    ---------
    energies : sequence of float
        One number an output.

    Returns
    -------
    list of int
        Numbers of outputs, the one of the most energy first; equal ones keep
        their order.

    Example
    -------
    >>> loudest_first([0.5, 0.0, 2.0, 0.0])
    [2, 0, 1, 3]
    """
    return sorted(range(len(energies)), key=lambda index: -energies[index])
