"""The ``trackformer`` command.

Each command imports what it needs when it runs: ``--help`` answers at once,
with the docstrings of the functions that add its arguments.
"""

import argparse
import inspect
import logging
import os
import re
import sys

from trackformer_sb import __version__
from trackformer_sb.cli_data import (
    add_data,
    add_make_music,
    add_shards,
    complain,
)
from trackformer_sb.cli_live import add_live
from trackformer_sb.cli_model import (
    add_adapt,
    add_demo,
    add_evaluate,
    add_export,
    add_info,
)
from trackformer_sb.cli_separate import (
    add_karaoke,
    add_remix,
    add_separate,
    add_transcribe,
)
from trackformer_sb.paths import expanded

TESTED = "2.11.0"  # of torch and torchaudio, as in requirements.lock

# Of each start of a recipe; log.txt has them.
DETAILS = re.compile(
    "torchvision is not available|(Applied|Excluded) quirks|Run option "
    "|Gradscaler enabled|Using (training|evaluation) precision"
    "|.* in hparams was overridden"
)


class Console:
    """A standard stream whose reader may go away: the work goes on."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        """Writes, or drops what nobody takes."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self):
        """Sends on what was written."""
        self._try(self._stream.flush)

    def _try(self, method, *args):
        try:
            method(*args)
        except OSError:
            # what is left in buffers, and what libraries print, ends there too
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


def steady_console():
    """Lets no standard stream stop the work, and the start print little.

    A stream may be closed, None (under pythonw) or a broken pipe.
    """
    # files that are opened next must not get the numbers of closed ones
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            stream = open(os.devnull, "w", encoding="utf-8")
        if not isinstance(stream, Console):
            setattr(sys, name, Console(stream))
    if hasattr(sys.stdout, "reconfigure"):
        # names of files need not be valid UTF-8
        sys.stdout.reconfigure(errors="surrogateescape")
    for name in ("core", "utils.quirks", "utils.train_logger"):
        logging.getLogger(f"speechbrain.{name}").addFilter(_demote_details)


def _demote_details(record):
    """Passes all records, details as less than the console shows."""
    if DETAILS.match(record.getMessage()):
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return True


def exit_unless_pair_fits():
    """Imports torchaudio, with one line in place of a traceback.

    From 2.11 on its metadata admits every newer torch, yet its library loads
    beside some of them only. The error would come from inside of SpeechBrain.
    """
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        sys.exit(
            f"torch and torchaudio do not load side by side ({error}); mend it "
            f"by: {sys.executable} -m pip install --force-reinstall "
            f"torch=={TESTED} torchaudio=={TESTED}"
        )


def build_parser():
    """The arguments of all commands, and ``run``, which takes them."""
    parser = argparse.ArgumentParser(
        prog="trackformer",
        description="Music separation without labelled stems.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True
    )
    for add in (
        *(add_separate, add_karaoke, add_remix, add_transcribe, add_live),
        *(add_adapt, add_export, add_info, add_evaluate),
        *(add_data, add_shards, add_make_music, add_demo),
    ):
        text = inspect.getdoc(add)
        command = commands.add_parser(
            add.__name__.removeprefix("add_").replace("_", "-"),
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add(command)
    return parser


def _expanded(value):
    """An option with ~ and environment variables in it."""
    if isinstance(value, (list, tuple)):
        return [_expanded(each) for each in value]
    return expanded(value) if isinstance(value, str) else value


def main(argv=None):
    """Runs the command line; returns its exit code.

    0 if all went well, 1 if a file failed, 2 for a wrong usage, which includes
    a model that does not load, and for what the hub refuses, 130 after Ctrl+C.
    """
    steady_console()
    args = build_parser().parse_args(argv)
    for name, value in vars(args).items():
        setattr(args, name, _expanded(value))
    exit_unless_pair_fits()
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        complain(args, "interrupted")
        return 130
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        # soundfile's and torch's errors are RuntimeErrors
        complain(args, error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
