"""The ``trackformer`` command that makes music to train on."""

import argparse
import os

from trackformer_sb.cli_data import complain, number, positive


def _count(text):
    """A whole number of 0 or more, for argparse."""
    value = number(text, int)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def add_make_music(commands):
    """Adds ``trackformer make-music``.

    Arguments
    ---------
    commands : argparse._SubParsersAction
        What ``add_subparsers`` returned.

    Example
    -------
    >>> parser = argparse.ArgumentParser()
    >>> add_make_music(parser.add_subparsers())
    >>> args = parser.parse_args(["make-music", "music", "--voices", "9"])
    >>> args.voices, args.seconds
    (9, 75.0)
    """
    parser = commands.add_parser(
        "make-music",
        help="music with stems from MIDI files, soundfonts, drum kits, speech",
        description=(
            "Plays General MIDI files with soundfonts, drum patterns with "
            "Hydrogen kits, and lets a speech synthesiser sing. Train on the "
            "result with dataset: stems. Called again, it goes on."
        ),
    )
    parser.add_argument("out", metavar="OUT", help="folder for the music")
    parser.add_argument(
        "--midi",
        nargs="+",
        default=(),
        metavar="FOLDER",
        help="folders with General MIDI files",
    )
    parser.add_argument(
        "--soundfont",
        nargs="+",
        default=(),
        metavar="FILE",
        help="sf2 or sf3 files that play them",
    )
    parser.add_argument(
        "--drum_soundfont",
        nargs="+",
        default=(),
        metavar="FILE",
        help="sf2 or sf3 files that play the drums now and then",
    )
    parser.add_argument(
        "--drumkits",
        nargs="+",
        default=(),
        metavar="FOLDER",
        help="folders with Hydrogen drum kits",
    )
    parser.add_argument(
        "--drums",
        type=_count,
        default=50,
        metavar="N",
        help="clips of these kits (default: %(default)s)",
    )
    parser.add_argument(
        "--voices",
        type=_count,
        default=0,
        metavar="N",
        help="clips of singing (default: %(default)s)",
    )
    parser.add_argument(
        "--renders",
        type=_count,
        default=1,
        metavar="N",
        help="times each MIDI file is played, each time with another soundfont "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        choices=("piano", "guitar", "bass"),
        default=("bass",),
        help="instruments with stems of their own beside drums and other "
        "(default: bass)",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=75.0,
        help="length of a piece at most (default: %(default)s)",
    )
    parser.add_argument("--seed", type=_count, default=0, help="of all draws")
    parser.add_argument(
        "--jobs",
        type=_count,
        default=0,
        metavar="N",
        help="processes (default: one for each CPU)",
    )
    parser.set_defaults(run=_make_music)


def _make_music(args):
    """Runs ``trackformer make-music``."""
    from trackformer_sb.data.make_music import make_music

    try:
        result = make_music(
            args.out,
            midi=args.midi,
            soundfonts=args.soundfont,
            drum_soundfonts=args.drum_soundfont,
            drumkits=args.drumkits,
            drums=args.drums,
            voices=args.voices,
            renders=args.renders,
            seconds=args.seconds,
            classes=args.classes,
            seed=args.seed,
            jobs=args.jobs or os.cpu_count(),
        )
    except ImportError as error:
        complain(args, f"{error}: pip install 'trackformer_sb[music]'")
        return 2
    except (OSError, ValueError, RuntimeError) as error:
        complain(args, error)
        return 2
    print(
        f"{len(result['made'])} made, {len(result['kept'])} there before, "
        f"{len(result['left_out'])} left out in {args.out}"
    )
    return 0 if result["made"] or result["kept"] else 1
