"""The ``trackformer`` command.

Each command imports what it needs when it runs: ``--help`` answers at once.
"""

import argparse
import os
import sys

from trackformer_sb.cli_data import add_data, add_shards, complain, positive


def _overlap(text):
    """A fraction of a chunk."""
    value = float(text)
    if not 0 <= value <= 0.5:
        raise argparse.ArgumentTypeError(f"must be in [0, 0.5], got {text}")
    return value


def _add_separate(commands):
    """Adds ``trackformer separate``."""
    parser = commands.add_parser(
        "separate",
        help="separate audio files into sources",
        description=(
            "Writes one float wav per output of the model, at the rate and "
            "with the channels of the file; together they sum to it."
        ),
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="audio files to separate"
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="separator folder as training leaves it, or a model on the hub",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder for the sources: <file>_source0.wav and so on",
    )
    parser.add_argument(
        "--device", help="cpu or cuda; by default a GPU if there is one"
    )
    parser.add_argument(
        "--chunk_seconds",
        type=positive,
        default=10.0,
        metavar="SECONDS",
        help="what the model sees at once (default: %(default)s)",
    )
    parser.add_argument(
        "--overlap",
        type=_overlap,
        default=0.25,
        metavar="SHARE",
        help="of a chunk with the next, 0 to 0.5 (default: %(default)s)",
    )
    parser.set_defaults(run=_separate)


def _check_stems(files):
    """Refuses files whose sources would overwrite each other."""
    taken = {}
    for path in files:
        stem = os.path.splitext(os.path.basename(path))[0]
        if stem in taken:
            raise ValueError(
                f"{taken[stem]} and {path} would write the same files, "
                f"{stem}_source0.wav and so on"
            )
        taken[stem] = path


def _load_model(args):
    """The separator, on the wanted device."""
    import torch

    from trackformer_sb.inference.interfaces import PerformerSeparation

    run_opts = {}
    if args.device is not None:
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"--device {args.device}: torch finds no CUDA device"
            )
        # SpeechBrain warns of "cuda" without a number
        device = "cuda:0" if args.device == "cuda" else args.device
        run_opts["device"] = device
    return PerformerSeparation.from_hparams(
        source=args.model, run_opts=run_opts
    )


def _separate(args):
    """Runs ``trackformer separate``."""
    try:
        _check_stems(args.files)
        separator = _load_model(args)
    except ImportError as error:
        hint = "a separator of Asteroid's parts needs the extra [asteroid]"
        complain(args, f"{error} ({hint})")
        return 2
    except (OSError, ValueError, RuntimeError) as error:
        complain(args, error)
        return 2
    failed = 0
    for path in args.files:
        try:
            written = separator.separate_file(
                path,
                out_folder=args.out,
                chunk_seconds=args.chunk_seconds,
                overlap=args.overlap,
                progressbar=sys.stderr.isatty(),
            )
        except (OSError, ValueError, RuntimeError) as error:
            # soundfile's and torch's errors are RuntimeErrors
            reason = str(error)
            if path not in reason:
                reason = f"{path}: {reason}"
            complain(args, reason)
            failed += 1
        else:
            print(*written, sep="\n", flush=True)
    return 1 if failed else 0


def build_parser():
    """The arguments of all commands.

    Returns
    -------
    argparse.ArgumentParser
        Its result has ``run``, a function of it that returns the exit code.

    Example
    -------
    >>> args = ["separate", "song.wav", "--model", "separator", "--out", "."]
    >>> build_parser().parse_args(args).overlap
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
    _add_separate(commands)
    add_data(commands)
    add_shards(commands)
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
        usage, which includes a model that does not load.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help is 0, a usage error is 2
        return stop.code
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
