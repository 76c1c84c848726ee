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
import signal
import sys

from trackformer_sb.torch_pair import exit_unless_pair_fits
from trackformer_sb.training.grid import GROUPS, YAMLS, Grid
from trackformer_sb.training.grid_tables import LOSSES, PAPER_MODELS

RECIPES = pathlib.Path(__file__).resolve().parent


def _folder(text):
    return pathlib.Path(text).expanduser().absolute()


def _add_budget(parser, prefix, default):
    options = parser.add_mutually_exclusive_group()
    for unit, kind in (("epochs", int), ("minutes", float), ("steps", int)):
        options.add_argument(
            f"--{prefix}{unit}",
            dest=f"{prefix}budget",
            type=lambda text, unit=unit, kind=kind: (unit, kind(text)),
            metavar="N",
            help=f"budget of a run; {default}",
        )


def make_parser():
    """The options of the grid; what is left over goes to the runs."""
    parser = argparse.ArgumentParser(
        description="Runs the paper's experiment and writes its five tables.",
        epilog="--key=value goes to all cells, --performer.key=value and "
        "--convtasnet.key=value or --asteroid_convtasnet.key=value to those "
        "models, --mae.key=value to the pre-training.",
        allow_abbrev=False,
    )
    add, folder = parser.add_argument, {"type": _folder, "metavar": "FOLDER"}
    add("--dry-run", action="store_true", help="only estimate the time")
    add("--data_folder", help="music to train on", **folder)
    add("--dataset", default="demo", help="as in the yamls")
    add("--test_folder", help="music to test on", **folder)
    add("--test_dataset", help="as in the yamls")
    add("--output_folder", default=_folder("results/reproduce"), **folder)
    add("--models", nargs="+", default=PAPER_MODELS, choices=tuple(YAMLS))
    add("--lengths", nargs="+", default=(3.0, 5.0, 10.0, 30.0), type=float)
    add("--losses", nargs="+", default=LOSSES, choices=LOSSES)
    add(
        "--devices",
        nargs="+",
        help="as many cells run at once; default: all GPUs, or cpu",
    )
    _add_budget(parser, "", "default: 100 epochs, as the paper")
    _add_budget(parser, "pretrain_", "default: the budget of a cell")
    parser.set_defaults(budget=("epochs", 100))
    add(
        "--pretrain_yaml",
        default="audio_mae_blocks.yaml",
        help="of hparams/, default: %(default)s",
    )
    add("--pretrained_encoder", help="instead of pre-training", **folder)
    add(
        "--memory_gb",
        type=float,
        metavar="GB",
        help="limit of a cell on a CPU, default: its share of what is free",
    )
    add("--seed", type=int, default=1234)
    add("--retry_oom", action="store_true", help="run again what had no memory")
    return parser


def split_overrides(words):
    """Sorts ``--key=value`` and ``--group.key=value`` by whom they are for.

    Returns
    -------
    dict
        Group -> key -> value; "" for all cells.

    Raises
    ------
    ValueError
        For a word of another form or an unknown group.
    """
    overrides = {group: {} for group in ("", *GROUPS)}
    for word in words:
        found = re.fullmatch(r"--(?:(\w+)\.)?(\w+)=(.*)", word, re.DOTALL)
        group, key, value = found.groups(default="") if found else (None,) * 3
        if group not in overrides:
            raise ValueError(
                f"unknown argument {word!r}: expected an option of --help, "
                "--key=value, or --group.key=value with a group of "
                + ", ".join(GROUPS)
            )
        overrides[group][key] = value
    return overrides


def main(argv):
    """Runs the grid.

    Returns
    -------
    int
        0 if nothing failed; to be out of memory is a result.
    """
    options, words = make_parser().parse_known_args(argv)
    exit_unless_pair_fits()
    grid = Grid(RECIPES, options, split_overrides(words))
    if options.dry_run:
        failed = grid.dry_run()
    else:
        failed = grid.run()
        print(f"tables: {options.output_folder / 'tables.md'}")
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
