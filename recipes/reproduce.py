#!/usr/bin/env python3
"""Recipe for the paper's whole experiment: five tables by one command.

Trains Performers with and without Audio-MAE pre-training and a ConvTasNet, at
four segment lengths, with and without the auxiliary losses, and writes the
tables of "Music Separation Using Self-Supervised Learning" beside the paper's
values.

    python recipes/reproduce.py --dry-run
    python recipes/reproduce.py --data_folder=FOLDER --dataset=mixtures \
        --test_folder=STEMS
    python recipes/reproduce.py --minutes=10 --lengths 3 10 --losses mixit

Every cell is a run of train.py in a process of its own. The same command goes
on after an interruption. Results are in output_folder: tables.md, a CSV of each
table, cells.csv, figures/, and each run in <model>/<length>s/<loss>/.
"""

import argparse
import pathlib
import re
import sys

from trackformer_sb.torch_pair import exit_unless_pair_fits
from trackformer_sb.training import grid
from trackformer_sb.training.grid_processes import visible_devices
from trackformer_sb.training.grid_run import Runner

RECIPES = pathlib.Path(__file__).resolve().parent
DEVICES_HELP = (
    "as many cells run at once, default: all GPUs that nvidia-smi lists and "
    "CUDA_VISIBLE_DEVICES leaves, cpu where there is none"
)


def _positive(kind):
    """A number above 0 of a kind, for argparse."""

    def read(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    read.__name__ = kind.__name__
    return read


def _seed(text):
    seed = int(text)
    if seed < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return seed


def _folder(text):
    return pathlib.Path(text).expanduser().absolute()


def _add_budget(parser, prefix, default):
    options = parser.add_mutually_exclusive_group()
    for unit, kind in (("epochs", int), ("minutes", float), ("steps", int)):
        options.add_argument(
            f"--{prefix}{unit}",
            type=_positive(kind),
            metavar="N",
            help=f"budget of training; {default}",
        )


def make_parser():
    """The options of the grid; what is left over goes to the trainings."""
    parser = argparse.ArgumentParser(
        description="Runs the paper's experiment and writes its five tables.",
        epilog="--key=value goes to all cells, --performer.key=value and "
        "--convtasnet.key=value or --asteroid_convtasnet.key=value to those "
        "models, --mae.key=value to the pre-training.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dry-run", action="store_true", help="measure the cost of each cell")
    add("--no-probe", action="store_true", help="in a dry run: do not measure")
    folder = {"type": _folder, "metavar": "FOLDER"}
    add("--data_folder", help="music to train on", **folder)
    add("--dataset", choices=grid.DATASETS, default="demo")
    add("--test_folder", help="music to test on", **folder)
    add("--test_dataset", choices=grid.DATASETS[1:])
    add("--output_folder", default=_folder("results/reproduce"), **folder)
    for name, default, options in (
        ("models", grid.PAPER_MODELS, {"choices": tuple(grid.YAMLS)}),
        ("lengths", grid.LENGTHS, {"type": _positive(float)}),
        ("losses", grid.LOSSES, {"choices": grid.LOSSES}),
        ("devices", None, {"help": DEVICES_HELP}),
    ):
        add(f"--{name}", nargs="+", default=default, **options)
    _add_budget(parser, "", "default: 100 epochs, as the paper")
    _add_budget(parser, "pretrain_", "default: the budget of a cell")
    add(
        "--pretrain_yaml",
        default=grid.PRETRAIN_YAML,
        help="of hparams/, default: %(default)s",
    )
    add("--pretrained_encoder", help="instead of pre-training", **folder)
    add(
        "--memory_gb",
        type=_positive(float),
        metavar="GB",
        help="limit of a cell on a CPU, default: its share of what is free",
    )
    add("--seed", type=_seed, default=1234)
    add("--retry_oom", action="store_true", help="run again what had no memory")
    return parser


def split_overrides(words):
    """Sorts the overrides of a command line by whom they are for.

    Arguments
    ---------
    words : list of str
        ``--key=value`` for all cells, ``--group.key=value`` for some.

    Returns
    -------
    dict
        Group -> key -> value; "" for all cells.

    Raises
    ------
    ValueError
        For a word of another form or an unknown group.
    """
    overrides = {group: {} for group in grid.GROUPS}
    for word in words:
        found = re.fullmatch(r"--(?:(\w+)\.)?(\w+)=(.*)", word, re.DOTALL)
        if not found:
            raise ValueError(
                f"unknown argument {word!r}: expected an option of --help, "
                "--key=value, or --group.key=value with a group of "
                + ", ".join(grid.GROUPS[1:])
            )
        group, key, value = found.groups(default="")
        if group not in overrides:
            raise ValueError(
                f"unknown group {group!r} in {word!r}: expected one of "
                + ", ".join(grid.GROUPS[1:])
            )
        overrides[group][key] = value
    return overrides


def _budget(args, prefix, default):
    for unit in ("epochs", "minutes", "steps"):
        number = getattr(args, f"{prefix}{unit}")
        if number is not None:
            return unit, number
    return default


def main(argv):
    """Runs the grid.

    Returns
    -------
    int
        0 if nothing failed; to be out of memory is a result.
    """
    args, words = make_parser().parse_known_args(argv)
    exit_unless_pair_fits()
    if args.no_probe and not args.dry_run:
        raise ValueError("--no-probe: expected --dry-run with it, got none")
    names = ("dataset", "data_folder", "test_folder", "test_dataset")
    budget = _budget(args, "", ("epochs", 100))
    whole = grid.Grid(
        args.output_folder,
        RECIPES,
        {name: getattr(args, name) for name in names},
        # a name given twice is one
        *(
            tuple(dict.fromkeys(values))
            for values in (args.models, args.lengths, args.losses)
        ),
        budget,
        _budget(args, "pretrain_", budget),
        args.seed,
        split_overrides(words),
        args.pretrained_encoder,
        args.memory_gb,
        args.pretrain_yaml,
    )
    devices = args.devices or visible_devices()
    runner = Runner(whole, devices, args.retry_oom)
    if args.dry_run:
        failed = runner.dry_run(not args.no_probe)
    else:
        failed = runner.run()
        print(f"tables: {args.output_folder / 'tables.md'}")
    for job in failed:
        where = f", see {job.log}" if job.log.is_file() else ""
        print(f"failed: {job.name}{where}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
