"""The tables of a grid of runs: the paper's five, and what it has no table of.

"Music Separation Using Self-Supervised Learning" (Trackformer), section 5.
Everything is read from the grid's folder, what was not run says so.
"""

import csv
import datetime
import json

# in the order of the tables; the first three are the paper's
MODELS = ("performer_mae", "performer", "convtasnet", "asteroid_convtasnet")
LOSSES = ("mixit", "mixit_div_sp")
OOM = "OOM"
WITH_MAE = "mixit", "performer_mae"

# Of all cells: measures with their heads. cells.csv has all others.
OUR_COLUMNS = {
    "mixture_si_snr": "SI-SNR (dB)",
    "train_mixture_si_snr": "in training (dB)",
    "valid_mixture_si_snr": "in validation (dB)",
    "si_snri": "SI-SNRi (dB)",
    "si_snri_grouped": "SI-SNRi grouped (dB)",
    "sdr": "SDR (dB)",
    "mask_overlap": "overlap",
    "effective_mask_count": "N_E",
    "test_items": "test items",
    "test_songs_pretrained_on": "test songs pre-trained on",
    "peak_memory_mb": "peak memory (MB)",
}
# Of the paper's tables 4 and 5
MASKS = ("mixture_si_snr", "mask_overlap", "effective_mask_count")

# Of each of the paper's tables: title, columns as (loss, model, measure), the
# paper's values by length in seconds, and what is to be said of it.
PAPER_TABLES = (
    (
        "SI-SNR by segment length",
        {
            "ConvTasNet (dB)": ("mixit", "convtasnet", "mixture_si_snr"),
            "Performer (dB)": (*WITH_MAE, "mixture_si_snr"),
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
            "Performer (min/epoch)": (*WITH_MAE, "epoch_minutes"),
        },
        {
            3: (17.05, 12.57),
            5: (20.33, 16.04),
            10: (43.25, 35.42),
            30: (OOM, 46.33),
        },
        "Ours without validation: the median time of a batch, times the "
        "batches of an epoch. The paper's text has 20 to 30 % less time "
        "(section 7), its table 18 to 26.",
    ),
    (
        "Audio-MAE",
        {
            "with Audio-MAE (dB)": (*WITH_MAE, "mixture_si_snr"),
            "without (dB)": ("mixit", "performer", "mixture_si_snr"),
        },
        {3: (1.66, 2.6), 5: (2.0, 3.16), 10: (2.33, 3.52), 30: (3.52, OOM)},
        "SI-SNR as in Table 1. At 10 s without Audio-MAE the paper has 3.52 "
        "here and 3.87 in Table 4, for what seems the same run.",
    ),
    (
        "MixIT loss alone",
        {OUR_COLUMNS[x]: ("mixit", "performer", x) for x in MASKS},
        {3: (2.6, 0.59, 6.36), 5: (3.16, 0.61, 5.93), 10: (3.87, 0.52, 6.29)},
        "The Performer without Audio-MAE. Overlap: mean cosine similarity of "
        "two masks; N_E: effective mask count, the number of masks in use. At "
        "10 s the paper has an SI-SNR of 3.52 in Table 3; it has no 30 s here.",
    ),
    (
        "MixIT, diversity and sparsity loss",
        {OUR_COLUMNS[x]: ("mixit_div_sp", "performer", x) for x in MASKS},
        {3: (2.56, 0.49, 5.6), 5: (3.32, 0.35, 4.48), 10: (2.26, 0.44, 5.45)},
        "The Performer without Audio-MAE, as in Table 4.",
    ),
)

OUR_NOTES = (
    "SI-SNR, overlap and N_E as above; of the epoch that is tested the "
    "SI-SNR in training is of every tenth batch, over the epoch and with "
    "dropout. The paper: training +3 to +4 dB, validation and test << 0 "
    "dB, for which model and length is not said (section 5.5). The others "
    "are against real stems: the improvement with one output per stem, "
    "with outputs added up, and SDR. Where test songs were pre-trained on "
    "the test flatters; a test_folder keeps them apart. Peak memory: on a GPU "
    "what is allocated there, on a CPU the whole process. The paper: up to 4 "
    "GB less than ConvTasNet (section 7). What each cell took is in cells.csv."
)


def load_cells(folder):
    """(length, loss, model) -> name -> value of metrics.json, and a status."""
    cells = {}
    for path in folder.glob("*/*s/*/settings.txt"):
        model, length, loss = path.parent.relative_to(folder).parts
        key = float(length[:-1]), loss, model
        results = path.with_name("metrics.json")
        if results.is_file():
            found = json.loads(results.read_text("utf-8"))
            del found["history"]
            batches, seconds = found["batches"], found["step_seconds"]
            # None of a run that was stopped in its last validation
            if seconds is not None:
                found["epoch_minutes"] = batches * seconds / 60
            cells[key] = {"status": "done", **found}
        elif path.with_name("oom.txt").is_file():
            cells[key] = {"status": OOM}
    order = sorted(
        cells, key=lambda x: (x[0], LOSSES.index(x[1]), MODELS.index(x[2]))
    )
    return {key: cells[key] for key in order}


def _figure(cells, key, name):
    """A figure of a cell, or the words that stand in its place."""
    cell = cells.get(key, {"status": "not run"})
    return cell.get(name) if cell["status"] == "done" else cell["status"]


def paper_table(cells, columns, paper):
    """Heads and rows of one of PAPER_TABLES, ours after each of its values."""
    heads = [x for head in columns for x in (f"paper: {head}", head)]
    runs = {(loss, model) for loss, model, _ in columns.values()}
    rows = []
    for length in sorted({*paper, *(x[0] for x in cells if x[1:] in runs)}):
        row = [float(length)]
        theirs = paper.get(length, [None] * len(columns))
        for value, (loss, model, name) in zip(theirs, columns.values()):
            row += [value, _figure(cells, (length, loss, model), name)]
        rows.append(row)
    return ["length (s)", *heads], rows


def markdown(columns, rows):
    """A table in Markdown, with numbers as short as they can be read."""

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


def tables(cells):
    """All tables in Markdown: the paper's five, then ours."""
    text = []
    for number, (title, columns, paper, notes) in enumerate(PAPER_TABLES, 1):
        table = markdown(*paper_table(cells, columns, paper))
        text += [f"## Table {number}: {title}", table, notes]
    rows = [
        [*key, *(_figure(cells, key, name) for name in OUR_COLUMNS)]
        for key in cells
    ]
    columns = ["length (s)", "loss", "model", *OUR_COLUMNS.values()]
    text += ["# Beside the paper", markdown(columns, rows), OUR_NOTES]
    return "\n\n".join(text) + "\n"


def write_tables(folder, command):
    """Writes tables.md, which names the command's options, and cells.csv."""
    cells = load_cells(folder)
    text = (
        "# The paper's experiment, run again\n\n"
        '"Music Separation Using Self-Supervised Learning" (Trackformer): '
        "its tables with its values, all others were measured here, by "
        f"{datetime.date.today()}.\n\n    recipes/reproduce.py {command}\n\n"
    )
    (folder / "tables.md").write_text(text + tables(cells), "utf-8")
    names = dict.fromkeys(name for cell in cells.values() for name in cell)
    with open(folder / "cells.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["length", "loss", "model", *names])
        writer.writeheader()
        for (length, loss, model), cell in cells.items():
            key = {"length": length, "loss": loss, "model": model}
            writer.writerow(key | cell)
