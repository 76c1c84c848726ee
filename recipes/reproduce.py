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

Every cell is a run of train.py in a process of its own, done where there is a
metrics.json, or an oom.txt where memory was not enough. The same command goes
on after an interruption. Results are in output_folder: tables.md, cells.csv,
and each run in <model>/<length>s/<loss>/.
"""

import argparse
import functools
import json
import math
import pathlib
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple

from trackformer_sb.cli import exit_unless_pair_fits, steady_console

steady_console()
exit_unless_pair_fits()

import torch

from trackformer_sb.paths import expanded
from trackformer_sb.training.experiment import (
    OUT_OF_MEMORY,
    check_keys,
    keys_of,
    parse_arguments,
)
from trackformer_sb.training.grid_tables import (
    LOSSES,
    MODELS,
    markdown,
    write_tables,
)
from trackformer_sb.training.lock import locked

RECIPES = pathlib.Path(__file__).resolve().parent
HPARAMS = RECIPES.parent / "hparams"
# of each model its yaml, and the group whose overrides it takes
YAMLS = {
    "performer_mae": ("performer_mixit_mae.yaml", "performer"),
    "performer": ("performer_mixit.yaml", "performer"),
    "convtasnet": ("convtasnet_mixit.yaml", "convtasnet"),
    "asteroid_convtasnet": (
        "asteroid_convtasnet_mixit.yaml",
        "asteroid_convtasnet",
    ),
}
PRETRAINING = "audio_mae_blocks.yaml"
GROUPS = ("performer", "convtasnet", "asteroid_convtasnet", "mae")
# with the auxiliary losses the weights are those of the yaml
AUXILIARY = ("lambda_diversity", "lambda_sparsity", "lambda_mask_count")
# songs of the demo band, which hold the paper's longest segment, and how long
# they are; for a dry run fewer and shorter ones
DEMO, PROBED_DEMO = (60, 30.0), (12, 3.0)
PROBED_SECONDS = 0.5  # segments of a dry run on a CPU
PROBE_BATCHES = 8
ENDLESS = 1_000_000  # epochs, where steps are the budget


def demo_keys(folder, songs, seconds):
    """Keys of a run that makes the demo band, or finds it there."""
    music = f"{{demo_songs: {songs}, demo_seconds: {seconds}}}"
    return {"data_folder": folder / "demo_band", "music": music}


class Job(NamedTuple):
    """One run: a cell, or the pre-training before them."""

    name: str  # its folder in the grid's
    group: str  # of GROUPS
    yaml: pathlib.Path
    keys: dict  # of its command line
    budget: tuple  # epochs, steps or minutes, and how many

    @property
    def seconds(self):
        """Length of a segment."""
        return float(self.keys.get("segment_seconds", 3))

    @property
    def factor(self):
        """Batches of an optimizer step."""
        return int(self.keys.get("grad_accumulation_factor", 1))

    @property
    def settings(self):
        """What makes it another run, a line a word."""
        words = [f"--{k}={v}" for k, v in self.keys.items() if k != "device"]
        return "\n".join([*sorted(words), "--{}={:g}".format(*self.budget)])

    def command(self, folder, **more):
        """Its command line, with more keys in place of its own."""
        script = "pretrain.py" if self.group == "mae" else "train.py"
        keys = {**self.keys, "output_folder": folder, **more}
        words = [f"--{key}={value}" for key, value in keys.items()]
        words = [RECIPES / script, self.yaml, *words, "--noprogressbar"]
        return [sys.executable, *map(str, words)]

    def batches(self, batch_seconds, epoch_batches):
        """Batches of its budget."""
        unit, number = self.budget
        if unit == "minutes":
            return number * 60 / batch_seconds
        return number * (epoch_batches if unit == "epochs" else self.factor)


def _add_budget(parser, prefix, default):
    options = parser.add_mutually_exclusive_group()
    for unit in ("epochs", "minutes", "steps"):
        kind = float if unit == "minutes" else int
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
        epilog="--key=value goes to all runs, --performer.key=value and "
        "--convtasnet.key=value or --asteroid_convtasnet.key=value to those "
        "models, --mae.key=value to the pre-training, which also takes what "
        "its yaml has of all runs and of the Performer.",
        allow_abbrev=False,
    )
    add, folder = parser.add_argument, {"metavar": "FOLDER"}
    add("--dry-run", action="store_true", help="only estimate the time")
    add("--output_folder", default="results/reproduce", type=expanded, **folder)
    add("--models", nargs="+", default=MODELS[:3], choices=MODELS)
    add("--lengths", nargs="+", default=(3.0, 5.0, 10.0, 30.0), type=float)
    add("--losses", nargs="+", default=LOSSES, choices=LOSSES)
    _add_budget(parser, "", "default: 100 epochs, as the paper")
    _add_budget(parser, "pretrain_", "default: the budget of a cell")
    parser.set_defaults(budget=("epochs", 100))
    add("--pretrained_encoder", help="instead of pre-training", **folder)
    words = "limit of a run on a CPU; a GPU has its own"
    add("--memory_gb", type=float, metavar="GB", help=words)
    return parser


def split_overrides(words):
    """``--key=value`` and ``--group.key=value`` as group or "" -> keys."""
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


def make_jobs(options, overrides):
    """The pre-training, if there is one, and the cells; checks their keys."""
    folder, everywhere = pathlib.Path(options.output_folder), overrides[""]
    if everywhere.get("dataset", "demo") == "demo":
        # one band for all, of longer songs than the recipes make
        overrides[""] = everywhere = demo_keys(folder, *DEMO) | everywhere
    jobs, encoder = [], options.pretrained_encoder
    if "performer_mae" in options.models and not encoder:
        encoder = folder / "pretrain" / "encoder"
        yaml = HPARAMS / PRETRAINING
        # the encoder must fit the separators
        both = {**everywhere, **overrides["performer"]}
        apart = keys_of(HPARAMS / YAMLS["performer"][0]) - keys_of(yaml)
        keys = {key: both[key] for key in both if key not in apart}
        budget = options.pretrain_budget or options.budget
        keys |= overrides["mae"]
        jobs.append(Job("pretrain", "mae", yaml, keys, budget))
    for length in dict.fromkeys(options.lengths):
        for loss in dict.fromkeys(options.losses):
            for model in dict.fromkeys(options.models):
                yaml, group = YAMLS[model]
                keys = {**everywhere, **overrides[group]}
                if "segment_seconds" in keys:
                    raise ValueError("--segment_seconds: expected --lengths")
                keys["segment_seconds"] = f"{length:g}"
                if loss == "mixit":
                    keys |= dict.fromkeys(AUXILIARY, 0)
                if model == "performer_mae":
                    keys["pretrained_encoder"] = encoder
                name, yaml = f"{model}/{length:g}s/{loss}", HPARAMS / yaml
                jobs.append(Job(name, group, yaml, keys, options.budget))
    for job in jobs:
        _, _, keys = parse_arguments(job.command("")[2:])
        check_keys(job.yaml, keys.keys())
    return jobs


def execute(command, results, memory_gb):
    """Runs a command that leaves results, unless they are there.

    Returns "done", "OOM" or "failed", and what went wrong.
    """
    if results.is_file():
        return "done", ""
    limit = int((memory_gb or 0) * 2**30)
    set_limit = functools.partial(
        resource.setrlimit, resource.RLIMIT_DATA, (limit, limit)
    )
    results.parent.mkdir(parents=True, exist_ok=True)
    path = results.with_name("console.txt")
    with open(path, "w", encoding="utf-8") as log:
        code = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=set_limit if limit else None,
        ).returncode
    if code == 0:
        return "done", ""
    said = path.read_text("utf-8", errors="replace").strip().splitlines()
    for line in reversed(said[-50:]):
        if OUT_OF_MEMORY.search(line):
            return "OOM", line
    if code == -signal.SIGKILL:
        return "OOM", "killed, as a system short of memory does it"
    return "failed", said[-1] if said else f"exit status {code}"


def probe(job, folder, batches, memory_gb, **more):
    """Runs a few batches, of several the first warms up.

    Returns their metrics.json, None if they failed, and as ``execute``.
    """
    results = folder / "debug" / "metrics.json"
    more |= {"debug": True, "debug_batches": batches, "debug_epochs": 1}
    status, reason = execute(job.command(folder, **more), results, memory_gb)
    done = status == "done"
    found = json.loads(results.read_text("utf-8")) if done else None
    return found, status, reason


def train(job, grid, memory_gb):
    """Runs a job; returns as ``execute``."""
    keys = {"number_of_epochs": job.budget[1]}
    if job.budget[0] != "epochs":
        seconds = None
        if job.budget[0] == "minutes":
            # measured once for all cells of one network
            place = grid / "probes" / f"{job.group}-{job.seconds:g}s"
            found, *ended = probe(job, place, PROBE_BATCHES, memory_gb)
            if not found:
                return ended
            seconds = found["step_seconds"]
        steps = max(1, int(job.batches(seconds, None) / job.factor))
        keys = {"number_of_epochs": ENDLESS, "early_stop_epochs": ENDLESS}
        keys["optimizer_step_limit"] = steps
    command = job.command(grid / job.name, **keys)
    return execute(command, grid / job.name / "metrics.json", memory_gb)


def run(jobs, grid, memory_gb):
    """Runs all that is not over, writes the tables; names of what failed."""
    left, failed = [], []
    for job in jobs:
        folder = grid / job.name
        ends = [folder / name for name in ("metrics.json", "oom.txt")]
        if not any(path.is_file() for path in ends):
            left.append(job)
            continue
        before = (folder / "settings.txt").read_text("utf-8")
        if before != job.settings:
            words = {*before.split("\n")} ^ {*job.settings.split("\n")}
            raise ValueError(
                f"{folder} was run with other settings, which differ in "
                f"{' '.join(sorted(words))}: choose another --output_folder"
            )
    for job in left:
        folder = grid / job.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.txt").write_text(job.settings, "utf-8")
        print(f"{job.name}: started", flush=True)
        status, reason = train(job, grid, memory_gb)
        if status == "OOM":
            (folder / "oom.txt").write_text(reason, "utf-8")
        failed += [job.name] if status == "failed" else []
        reason = f" ({reason}), see {folder}" if reason else ""
        print(f"{job.name}: {status}{reason}", flush=True)
        write_tables(grid, shlex.join(sys.argv[1:]))
    return failed


def dry_run(jobs, demo, memory_gb):
    """Prints the cells, and about what they would take; names of what failed.

    One step of each network is measured, at its shortest segments or, on a
    CPU, at shorter ones. A step is taken to grow with the length, an epoch to
    take as long.
    """
    probes, rows, failed, total, more = {}, [], [], 0.0, {}
    # a GPU warms up, and is not to have too little to do
    gpu = torch.cuda.is_available()
    batches, longest = (2, math.inf) if gpu else (1, PROBED_SECONDS)
    with tempfile.TemporaryDirectory(prefix="reproduce_") as temporary:
        folder = pathlib.Path(temporary)
        if demo:
            more = demo_keys(folder, *PROBED_DEMO)
        for job in sorted(jobs, key=lambda job: job.seconds):
            if job.group not in probes:
                seconds = min(job.seconds, longest)
                keys = more | {"segment_seconds": seconds, "num_workers": 0}
                if "pretrained_encoder" in job.keys:  # still to be made
                    keys["pretrained_encoder"] = "null"
                found = probe(
                    job, folder / job.group, batches, memory_gb, **keys
                )
                probes[job.group] = (seconds, *found)
    for job in jobs:
        probed_seconds, found, status, reason = probes[job.group]
        budget = "{1:g} {0}".format(*job.budget)
        if not found:
            print(f"{job.name}: {reason}")
            failed += [job.name] if status == "failed" else []
            rows.append((job.name, budget, status, None))
            continue
        longer = job.seconds / probed_seconds
        seconds = found["step_seconds"] * longer
        epoch = found["batches"] / longer
        if demo:
            epoch *= math.prod(DEMO) / math.prod(PROBED_DEMO)
        minutes = job.batches(seconds, epoch) * seconds / 60
        rows.append((job.name, budget, seconds, minutes))
        total += minutes
    rows.append((f"{len(jobs)} runs", "", None, total))
    print(markdown(("run", "budget", "batch (s)", "minutes"), rows))
    return failed


def main(argv):
    """Runs the grid; 0 if nothing failed: to be out of memory is a result."""
    options, words = make_parser().parse_known_args(argv)
    overrides = split_overrides(words)
    demo = overrides[""].get("dataset", "demo") == "demo"
    jobs = make_jobs(options, overrides)
    if options.dry_run:
        failed = dry_run(jobs, demo, options.memory_gb)
    else:
        grid = pathlib.Path(options.output_folder)
        with locked(grid):
            failed = run(jobs, grid, options.memory_gb)
        print(f"tables: {grid / 'tables.md'}")
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
