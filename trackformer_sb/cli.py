"""The ``trackformer`` command.

Each command imports what it needs when it runs: ``--help`` answers at once.
"""

import argparse
import io
import sys

from trackformer_sb import __version__
from trackformer_sb.cli_data import (
    add_data,
    add_make_music,
    add_shards,
    complain,
)
from trackformer_sb.cli_model import add_demo, add_export, add_info
from trackformer_sb.cli_separate import add_separate

TESTED = "2.11.0"  # of torch and torchaudio, as in requirements.lock


def exit_unless_pair_fits():
    """Imports torchaudio, with one line in place of a traceback.

    From 2.11 on its metadata admits every newer torch, yet its library loads
    beside some of them only. The error would come from inside of SpeechBrain.

    Raises
    ------
    SystemExit
        With exit code 1; on standard error the reason, and what mends it.
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
    """The arguments of all commands, and ``run``, which takes them.

    Example
    -------
    >>> build_parser().parse_args(["separate", "song.mp3"]).overlap
    0.25
    """
    parser = argparse.ArgumentParser(
        prog="trackformer",
        description="Music separation without labelled stems.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True
    )
    for add in (
        add_separate,
        add_export,
        add_info,
        add_data,
        add_shards,
        add_make_music,
        add_demo,
    ):
        add(commands)
    return parser


def main(argv=None):
    """Runs the command line; returns its exit code.

    0 if all went well, 1 if a file failed, 2 for a wrong usage, which includes
    a model that does not load, and for what the hub refuses, 130 after Ctrl+C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # names of files need not be valid UTF-8
        sys.stdout.reconfigure(errors="surrogateescape")
    args = build_parser().parse_args(argv)
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
