"""The ``trackformer`` command.

Each command imports what it needs when it runs: ``--help`` answers at once.
"""

import argparse
import io
import sys

from trackformer_sb.cli_data import add_data, add_shards, complain
from trackformer_sb.cli_demo import add_demo
from trackformer_sb.cli_model import add_export, add_info
from trackformer_sb.cli_music import add_make_music
from trackformer_sb.cli_separate import add_separate
from trackformer_sb.torch_pair import exit_unless_pair_fits


def build_parser():
    """The arguments of all commands.

    Returns
    -------
    argparse.ArgumentParser
        Its result has ``run``, a function of it that returns the exit code.

    Example
    -------
    >>> build_parser().parse_args(["separate", "song.mp3"]).overlap
    0.25
    """
    from trackformer_sb import __version__

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
    """Runs the command line.

    Arguments
    ---------
    argv : list of str, optional
        Arguments, by default those of the process.

    Returns
    -------
    int
        Exit code: 0 if all went well, 1 if a file failed, 2 for a wrong
        usage, which includes a model that does not load, 130 after Ctrl+C.

    Raises
    ------
    SystemExit
        With one line, for a torch and a torchaudio that do not load.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # names of files need not be valid UTF-8
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help is 0, a usage error is 2
        return stop.code
    exit_unless_pair_fits()
    try:
        return args.run(args)
    except KeyboardInterrupt:
        complain(args, "interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
