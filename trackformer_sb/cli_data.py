"""The ``trackformer`` commands that look at music and pack it."""

import argparse
import os
import sys


def number(text, kind=float):
    """A number, for argparse, whose own message would name the function."""
    try:
        return kind(text)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(
            f"must be {what}, got {text!r}"
        ) from error


def positive(text):
    """A finite number above 0, for argparse."""
    value = number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _mapping(text):
    """A mapping in yaml, for argparse."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"is no yaml: {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a mapping, got {text}")
    return value


def complain(args, message):
    """A message on stderr in one line, with the command it is from."""
    # torch's and the hub's have several
    lines = [line.strip() for line in str(message).splitlines()]
    print(f"trackformer {args.command}:", *lines, file=sys.stderr)


# Arguments of ``data.music.Music`` that can be given.
MUSIC_OPTIONS = {
    "dataset": {
        "default": "mixtures",
        "help": "mixtures (any music files), stems, moisesdb, musdb18hq or "
        "slakh2100 (default: %(default)s)",
    },
    "split": {
        "choices": ("auto", "by_song", "from_file"),
        "default": "auto",
        "help": "auto: the dataset's own split where it has one",
    },
    "split_file": {"metavar": "YAML", "help": "for from_file"},
    "split_ratio": {
        "type": float,
        "nargs": 3,
        "default": (80, 10, 10),
        "metavar": "SHARE",
        "help": "of train, valid and test (default: 80 10 10)",
    },
    "seed": {"type": int, "default": 1234, "help": "of the split"},
    "max_stems": {
        "type": int,
        "metavar": "N",
        "help": "leave out songs with more stems",
    },
    "min_active_share": {
        "type": float,
        "default": 0.0,
        "metavar": "SHARE",
        "help": "leave out segments of which less sounds",
    },
    "min_level_db": {
        "type": float,
        "metavar": "DB",
        "help": "leave out segments below this level in dBFS",
    },
    "stem_groups": {
        "type": _mapping,
        "metavar": "YAML",
        "help": "stems that are one, as in '{band: [bass, guitar*]}'",
    },
    "test_folder": {
        "metavar": "DIR",
        "help": "music of another folder to test on",
    },
    "test_dataset": {
        "default": "stems",
        "help": "what it holds (%(default)s)",
    },
    "cache_folder": {
        "metavar": "DIR",
        "help": "where what was read of files is kept",
    },
    "strict": {
        "action": "store_true",
        "help": "stop at the first file that cannot be used",
    },
}


def _add_music_options(parser, hint=""):
    """What ``trackformer data`` and ``trackformer shards make`` share."""
    parser.add_argument("folder", metavar="FOLDER", help="folder with music")
    parser.add_argument(
        "--segment_seconds",
        type=positive,
        default=3.0,
        metavar="SECONDS",
        help=f"length of a segment (default: %(default)s){hint}",
    )
    for name, option in MUSIC_OPTIONS.items():
        parser.add_argument(f"--{name}", **option)


def _music(args, **more):
    """The music that the options describe."""
    from trackformer_sb.data.music import Music

    options = {name: getattr(args, name) for name in MUSIC_OPTIONS}
    return Music(args.folder, **options, **more)


def add_data(commands):
    """Adds ``trackformer data``.

    Arguments
    ---------
    commands : argparse._SubParsersAction
        What ``add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "data",
        help="what a training would see in a folder of music, with "
        "audio_check: full",
        description=(
            "Prints songs, hours, rates, stems and what is left out and why, "
            "and draws lengths, levels and activity."
        ),
    )
    _add_music_options(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="for the report and the figures (default: results/data/FOLDER)",
    )
    parser.add_argument(
        "--headers_only",
        action="store_true",
        help="do not decode the files, as a training with audio_check: header: "
        "no levels, no activity, and damage stays unseen",
    )
    parser.set_defaults(run=_data)


def _data(args):
    """Runs ``trackformer data``."""
    from trackformer_sb.data.report import report_text

    name = os.path.basename(os.path.abspath(args.folder))
    out = args.out or os.path.join("results", "data", name)
    try:
        check = "header" if args.headers_only else "full"
        music = _music(args, audio_check=check)
        report = music.prepare(out, args.segment_seconds)
        figures = music.figures(f"{out}/figures", args.segment_seconds)
    except (OSError, ValueError) as error:
        complain(args, error)
        return 2
    print(report_text(report))
    print(*(f"figure   {path}" for path in figures), sep="\n")
    return 0


def add_shards(commands):
    """Adds ``trackformer shards make``.

    Arguments
    ---------
    commands : argparse._SubParsersAction
        What ``add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "shards", help="pack music for training at scale"
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    parser = actions.add_parser(
        "make",
        help="pack a folder of music into WebDataset shards",
        description=(
            "Packs the segments to train on into tar files, and the songs to "
            "evaluate on beside them; train with dataset: shards. Called "
            "again, it goes on."
        ),
    )
    _add_music_options(parser, "; training may use shorter ones")
    parser.add_argument("out", metavar="OUT", help="folder for the shards")
    parser.add_argument(
        "--sample_rate",
        type=int,
        default=44100,
        metavar="HZ",
        help="rate of the shards (default: %(default)s)",
    )
    parser.add_argument(
        "--audio_check",
        choices=("header", "full"),
        default="header",
        help="full: decode all files before, and leave out what is damaged",
    )
    parser.add_argument(
        "--shard_megabytes",
        type=positive,
        default=256,
        metavar="MB",
        help="size of a shard before compression (default: %(default)s)",
    )
    parser.set_defaults(run=_shards)


def _shards(args):
    """Runs ``trackformer shards make``."""
    from trackformer_sb.data.packing import pack

    try:
        music = _music(
            args, sample_rate=args.sample_rate, audio_check=args.audio_check
        )
        index = pack(
            music,
            args.out,
            args.segment_seconds,
            shard_megabytes=args.shard_megabytes,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        complain(args, error)
        return 2
    print(
        f"{index['segments']} segments of {index['songs']} songs in "
        f"{len(index['shards'])} shards in {args.out}, "
        f"{len(index['skipped'])} skipped"
    )
    return 0
