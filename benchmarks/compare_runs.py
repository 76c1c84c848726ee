"""Trainings side by side: what they reach, and how soon.

    python benchmarks/compare_runs.py RUN_FOLDER [RUN_FOLDER ...] --title TEXT
    python benchmarks/compare_runs.py --pairs REFERENCE RUN [REFERENCE RUN ...]

The folders are output folders of recipes/train.py; the first is the reference,
with --pairs every other one is that of the next, for several seeds and
settings: means are over runs whose names differ in the seed at their end.
"Reached after" is the share of the reference's optimizer steps after which a
run's validation loss is for the first time at or below the reference's last
one, read off the validations, between which nothing is assumed: train with
--epoch_segments for more of them. The reference itself may be there before its
end; of pairs both shares are shown, and means over those that got there. Single
trainings jump up and down from one validation to the next, so means over seeds
are compared as well: "means reached after" goes by the mean loss of all
references and of all runs at each validation. Differences of losses come with
their standard error. A run may have fewer epochs, and with them a schedule of
its own. Losses of other data, seeds, splits or segment lengths cannot be
compared and are refused.
"""

import json
import pathlib
import sys
from statistics import mean, stdev

from common import Record, new_parser, parse_args, say, table
from real_music import plain_values, shown, training_command

MEASURES = (
    "mixture_si_snr",
    "si_snri",
    "si_snri_grouped",
    "mask_overlap",
    "effective_mask_count",
)
SAME = (
    "music",
    "seed",
    "sample_rate",
    "segment_seconds",
    "loss",
    "epoch_segments",
)


def load(folder):
    """metrics.json and the yaml's values of a run."""
    text = (folder / "metrics.json").read_text(encoding="utf-8")
    yaml = (folder / "hyperparams.yaml").read_text(encoding="utf-8")
    return json.loads(text), plain_values(yaml)


def loss_of(row):
    """The MixIT part of the validation loss where it is known."""
    return row.get("valid_mixit_loss", row["valid_loss"])


def reached_after(history, reference):
    """Share of the reference's steps until its last loss; None if never."""
    goal = loss_of(reference[-1])
    steps = [row["step"] for row in history if loss_of(row) <= goal]
    return steps[0] / reference[-1]["step"] if steps else None


def mean_history(histories):
    """The mean loss of several trainings at each validation."""
    lengths = {tuple(row["step"] for row in rows) for rows in histories}
    if len(lengths) > 1:
        return None  # of other numbers of steps
    return [
        {"step": rows[0]["step"], "valid_loss": mean(map(loss_of, rows))}
        for rows in zip(*histories)
    ]


def spread(values):
    """A mean of differences and its standard error, as text."""
    text = f"{mean(values):+.3f}"
    if len(values) > 1:
        text += f" ± {stdev(values) / len(values) ** 0.5:.3f}"
    return text


def check_same(first, values, name, other):
    """Exits where two runs cannot be compared."""
    for key in SAME:
        if other.get(key) != values.get(key):
            sys.exit(
                f"{key}: expected {values.get(key)} as in {first}, got "
                f"{other.get(key)} in {name}"
            )


def percent(share):
    """A share of steps, or that there is none."""
    return "never" if share is None else f"{100 * share:.0f} %"


def difference(value, reference):
    """Of two measures; None where there are no stems to measure on."""
    return None if None in (value, reference) else value - reference


def side_by_side(runs):
    """Blocks of markdown: runs against the first of them."""
    (first, (reference, values)), *_ = runs.items()
    rows, curves = [], {}
    for name, (metrics, other) in runs.items():
        check_same(first, values, name, other)
        history = metrics["history"]
        share = reached_after(history, reference["history"])
        rows.append(
            [
                name,
                int(history[-1]["step"]),
                f"{metrics['total_seconds'] / 60:.1f}",
                f"{loss_of(history[-1]):.3f}",
                percent(share),
                *(shown(metrics[key]) for key in MEASURES),
            ]
        )
        for row in history:
            curves.setdefault(int(row["step"]), {})[name] = loss_of(row)
    header = ["run", "steps", "minutes", "last validation loss"]
    header += ["reached after", *MEASURES]
    points = [
        [step, *(f"{found[n]:.3f}" if n in found else "-" for n in runs)]
        for step, found in sorted(curves.items())
    ]
    return [
        table(header, rows),
        "## Validation loss (MixIT) by step",
        table(["step", *runs], points),
    ]


def pair_by_pair(runs):
    """Blocks of markdown: every other run against the one before, and means.

    Takes name and results of each run, in pairs.
    """
    rows, groups, curves = [], {}, {}
    names, runs = [name for name, _ in runs], dict(runs)
    for first, name in zip(names[::2], names[1::2], strict=True):
        (reference, values), (metrics, other) = runs[first], runs[name]
        check_same(first, values, name, other)
        history, before = metrics["history"], reference["history"]
        share = reached_after(history, before)
        own = reached_after(before, before)
        found = [loss_of(history[-1]) - loss_of(before[-1])]
        found += [difference(metrics[x], reference[x]) for x in MEASURES]
        group = name.removesuffix(f"_{values['seed']}")
        pair = own, share, found, before, history
        groups.setdefault(group, []).append(pair)
        rows.append(
            [
                f"{first}, {name}",
                int(before[-1]["step"]),
                f"{loss_of(before[-1]):.3f} {loss_of(history[-1]):.3f}",
                f"{percent(own)} {percent(share)}",
                *(
                    f"{shown(reference[key])} {shown(metrics[key])}"
                    for key in MEASURES
                ),
            ]
        )
        curves |= {first: before, name: history}
    means = []
    for group, pairs in groups.items():
        owns, shares, founds, firsts, histories = zip(*pairs, strict=True)
        reached = [share for share in shares if share is not None]
        text = percent(mean(owns))
        text += f", {percent(mean(reached) if reached else None)}"
        if reached and len(reached) < len(pairs):
            text += f" ({len(pairs) - len(reached)} of {len(pairs)} never)"
        losses, *columns = zip(*founds, strict=True)
        measures = (None if None in x else mean(x) for x in columns)
        before, history = mean_history(firsts), mean_history(histories)
        both = "-"
        if before and history:
            both = percent(reached_after(before, before))
            both += f", {percent(reached_after(history, before))}"
        means.append(
            [
                group,
                len(pairs),
                spread(losses),
                text,
                both,
                *("-" if x is None else f"{x:+.2f}" for x in measures),
            ]
        )
    header = ["pair", "steps", "last validation losses", "reached after"]
    mean_header = ["runs", "pairs", "validation loss", "reached after"]
    mean_header.append("means reached after")
    return [
        table([*header, *MEASURES], rows),
        "## Mean differences to the references",
        table([*mean_header, *MEASURES], means),
        "## Validation losses (MixIT), epoch by epoch",
        "\n".join(
            f"- {name}: " + " ".join(f"{loss_of(row):.3f}" for row in rows)
            for name, rows in curves.items()
        ),
    ]


def main():
    """Compares runs and writes the record."""
    parser = new_parser(__doc__, "compare_runs")
    parser.add_argument("run_folders", type=pathlib.Path, nargs="+")
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--title", default="Trainings side by side")
    parser.add_argument("--note", default="", help="a paragraph of its own")
    args = parse_args(parser)
    if args.pairs and len(args.run_folders) % 2:
        parser.error("expected an even number of run folders with --pairs")
    record = Record(args.title, __doc__, args.output, args.device)
    folders = [folder.resolve() for folder in args.run_folders]
    if args.pairs:
        # a reference may be that of several runs
        folders = list(dict.fromkeys(folders))
    # as short as they can be told apart
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
        if depth > max(len(folder.parts) for folder in folders):
            parser.error("a run folder is given twice")
    runs = {f: ("/".join(f.parts[-depth:]), load(f)) for f in folders}
    if args.pairs:
        pairs = [runs[folder.resolve()] for folder in args.run_folders]
        compared = pair_by_pair(pairs)
    else:
        compared = side_by_side(dict(runs.values()))
    blocks = [
        *([args.note] if args.note else []),
        *compared,
        "## Commands, rebuilt from what the runs left behind",
        "\n".join(
            f"    {training_command(folder)}"
            for folder in dict.fromkeys(args.run_folders)
        ),
    ]
    record.write(*blocks)
    say(*blocks, sep="\n\n")


if __name__ == "__main__":
    main()
