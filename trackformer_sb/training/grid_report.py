"""What a grid leaves for its readers: tables.md, CSVs and figures."""

import csv
import datetime
import os
import pathlib
import shlex

from trackformer_sb.training.grid_tables import (
    CELL_COLUMNS,
    LOSSES,
    MODELS,
    OUR_TABLES,
    PAPER_LENGTHS,
    PAPER_SI_SNR,
    PAPER_TABLES,
    SHOWN,
    is_number,
    load_cells,
    read_json,
)

# File of the figure, its title, and for each panel: measure, axis, log scale.
FIGURES = {
    "si_snr": (
        "Separation",
        ("mixture_si_snr", "SI-SNR of the remix against the mixtures (dB)"),
        ("si_snri", "SI-SNR improvement against stems (dB)"),
    ),
    "epoch_seconds": ("Time of an epoch", ("epoch_seconds", "seconds")),
    "peak_memory": ("Peak memory", ("peak_memory_mb", "MB")),
    "masks": (
        "Masks",
        ("mask_overlap", "mask overlap (cosine similarity)"),
        ("effective_mask_count", "effective mask count (masks)"),
    ),
}
LOG_SCALE = ("epoch_seconds", "peak_memory_mb")
COLOURS = dict(zip(MODELS, ("tab:blue", "tab:green", "tab:red", "tab:brown")))
LINES = dict(zip(LOSSES, ("--", "-")))


def markdown(columns, rows):
    """A table in Markdown.

    Arguments
    ---------
    columns : sequence of str
        Its head.
    rows : sequence of sequences
        Numbers, words, and None where there is nothing.

    Returns
    -------
    str
        With numbers as short as they can be read.

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

    lines = [columns, ["---"] * len(columns)]
    text = [f"| {' | '.join(lines[0])} |", f"|{'|'.join(lines[1])}|"]
    text += [f"| {' | '.join(map(show, row, columns))} |" for row in rows]
    return "\n".join(text)


def short(value):
    """A path without the folders that are this machine's.

    Example
    -------
    >>> short("/home/me/music"), short("1e-3")
    ('music', '1e-3')
    """
    text = str(value)
    return pathlib.PurePath(text).name if os.path.isabs(text) else text


def write_text(path, text):
    """Never leaves a part of a file under its name."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def write_csv(path, columns, rows):
    """Writes a table with all digits that count, empty for None."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow(
                f"{value:.8g}" if isinstance(value, float) else value
                for value in row
            )
    os.replace(unfinished, path)


def budget_text(budget):
    """A budget in words.

    Example
    -------
    >>> budget_text(("minutes", 10.0))
    '10 minutes of training, without early stopping'
    """
    unit, number = budget
    return (
        f"{number:g} "
        + {
            "epochs": "epochs, less where early stopping ends them",
            "steps": "optimizer steps, without early stopping",
            "minutes": "minutes of training, without early stopping",
        }[unit]
    )


def description(folder, cells):
    """How the figures came about, as lines of a list."""
    config = read_json(folder / "grid.json")
    done = [cell for cell in cells.values() if cell["status"] == "done"]
    lines = [f"Budget of a cell: {budget_text(config['budget'])}"]
    if "pretrain_budget" in config:
        text = budget_text(config["pretrain_budget"])
        status = read_json(folder / "pretrain" / "cell.json").get("status")
        lines.append(f"Pre-training: {text}; {SHOWN.get(status, status)}")
    elif config.get("pretrained_encoder"):
        encoder = short(config["pretrained_encoder"])
        lines.append(f"Pre-trained encoder: {encoder}")
    data = f"Data: {config['dataset']}"
    if config["data_folder"]:
        data += f" in {short(config['data_folder'])}"
    if config["test_folder"]:
        kind = config["test_dataset"] or "stems"
        data += f", tested on {kind} in {short(config['test_folder'])}"
    lines += [data, f"Seed: {config['seed']}"]
    devices = sorted({str(cell["device"]) for cell in done})
    lines.append(f"Device: {', '.join(devices) or 'none yet'}")
    overrides = {
        name: config[name]
        for name in sorted(config)
        if name.startswith("overrides") and config[name]
    }
    for name, keys in overrides.items():
        words = [f"--{key}={short(value)}" for key, value in keys.items()]
        lines.append(f"{name.capitalize()}: `{' '.join(words)}`")
    items = {}
    for cell in done:
        items.setdefault(cell["length"], set()).add(cell["test_items"])
    counts = [
        f"{length:g} s: {' or '.join(map(str, sorted(number, key=str)))}"
        for length, number in items.items()
    ]
    lines.append(f"Test items: {', '.join(counts) or 'none yet'}")
    statuses = [cell["status"] for cell in cells.values()]
    lines.append(
        "Cells: "
        + ", ".join(
            f"{statuses.count(status)} {SHOWN.get(status, status)}"
            for status in dict.fromkeys(statuses)
        )
    )
    heard = [
        f"{cell['test_songs_pretrained_on']} at {length:g} s ({loss})"
        for (length, loss, _), cell in cells.items()
        if cell["test_songs_pretrained_on"]
    ]
    if heard:
        lines.append(
            "**Test songs of performer_mae that its pre-training heard: "
            f"{', '.join(heard)}.** A test folder keeps them apart"
        )
    lines.append(f"Written: {datetime.date.today()}")
    return lines


def write_tables(folder):
    """Writes tables.md, a CSV of each table, and cells.csv.

    Arguments
    ---------
    folder : pathlib.Path
        The grid's output folder, with its grid.json.
    """
    cells = load_cells(folder)
    text = [
        "# The paper's experiment, run again",
        '"Music Separation Using Self-Supervised Learning" (Trackformer): '
        "its tables with its values, all others were measured here.",
        "\n".join(f"- {line}" for line in description(folder, cells)),
    ]
    for make in (*PAPER_TABLES, *OUR_TABLES):
        table = make(cells)
        if not table.rows:
            continue
        if make is OUR_TABLES[0]:
            text.append("# Beside the paper")
        rows = markdown(table.columns, table.rows)
        text += [f"## {table.title}", rows, table.notes]
        write_csv(folder / f"{table.file}.csv", table.columns, table.rows)
    write_text(folder / "tables.md", "\n\n".join(text) + "\n")
    write_csv(
        folder / "cells.csv",
        CELL_COLUMNS,
        [cell.values() for cell in cells.values()],
    )


def summary(record, metrics):
    """One line of what came of a training."""
    if record["status"] != "done":
        shown = SHOWN.get(record["status"], record["status"])
        return f"{shown} ({record['reason']})"
    words = [f"done in {record['seconds'] / 60:.1f} min"]
    for name, form in (
        ("mixture_si_snr", "mixture SI-SNR {:.2f} dB"),
        ("si_snri", "SI-SNRi {:.2f} dB"),
        ("step_seconds", "{:.3f} s a batch"),
        ("peak_memory_mb", "{:.0f} MB"),
    ):
        if is_number(metrics.get(name)):
            words.append(form.format(metrics[name]))
    return ", ".join(words)


def plan_text(rows):
    """What a dry run prints.

    Arguments
    ---------
    rows : list of dict
        For each job: job, budget, and if it was tried: status, reason,
        step_seconds, minutes, peak_memory_mb.

    Returns
    -------
    str
        Commands and a table.
    """
    lines = []
    table = []
    for row in rows:
        job = row["job"]
        words = ["python", *job.command(**row["keys"])[1:]]
        lines.append(f"{job.name}:\n    {shlex.join(words)}")
        status = row.get("status", "not tried")
        names = ("step_seconds", "minutes", "peak_memory_mb")
        shown = None if status == "done" else SHOWN.get(status, status)
        figures = [row.get(name, shown) for name in names]
        table.append((job.name, row["budget"], *figures))
        if row.get("reason"):
            lines.append(f"    {shown}: {row['reason']}")
    columns = ("training", "budget", "batch (s)", "minutes", "memory (MB)")
    minutes = [row["minutes"] for row in rows if "minutes" in row]
    total = sum(minutes) if minutes else None
    table.append((f"{len(rows)} trainings", "", None, total, None))
    lines += [
        "",
        markdown(columns, table),
        "",
        "Minutes of training at most, without validation, test and start.",
    ]
    return "\n".join(lines)


def draw(axis, cells, name):
    """One measure against the length, a line for each model and loss."""
    lengths = sorted({key[0] for key in cells}) or list(PAPER_LENGTHS)
    missing = []
    for model in MODELS:
        for loss in LOSSES:
            points = [
                (length, cells[length, loss, model][name])
                for length in lengths
                if is_number(cells.get((length, loss, model), {}).get(name))
            ]
            label, colour = f"{model}, {loss}", COLOURS[model]
            if points:
                style = LINES[loss]
                axis.plot(*zip(*points), style, color=colour, label=label)
                axis.plot(*zip(*points), "o", color=colour, ms=4)
            for length in lengths:
                cell = cells.get((length, loss, model), {})
                if cell.get("status") == "oom":
                    missing.append((length, label, colour))
    if name == "mixture_si_snr":
        for model, values in PAPER_SI_SNR.items():
            points = [x for x in values.items() if is_number(x[1])]
            label, colour = f"paper: {model}", COLOURS[model]
            axis.plot(*zip(*points), "x:", color=colour, label=label)
            missing += [
                (length, label, colour)
                for length, value in values.items()
                if value == "OOM"
            ]
        lengths = sorted({*lengths, *PAPER_LENGTHS})
    for row, (length, label, colour) in enumerate(missing):
        axis.annotate(
            f"OOM {label}",
            (length, 0.02 + 0.05 * row),
            xycoords=("data", "axes fraction"),
            color=colour,
            ha="right",
            fontsize=8,
        )
    axis.set_xscale("log")
    axis.set_xlim(0.8 * lengths[0], 1.25 * lengths[-1])
    axis.set_xticks(lengths, [f"{length:g}" for length in lengths])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("segment length (s)")
    axis.grid(alpha=0.3)
    axis.margins(y=0.2)


def write_figures(folder):
    """Draws figures/*.png: separation, time, memory and masks by length.

    Arguments
    ---------
    folder : pathlib.Path
        The grid's output folder.
    """
    # not needed while the cells run, and slow to import
    from matplotlib.figure import Figure

    cells = load_cells(folder)
    (folder / "figures").mkdir(exist_ok=True)
    for file, (title, *panels) in FIGURES.items():
        figure = Figure(figsize=(5.5 * len(panels), 4.8), layout="constrained")
        figure.suptitle(title)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (name, unit) in zip(axes, panels):
            draw(axis, cells, name)
            axis.set_ylabel(unit)
            if name in LOG_SCALE and axis.lines:
                axis.set_yscale("log")
            if axis.lines:
                axis.legend(fontsize=8)
            else:
                where = {"transform": axis.transAxes, "ha": "center"}
                axis.text(0.5, 0.5, "not measured", **where)
        path = folder / "figures" / f"{file}.png"
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        figure.savefig(unfinished, dpi=110, format="png")
        os.replace(unfinished, path)


def write_figures_at_stop(folder):
    """Draws the figures of a grid that was stopped, if a cell is done.

    What goes wrong is printed and no more, for the grid has to end.

    Arguments
    ---------
    folder : pathlib.Path
        The grid's output folder.
    """
    try:
        cells = load_cells(folder).values()
        if any(cell["status"] == "done" for cell in cells):
            write_figures(folder)
    except Exception as error:
        print(f"no figures: {type(error).__name__}: {error}", flush=True)
