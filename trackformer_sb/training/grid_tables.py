"""The tables of a grid of runs: the paper's five, and what it has no table of.

"Music Separation Using Self-Supervised Learning" (Trackformer), section 5.
Everything is read from the grid's folder, what was not run says so.
"""

import csv
import datetime
import json
from typing import NamedTuple

# in the order of the tables
PAPER_MODELS = ("performer_mae", "performer", "convtasnet")
MODELS = (*PAPER_MODELS, "asteroid_convtasnet")
LOSSES = ("mixit", "mixit_div_sp")
OOM = "OOM"

# Of each of the paper's tables: title, columns as (loss, model, measure), the
# paper's values by length in seconds, and what is to be said of it.
PAPER_TABLES = (
    (
        "SI-SNR by segment length",
        {
            "ConvTasNet (dB)": ("mixit", "convtasnet", "mixture_si_snr"),
            "Performer (dB)": ("mixit", "performer_mae", "mixture_si_snr"),
        },
        {3: (-9.11, 1.66), 5: (-8.52, 2.0), 10: (-9.73, 2.33), 30: (OOM, 3.52)},
        "SI-SNR of the best remix of the outputs against the two mixtures; "
        "OOM: out of memory. The Performer is the one with Audio-MAE. Tables 1 "
        "to 3 are of MixIT alone, here and presumably in the paper, which "
        "fine-tunes with the MixIT loss (section 4.2.4) and has the same "
        "values without Audio-MAE in Table 4 at 3 and 5 s. ConvTasNet is "
        "SpeechBrain's; Asteroid's is among what stands beside the paper.",
    ),
    (
        "Time of an epoch",
        {
            "ConvTasNet (min/epoch)": ("mixit", "convtasnet", "epoch_minutes"),
            "Performer (min/epoch)": (
                "mixit",
                "performer_mae",
                "epoch_minutes",
            ),
        },
        {
            3: (17.05, 12.57),
            5: (20.33, 16.04),
            10: (43.25, 35.42),
            30: (OOM, 46.33),
        },
        "Ours without validation. With a budget of steps or minutes an epoch "
        "is the median time of a batch, times the batches of an epoch. The "
        "paper's text has 20 to 30 % less time (section 7), its table 18 to "
        "26.",
    ),
    (
        "Audio-MAE",
        {
            "with Audio-MAE (dB)": ("mixit", "performer_mae", "mixture_si_snr"),
            "without (dB)": ("mixit", "performer", "mixture_si_snr"),
        },
        {3: (1.66, 2.6), 5: (2.0, 3.16), 10: (2.33, 3.52), 30: (3.52, OOM)},
        "SI-SNR as in Table 1. At 10 s without Audio-MAE the paper has 3.52 "
        "here and 3.87 in Table 4, for what seems the same run.",
    ),
    (
        "MixIT loss alone",
        {
            "SI-SNR (dB)": ("mixit", "performer", "mixture_si_snr"),
            "overlap": ("mixit", "performer", "mask_overlap"),
            "N_E": ("mixit", "performer", "effective_mask_count"),
        },
        {3: (2.6, 0.59, 6.36), 5: (3.16, 0.61, 5.93), 10: (3.87, 0.52, 6.29)},
        "The Performer without Audio-MAE. Overlap: mean cosine similarity of "
        "two masks; N_E: effective mask count, the number of masks in use. At "
        "10 s the paper has an SI-SNR of 3.52 in Table 3; it has no 30 s here.",
    ),
    (
        "MixIT, diversity and sparsity loss",
        {
            "SI-SNR (dB)": ("mixit_div_sp", "performer", "mixture_si_snr"),
            "overlap": ("mixit_div_sp", "performer", "mask_overlap"),
            "N_E": ("mixit_div_sp", "performer", "effective_mask_count"),
        },
        {3: (2.56, 0.49, 5.6), 5: (3.32, 0.35, 4.48), 10: (2.26, 0.44, 5.45)},
        "The Performer without Audio-MAE, as in Table 4.",
    ),
)

# Tables of all cells: file, title, measures with their heads, and notes.
OUR_TABLES = (
    (
        "measures",
        "Separation",
        {
            "mixture_si_snr": "SI-SNR (dB)",
            "si_snri": "SI-SNRi (dB)",
            "si_snri_grouped": "SI-SNRi grouped (dB)",
            "sdr": "SDR (dB)",
            "mask_overlap": "overlap",
            "effective_mask_count": "N_E",
            "test_items": "test items",
        },
        "SI-SNR, overlap and N_E as above. The others are against real stems: "
        "the improvement with one output per stem, with outputs added up, and "
        "SDR.",
    ),
    (
        "costs",
        "Time and memory",
        {
            "step_seconds": "batch (s)",
            "epoch_seconds": "epoch (s)",
            "total_seconds": "training and validation (s)",
            "peak_memory_mb": "peak memory (MB)",
            "memory_gb": "limit (GB)",
        },
        "Peak memory: on a GPU what is allocated there, on a CPU the whole "
        "process, for which there is a limit. The paper: up to 4 GB less than "
        "ConvTasNet (section 7).",
    ),
    (
        "over_fitting",
        "Over-fitting (section 5.5)",
        {
            "train_mixture_si_snr": "training SI-SNR (dB)",
            "valid_mixture_si_snr": "validation SI-SNR (dB)",
            "mixture_si_snr": "test SI-SNR (dB)",
        },
        "SI-SNR as in Table 1, of the epoch that is tested. In training it is "
        "of every tenth batch, over the epoch and with dropout. The gap is "
        "training less validation. The paper: training +3 to +4 dB, "
        "validation and test << 0 dB, for which model and length is not said.",
    ),
)

CELL_COLUMNS = (
    *("length", "loss", "model", "status"),
    *("mixture_si_snr", "train_mixture_si_snr", "valid_mixture_si_snr"),
    *("si_snr", "si_snri", "si_snri_grouped", "sdr"),
    *("mask_overlap", "effective_mask_count", "test_items"),
    *("epochs", "steps", "batches"),
    *("step_seconds", "epoch_seconds", "total_seconds", "peak_memory_mb"),
    *("num_parameters", "device", "memory_gb", "test_songs_pretrained_on"),
)
SHOWN = {"oom": OOM, None: "not run"}  # other statuses show as they are

# File of a figure, and the measures of its panels with their axes.
FIGURES = {
    "si_snr": {
        "mixture_si_snr": "SI-SNR of the remix against the mixtures (dB)",
        "si_snri": "SI-SNR improvement against stems (dB)",
    },
    "epoch_seconds": {"epoch_seconds": "time of an epoch (s)"},
    "peak_memory": {"peak_memory_mb": "peak memory (MB)"},
    "masks": {
        "mask_overlap": "mask overlap (cosine similarity)",
        "effective_mask_count": "effective mask count",
    },
}


class Table(NamedTuple):
    """A table, and what is to be said of it."""

    file: str  # of its CSV, without the suffix
    title: str
    columns: tuple
    rows: list  # of numbers, words, None
    notes: str


def read_json(path):
    """Content of a file, {} if it is not there."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def records(folder):
    """The cell.json of each run in a grid's folder that has ended."""
    paths = folder.glob("*/*/*/cell.json")
    paths = [folder / "pretrain" / "cell.json", *sorted(paths)]
    found = {path.parent: read_json(path) for path in paths}
    return {path: record for path, record in found.items() if record}


def load_cells(folder):
    """What the grid in a folder has measured so far.

    Arguments
    ---------
    folder : pathlib.Path
        The grid's output folder.

    Returns
    -------
    dict
        (length, loss, model) -> name -> value for each of CELL_COLUMNS, None
        where it was not measured. `epoch_seconds` is measured where the budget
        is in epochs, elsewhere `step_seconds` times the batches of an epoch.
    """
    cells = {}
    for path, record in records(folder).items():
        if path.name == "pretrain":
            continue
        model, length, loss = path.relative_to(folder).parts
        length = float(length[:-1])
        done = record["status"] == "done"
        found = read_json(path / "metrics.json") if done else {}
        if done and record["steps"]:  # not whole epochs
            cost = (found.get("step_seconds"), found.get("batches"))
            found["epoch_seconds"] = cost[0] * cost[1] if all(cost) else None
        cells[length, loss, model] = {
            **{name: found.get(name) for name in CELL_COLUMNS},
            **{"length": length, "loss": loss, "model": model},
            "status": record["status"],
            "memory_gb": record["memory_gb"],
            "steps": record["steps"] or found.get("steps"),
        }
    order = sorted(
        cells, key=lambda x: (x[0], LOSSES.index(x[1]), MODELS.index(x[2]))
    )
    return {key: cells[key] for key in order}


def _is_number(value):
    return isinstance(value, (int, float))


def _figure(cells, key, name):
    """A figure of a cell, or the word that stands in its place."""
    cell = cells.get(key, {"status": None})
    if cell["status"] == "done" or cell.get(name) is not None:
        return cell[name]
    return SHOWN.get(cell["status"], cell["status"])


def _ratio(one, other):
    return one / other if _is_number(one) and _is_number(other) else None


def paper_tables(cells):
    """The paper's tables, ours after each of its values.

    Arguments
    ---------
    cells : dict
        See ``load_cells``.

    Returns
    -------
    list of Table
        Five; the second has the ratio of the times as well.
    """
    minutes = {
        key: {**cell, "epoch_minutes": _ratio(cell["epoch_seconds"], 60.0)}
        for key, cell in cells.items()
    }
    tables = []
    for number, (title, columns, paper, notes) in enumerate(PAPER_TABLES, 1):
        runs = {(loss, model) for loss, model, _ in columns.values()}
        heads = [x for head in columns for x in (f"paper: {head}", head)]
        rows = []
        for length in sorted({*paper, *(x[0] for x in cells if x[1:] in runs)}):
            row = [float(length)]
            values = paper.get(length, [None] * len(columns))
            for value, (loss, model, name) in zip(values, columns.values()):
                ours = _figure(minutes, (length, loss, model), name)
                row += [value, ours]
            if number == 2:
                row += [_ratio(row[3], row[1]), _ratio(row[4], row[2])]
            rows.append(row)
        if number == 2:
            head = "Performer / ConvTasNet"
            heads += [f"paper: {head}", head]
        title = f"Table {number}: {title}"
        columns = ("length (s)", *heads)
        tables.append(Table(f"table{number}", title, columns, rows, notes))
    return tables


def our_tables(cells):
    """What the paper has no table of.

    Arguments
    ---------
    cells : dict
        See ``load_cells``.

    Returns
    -------
    list of Table
        Measures, costs, and over-fitting where it was measured.
    """
    tables = []
    for file, title, heads, notes in OUR_TABLES:
        columns = ["length (s)", "loss", "model", *heads.values()]
        rows = [
            [*key, *(_figure(cells, key, name) for name in heads)]
            for key in cells
        ]
        if file == "over_fitting":
            columns.append("gap (dB)")
            for row in rows:
                both = _is_number(row[3]) and _is_number(row[4])
                row.append(row[3] - row[4] if both else None)
            if not any(_is_number(row[3]) for row in rows):
                continue
        tables.append(Table(file, title, columns, rows, notes))
    return tables


def markdown(columns, rows):
    """A table in Markdown, with numbers as short as they can be read.

    Example
    -------
    >>> print(markdown(("model", "dB"), [("a", 1.234), ("b", None)]))
    | model | dB |
    |---|---|
    | a | 1.23 |
    | b | - |
    """

    def show(value, column):
        if value is None:
            return "-"
        if not isinstance(value, float):
            return str(value)
        if column.startswith("length"):
            return f"{value:g}"
        digits = 0 if abs(value) >= 1000 else 3 if 0 < abs(value) < 0.1 else 2
        return f"{value:.{digits}f}"

    text = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    text += [f"| {' | '.join(map(show, row, columns))} |" for row in rows]
    return "\n".join(text)


def write_csv(path, columns, rows):
    """Writes a table with all digits that count, empty for None."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow(
                f"{value:.8g}" if isinstance(value, float) else value
                for value in row
            )


def description(folder, cells):
    """How the figures came about, as lines of a list."""
    settings = {}
    for record in records(folder).values():
        settings |= record["settings"]
    lines = [f"{name}: {text}" for name, text in settings.items() if text]
    done = [cell for cell in cells.values() if cell["status"] == "done"]
    devices = {str(cell["device"]) for cell in done}
    items = {(cell["length"], cell["test_items"]) for cell in done}
    items = [f"{length:g} s: {number}" for length, number in sorted(items)]
    statuses = [cell["status"] for cell in cells.values()]
    counts = [
        f"{statuses.count(status)} {SHOWN.get(status, status)}"
        for status in dict.fromkeys(statuses)
    ]
    heard = [
        f"{cell['test_songs_pretrained_on']} at {cell['length']:g} s"
        for cell in done
        if cell["test_songs_pretrained_on"]
    ]
    if heard:
        lines.append(
            "**Test songs of performer_mae that its pre-training heard: "
            f"{', '.join(heard)}.** A test folder keeps them apart"
        )
    return [
        *lines,
        f"Device: {', '.join(sorted(devices)) or 'none yet'}",
        f"Test items: {', '.join(items) or 'none yet'}",
        f"Cells: {', '.join(counts)}",
        f"Written: {datetime.date.today()}",
    ]


def write_tables(folder):
    """Writes tables.md, a CSV of each table, and cells.csv.

    Arguments
    ---------
    folder : pathlib.Path
        The grid's output folder.
    """
    cells = load_cells(folder)
    text = [
        "# The paper's experiment, run again",
        '"Music Separation Using Self-Supervised Learning" (Trackformer): '
        "its tables with its values, all others were measured here.",
        "\n".join(f"- {line}" for line in description(folder, cells)),
    ]
    paper, ours = paper_tables(cells), our_tables(cells)
    for table in (*paper, *ours):
        if table is ours[0]:
            text.append("# Beside the paper")
        rows = markdown(table.columns, table.rows)
        text += [f"## {table.title}", rows, table.notes]
        write_csv(folder / f"{table.file}.csv", table.columns, table.rows)
    (folder / "tables.md").write_text("\n\n".join(text) + "\n", "utf-8")
    rows = [cell.values() for cell in cells.values()]
    write_csv(folder / "cells.csv", CELL_COLUMNS, rows)


def write_figures(folder):
    """Draws figures/*.png: measures by segment length, a line a model and loss.

    Arguments
    ---------
    folder : pathlib.Path
        The grid's output folder.
    """
    # slow to import, and not needed while the cells run
    from matplotlib.figure import Figure

    cells = load_cells(folder)
    lines = dict.fromkeys((model, loss) for _, loss, model in cells)
    (folder / "figures").mkdir(exist_ok=True)
    for file, panels in FIGURES.items():
        figure = Figure(figsize=(5.5 * len(panels), 4.8), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (name, label) in zip(axes, panels.items()):
            for model, loss in lines:
                points = [
                    (length, cell[name])
                    for (length, *own), cell in cells.items()
                    if own == [loss, model] and _is_number(cell[name])
                ]
                axis.plot(
                    [length for length, _ in points],
                    [value for _, value in points],
                    "o--" if loss == "mixit" else "o-",
                    color=f"C{MODELS.index(model)}",
                    label=f"{model}, {loss}",
                )
            axis.set(xlabel="segment length (s)", ylabel=label, xscale="log")
            lengths = sorted({length for length, *_ in cells})
            axis.set_xticks(lengths, [f"{length:g}" for length in lengths])
            axis.minorticks_off()
            axis.legend(fontsize=8, loc="upper left")
        figure.savefig(folder / "figures" / f"{file}.png", dpi=110)
