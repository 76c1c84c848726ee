"""The ``trackformer`` commands that look at music and pack it."""

import argparse
import os
import sys

DATA_OPTIONS = (
    "segment_seconds",
    "split",
    "split_file",
    "split_ratio",
    "seed",
    "max_stems",
    "min_active_share",
    "min_level_db",
    "stem_groups",
    "test_folder",
    "test_dataset",
    "cache_folder",
    "strict",
)


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
    """A message on stderr, with the command it is from."""
    print(f"trackformer {args.command}: {message}", file=sys.stderr)


def _add_data_options(parser, hint):
    """What ``trackformer data`` and ``trackformer shards make`` share."""
    parser.add_argument("folder", metavar="FOLDER", help="folder with music")
    parser.add_argument(
        "--dataset",
        default="mixtures",
        help="mixtures (any music files), stems, moisesdb, musdb18hq or "
        "slakh2100 (default: %(default)s)",
    )
    parser.add_argument(
        "--segment_seconds",
        type=positive,
        default=3.0,
        metavar="SECONDS",
        help=f"length of a segment (default: %(default)s){hint}",
    )
    parser.add_argument(
        "--split",
        choices=("auto", "by_song", "from_file"),
        default="auto",
        help="auto: the dataset's own split where it has one",
    )
    parser.add_argument("--split_file", metavar="YAML", help="for from_file")
    parser.add_argument(
        "--split_ratio",
        type=float,
        nargs=3,
        default=(80, 10, 10),
        metavar="SHARE",
        help="of train, valid and test (default: 80 10 10)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the split")
    parser.add_argument(
        "--max_stems",
        type=int,
        metavar="N",
        help="leave out songs with more stems",
    )
    parser.add_argument(
        "--min_active_share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave out segments of which less sounds",
    )
    parser.add_argument(
        "--min_level_db",
        type=float,
        metavar="DB",
        help="leave out segments below this level in dBFS",
    )
    parser.add_argument(
        "--stem_groups",
        type=_mapping,
        metavar="YAML",
        help="stems that are one, as in '{band: [bass, guitar*]}'",
    )
    parser.add_argument(
        "--test_folder",
        metavar="DIR",
        help="music of another folder to test on",
    )
    parser.add_argument(
        "--test_dataset", default="stems", help="what it holds (%(default)s)"
    )
    parser.add_argument(
        "--cache_folder", metavar="DIR", help="where headers are kept"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first file that would be left out",
    )


def _data_options(args):
    return {name: getattr(args, name) for name in DATA_OPTIONS}


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
    _add_data_options(parser, "")
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
    from trackformer_sb.data.report import describe, report_text

    name = os.path.basename(os.path.abspath(args.folder))
    out = args.out or os.path.join("results", "data", name)
    try:
        report, figures = describe(
            args.folder,
            args.dataset,
            out,
            decode=not args.headers_only,
            **_data_options(args),
        )
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
    _add_data_options(parser, "; training may use shorter ones")
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
        help="full: decode all files before, and leave out what is damaged, "
        "clipped, off centre or there twice in two formats",
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
        index = pack(
            args.folder,
            args.dataset,
            args.out,
            sample_rate=args.sample_rate,
            shard_megabytes=args.shard_megabytes,
            audio_check=args.audio_check,
            **_data_options(args),
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
