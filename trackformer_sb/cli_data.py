"""The ``trackformer`` commands that look at music, pack it and make it."""

import argparse
import os
import sys


def positive(text):
    """A finite number above 0, for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def complain(args, message):
    """A message on stderr in one line, with the command it is from."""
    # torch's and the hub's have several
    lines = [line.strip() for line in str(message).splitlines()]
    print(f"trackformer {args.command}:", *lines, file=sys.stderr)


def _add_music(parser):
    """What ``trackformer data`` and ``trackformer shards make`` share."""
    parser.add_argument("folder", metavar="FOLDER", help="folder with music")
    parser.add_argument(
        "--dataset",
        default="mixtures",
        help="mixtures (any music files), stems, midi, moisesdb, musdb18hq or "
        "slakh2100 (default: %(default)s)",
    )
    parser.add_argument(
        "--segment_seconds",
        type=positive,
        default=3.0,
        metavar="SECONDS",
        help="length of a segment; training on shards may use shorter ones "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--music",
        default="{}",
        metavar="YAML",
        help="arguments of trackformer_sb.data.music.Music, as in a training: "
        "'{max_stems: 4, audio_check: header}'",
    )


def _music(args, **more):
    """The music that the options describe."""
    import yaml

    from trackformer_sb.data.music import Music

    # the seed is that of the yamls
    options = {"dataset": args.dataset, "seed": 1234, **more}
    try:
        return Music(args.folder, **{**options, **yaml.safe_load(args.music)})
    except (TypeError, yaml.YAMLError) as error:
        raise ValueError(f"--music: {error}") from error


def add_data(parser):
    """Show what a training would see in a folder of music.

    Prints songs, hours, rates, stems, medians of lengths, levels and activity,
    and what is left out and why, with audio_check: full.
    """
    _add_music(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="for the report (default: results/data/FOLDER)",
    )
    parser.set_defaults(run=_data)


def _data(args):
    name = os.path.basename(os.path.abspath(args.folder))
    out = args.out or os.path.join("results", "data", name)
    music = _music(args, audio_check="full")
    report = music.prepare(out, args.segment_seconds)
    print(_report_text(report))


def _report_text(report):
    """The tables of what ``Music.prepare`` returned."""
    from trackformer_sb.data.songs import skipped_table

    lines = ["split    songs     hours  segments"]
    for name, part in report["splits"].items():
        lines.append(
            f"{name:5s} {part['songs']:8d} {part['hours']:9.2f} "
            f"{part['segments']:9d}"
        )
    rates = ", ".join(
        f"{n} of {r} Hz" for r, n in report["sample_rates"].items()
    )
    kinds = ", ".join(f"{n} of {c}" for c, n in report["channels"].items())
    lines.append(f"files    {rates}; {kinds} channel(s)")
    if report["stems"]:
        stems = ", ".join(f"{name} {n}" for name, n in report["stems"].items())
        lines.append(f"stems    {stems}")
    medians = [f"{x:.1f} {what}" for what, x in report["medians"].items()]
    lines.append(f"median   {', '.join(medians)}")
    table = skipped_table(report["skipped"])
    left_out = report["segments_left_out"]
    lines.append(f"segments left out {left_out}; files and songs: {table}")
    return "\n".join(lines)


def add_shards(parser):
    """Pack music for training at scale.

    `make` packs the segments to train on into tar files of WebDataset, and the
    songs to evaluate on beside them; train with dataset: shards. Called again,
    it goes on.
    """
    actions = parser.add_subparsers(metavar="make", required=True)
    parser = actions.add_parser("make", description=parser.description)
    _add_music(parser)
    parser.add_argument("out", metavar="OUT", help="folder for the shards")
    parser.add_argument(
        "--sample_rate",
        type=int,
        default=44100,
        metavar="HZ",
        help="rate of the shards (default: %(default)s)",
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
    from trackformer_sb.data.shards import pack

    report = pack(
        _music(args, sample_rate=args.sample_rate),
        args.out,
        args.segment_seconds,
        shard_megabytes=args.shard_megabytes,
    )
    segments = sum(shard["segments"] for shard in report["shards"])
    print(
        f"{segments} segments of {report['splits']['train']['songs']} songs in "
        f"{len(report['shards'])} shards in {args.out}, "
        f"{len(report['skipped'])} files skipped"
    )


def add_make_music(parser):
    """Make music with stems from MIDI, soundfonts, drum kits, speech.

    Plays General MIDI files with soundfonts, drum patterns with Hydrogen kits,
    and lets a speech synthesiser sing. Train on the result with dataset: stems.
    Called again, it goes on.
    """
    parser.add_argument("out", metavar="OUT", help="folder for the music")
    for option, name, what in (
        ("midi", "midi", "folders with General MIDI files"),
        ("soundfont", "soundfonts", "sf2 or sf3 files that play them"),
        ("drum_soundfont", "drum_soundfonts", "others for drums, now and then"),
        ("drumkits", "drumkits", "folders with Hydrogen drum kits"),
    ):
        parser.add_argument(
            f"--{option}",
            dest=name,
            nargs="+",
            default=(),
            metavar="PATH",
            help=what,
        )
    for name, default, what in (
        ("drums", 50, "clips of these kits"),
        ("voices", 0, "clips of singing"),
        ("electronic", 0, "pieces played by synthesisers"),
        ("renders", 1, "times a MIDI file is played, by other soundfonts"),
        ("seed", 0, "of all draws"),
        ("jobs", os.cpu_count(), "processes"),
    ):
        parser.add_argument(
            f"--{name}",
            type=int,
            default=default,
            metavar="N",
            help=f"{what} (default: %(default)s)",
        )
    parser.add_argument(
        "--classes",
        nargs="+",
        choices=("piano", "guitar", "bass"),
        default=("bass",),
        help="instruments with stems of their own beside drums, choirs (as "
        "vocals) and other (default: bass)",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=75.0,
        help="length of a piece at most (default: %(default)s)",
    )
    parser.set_defaults(run=_make_music)


def _make_music(args):
    from trackformer_sb.data.make_music import make_music

    options = vars(args).copy()
    del options["command"], options["run"]
    result = make_music(**options)
    print(
        f"{len(result['made'])} made, {len(result['kept'])} there before, "
        f"{len(result['left_out'])} left out in {args.out}"
    )
    return 0 if result["made"] or result["kept"] else 1
