"""What a catalogue leaves out, and what looked odd."""

import os
import re
from collections import Counter

from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)


def skipped_table(skipped):
    """What was left out, a line a kind of reason.

    Arguments
    ---------
    skipped : list of dict
        {"file", "reason"} each, as in data_report.json.

    Returns
    -------
    str
    """
    kinds, first = Counter(), {}
    for entry in skipped:
        # reasons differ by the numbers and paths in them
        kind = re.sub(r"/.*|\d[\d.]*", "...", entry["reason"])
        kinds[kind] += 1
        first.setdefault(kind, entry["file"])
    lines = [
        f"{count:5d}  {kind}, first {first[kind]}"
        for kind, count in kinds.most_common()
    ]
    return "\n".join([f"{len(skipped)} left out", *lines])


class Findings:
    """What was left out or looked odd; every entry is logged once.

    Attributes `skipped`, a list of {"file", "reason"}, and `warnings`, a list
    of messages, go into the data report.

    Arguments
    ---------
    strict : bool
        Whether the first thing left out is an error, unless it is not wanted.

    Example
    -------
    >>> findings = Findings()
    >>> findings.skip("/music/a.wav", "truncated after 3.2 s", quiet=True)
    >>> findings.skip("/music/b.wav", "truncated after 0.1 s", quiet=True)
    >>> print(findings.summary())
    2 left out
        2  truncated after ... s, first /music/a.wav
    """

    def __init__(self, strict=False):
        self.strict = strict
        self.skipped = []
        self.warnings = []

    def below(self, folder):
        """What was left out so far, relative to a folder.

        Arguments
        ---------
        folder : str or Path
            The folder.

        Returns
        -------
        list of str
        """
        return [os.path.relpath(x["file"], folder) for x in self.skipped]

    def warn(self, message):
        """Logs and keeps a message."""
        logger.warning(message)
        self.warnings.append(message)

    def skip(self, file, reason, quiet=False, unwanted=False):
        """Keeps a file that is left out, with a warning unless `quiet`.

        Arguments
        ---------
        file : str or Path
            The file, or the folder of a song.
        reason : str
            Why.
        quiet : bool
            Whether not to warn.
        unwanted : bool
            Whether nothing is wrong with it, but the settings or the layout of
            the dataset do not want it.

        Raises
        ------
        ValueError
            If `strict`, and it is wanted.
        """
        if self.strict and not unwanted:
            raise ValueError(f"strict: {file}: {reason}")
        self.skipped.append({"file": str(file), "reason": reason})
        if not quiet:
            self.warn(f"skipped {file}: {reason}")

    def summary(self):
        """A table of what was left out, a line a kind of reason."""
        return skipped_table(self.skipped)
