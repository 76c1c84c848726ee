"""The paper's five tables from a grid of trainings, and what it has not.

"Music Separation Using Self-Supervised Learning" (Trackformer), section 5.
Everything is read from the grid's folder: what is there so far shows, the rest
is "not run".
"""

import json
from typing import NamedTuple

# in the order of the tables
PAPER_MODELS = ("performer_mae", "performer", "convtasnet")
MODELS = (*PAPER_MODELS, "asteroid_convtasnet")
LOSSES = ("mixit", "mixit_div_sp")

# What the paper says at its lengths, its Tables 4 and 5 not at the last.
PAPER_LENGTHS = (3.0, 5.0, 10.0, 30.0)


def _by_length(*values):
    return dict(zip(PAPER_LENGTHS, values))


PAPER_SI_SNR = {
    "convtasnet": _by_length(-9.11, -8.52, -9.73, "OOM"),
    "performer_mae": _by_length(1.66, 2.00, 2.33, 3.52),
    "performer": _by_length(2.60, 3.16, 3.52, "OOM"),
}
PAPER_MINUTES = {
    "convtasnet": _by_length(17.05, 20.33, 43.25, "OOM"),
    "performer_mae": _by_length(12.57, 16.04, 35.42, 46.33),
}
PAPER_MASKS = {
    "mixit": {
        "mixture_si_snr": _by_length(2.60, 3.16, 3.87),
        "mask_overlap": _by_length(0.59, 0.61, 0.52),
        "effective_mask_count": _by_length(6.36, 5.93, 6.29),
    },
    "mixit_div_sp": {
        "mixture_si_snr": _by_length(2.56, 3.32, 2.26),
        "mask_overlap": _by_length(0.49, 0.35, 0.44),
        "effective_mask_count": _by_length(5.60, 4.48, 5.45),
    },
}

CELL_COLUMNS = (
    "length",
    "loss",
    "model",
    "status",
    "mixture_si_snr",
    "train_mixture_si_snr",
    "valid_mixture_si_snr",
    "si_snr",
    "si_snri",
    "si_snri_grouped",
    "sdr",
    "mask_overlap",
    "effective_mask_count",
    "test_items",
    "epochs",
    "steps",
    "batches",
    "step_seconds",
    "epoch_seconds",
    "total_seconds",
    "peak_memory_mb",
    "num_parameters",
    "device",
    "memory_gb",
    "test_songs_pretrained_on",
)
SHOWN = {"oom": "OOM", None: "not run"}  # other statuses show as they are


class Table(NamedTuple):
    """A table and what is to be said of it."""

    file: str  # of its CSV, without the suffix
    title: str
    columns: tuple
    rows: list  # numbers, words, None
    notes: str


def read_json(path):
    """Content of a file, {} if it is not there.

    Raises
    ------
    ValueError
        Naming a file that was cut or damaged.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None


def _order(key):
    length, loss, model = key
    return length, LOSSES.index(loss), MODELS.index(model)


def _songs(folder, splits):
    """Files of the songs in splits of a training, None where not known."""
    songs = set()
    for split in splits:
        path = folder / "manifests" / f"{split}.jsonl"
        if not path.is_file():
            return None
        # as ``data.manifest.read_songs``, without the numpy it loads
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        songs |= {json.dumps(line["tracks"], sort_keys=True) for line in lines}
    return songs


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
    unit = read_json(folder / "grid.json").get("budget", ("epochs",))[0]
    cells = {}
    for path in folder.glob("*/*s/*/cell.json"):
        model, length, loss = path.parts[-4:-1]
        if model not in MODELS or loss not in LOSSES:
            continue
        run, record = path.parent / "run", read_json(path)
        done = record["status"] == "done"
        found = read_json(run / "metrics.json") if done else {}
        if done and unit != "epochs":
            cost = (found.get("step_seconds"), found.get("batches"))
            found["epoch_seconds"] = cost[0] * cost[1] if all(cost) else None
        cell = {name: found.get(name) for name in CELL_COLUMNS}
        cell |= {"length": float(length[:-1]), "loss": loss, "model": model}
        cell["status"] = record["status"]
        cell["steps"] = record.get("steps") or cell["steps"]
        cell["memory_gb"] = record.get("memory_gb")
        if done and model == "performer_mae":
            # songs too short for the cell's segments leave its split, and only
            # the same songs are always split alike
            heard = _songs(folder / "pretrain", ("train", "valid"))
            tested = _songs(run, ("test",))
            if None not in (heard, tested):
                cell["test_songs_pretrained_on"] = len(heard & tested)
        cells[cell["length"], loss, model] = cell
    return {key: cells[key] for key in sorted(cells, key=_order)}


def figure(cells, key, name):
    """A figure of a cell, or the word that stands in its place."""
    cell = cells.get(key, {"status": None})
    if cell["status"] == "done" or cell.get(name) is not None:
        return cell[name]
    return SHOWN.get(cell["status"], cell["status"])


def is_number(value):
    """Whether there is a figure.

    Example
    -------
    >>> is_number(0.0), is_number("OOM"), is_number(None)
    (True, False, False)
    """
    return isinstance(value, (int, float))


def difference(one, other):
    """Difference of two figures, None without both.

    Example
    -------
    >>> difference(3, 1), difference("OOM", 1)
    (2, None)
    """
    return one - other if is_number(one) and is_number(other) else None


def _paper_table(cells, number, title, columns, notes, unit=1.0):
    """The paper's values by length, each with ours after it.

    A column is its head, the paper's values, and the loss, model and name of
    ours, which is divided by a unit.
    """
    ours = {(loss, model) for *_, loss, model, _ in columns}
    lengths = {key[0] for key in cells if key[1:] in ours}
    rows = []
    for length in sorted(lengths.union(*(column[1] for column in columns))):
        row = [length]
        for _, values, loss, model, name in columns:
            value = figure(cells, (length, loss, model), name)
            value = value / unit if is_number(value) else value
            row += [values.get(length), value]
        rows.append(row)
    heads = [x for head, *_ in columns for x in (f"paper: {head}", head)]
    title = f"Table {number}: {title}"
    return Table(f"table{number}", title, ("length (s)", *heads), rows, notes)


def _si_snr_columns(**heads):
    return [
        (head, PAPER_SI_SNR[model], "mixit", model, "mixture_si_snr")
        for model, head in heads.items()
    ]


def separation_table(cells):
    """Table 1: SI-SNR of ConvTasNet and Performer."""
    columns = _si_snr_columns(
        convtasnet="ConvTasNet (dB)", performer_mae="Performer (dB)"
    )
    notes = (
        "SI-SNR of the best remix of the outputs against the two mixtures; "
        "OOM: out of memory. The Performer is the one with Audio-MAE. Tables 1 "
        "to 3 are of MixIT alone, here and presumably in the paper, which "
        "fine-tunes with the MixIT loss (section 4.2.4) and has the same "
        "values without Audio-MAE in Table 4 at 3 and 5 s. ConvTasNet is "
        "SpeechBrain's; Asteroid's is among what stands beside the paper."
    )
    return _paper_table(cells, 1, "SI-SNR by segment length", columns, notes)


def time_table(cells):
    """Table 2: minutes, and how the Performer's relate to ConvTasNet's."""
    columns = [
        (head, PAPER_MINUTES[model], "mixit", model, "epoch_seconds")
        for model, head in (
            ("convtasnet", "ConvTasNet (min/epoch)"),
            ("performer_mae", "Performer (min/epoch)"),
        )
    ]
    notes = (
        "Ours without validation. With a budget of steps or minutes an epoch "
        "is the median time of a batch, times the batches of an epoch. The "
        "paper's text has 20 to 30 % less time (section 7), its table 18 to 26."
    )
    title = "Time of an epoch"
    table = _paper_table(cells, 2, title, columns, notes, unit=60.0)
    for row in table.rows:
        for convtasnet, performer in (row[1:4:2], row[2:5:2]):
            both = is_number(convtasnet) and is_number(performer)
            row.append(performer / convtasnet if both else None)
    ratios = ("paper: Performer / ConvTasNet", "Performer / ConvTasNet")
    return table._replace(columns=(*table.columns, *ratios))


def audio_mae_table(cells):
    """Table 3: with and without pre-training."""
    columns = _si_snr_columns(
        performer_mae="with Audio-MAE (dB)", performer="without (dB)"
    )
    notes = (
        "SI-SNR as in Table 1. At 10 s without Audio-MAE the paper has 3.52 "
        "here and 3.87 in Table 4, for what seems the same run."
    )
    return _paper_table(cells, 3, "Audio-MAE", columns, notes)


def _masks_table(cells, number, title, loss, notes):
    columns = [
        (head, PAPER_MASKS[loss][name], loss, "performer", name)
        for name, head in (
            ("mixture_si_snr", "SI-SNR (dB)"),
            ("mask_overlap", "overlap"),
            ("effective_mask_count", "N_E"),
        )
    ]
    return _paper_table(cells, number, title, columns, notes)


def mixit_table(cells):
    """Table 4: MixIT alone."""
    notes = (
        "The Performer without Audio-MAE. Overlap: mean cosine similarity of "
        "two masks; N_E: effective mask count, the number of masks in use. At "
        "10 s the paper has an SI-SNR of 3.52 in Table 3; it has no 30 s here."
    )
    return _masks_table(cells, 4, "MixIT loss alone", LOSSES[0], notes)


def auxiliary_loss_table(cells):
    """Table 5: with diversity and sparsity loss."""
    title = "MixIT, diversity and sparsity loss"
    notes = "The Performer without Audio-MAE, as in Table 4."
    return _masks_table(cells, 5, title, LOSSES[1], notes)


def _cell_table(cells, file, title, heads, notes):
    """Figures of all cells that there are; heads go by their names."""
    rows = [
        (*key, *(figure(cells, key, name) for name in heads)) for key in cells
    ]
    columns = ("length (s)", "loss", "model", *heads.values())
    return Table(file, title, columns, rows, notes)


def measures_table(cells):
    """The measures of all cells."""
    heads = {
        "mixture_si_snr": "SI-SNR (dB)",
        "si_snri": "SI-SNRi (dB)",
        "si_snri_grouped": "SI-SNRi grouped (dB)",
        "sdr": "SDR (dB)",
        "mask_overlap": "overlap",
        "effective_mask_count": "N_E",
        "test_items": "test items",
    }
    notes = (
        "SI-SNR, overlap and N_E as above. The others are against real stems: "
        "the improvement with one output per stem, with outputs added up, and "
        "SDR."
    )
    return _cell_table(cells, "measures", "Separation", heads, notes)


def costs_table(cells):
    """Time and memory of all cells."""
    heads = {
        "step_seconds": "batch (s)",
        "epoch_seconds": "epoch (s)",
        "total_seconds": "training and validation (s)",
        "peak_memory_mb": "peak memory (MB)",
        "memory_gb": "limit (GB)",
    }
    notes = (
        "Peak memory: on a GPU what is allocated there, on a CPU the whole "
        "process, for which there is a limit. The paper: up to 4 GB less than "
        "ConvTasNet (section 7)."
    )
    return _cell_table(cells, "costs", "Time and memory", heads, notes)


def over_fitting_table(cells):
    """SI-SNR on training and held-out songs; no rows if not measured."""
    heads = {
        "train_mixture_si_snr": "training SI-SNR (dB)",
        "valid_mixture_si_snr": "validation SI-SNR (dB)",
        "mixture_si_snr": "test SI-SNR (dB)",
    }
    notes = (
        "SI-SNR as in Table 1, of the epoch that is tested. In training it is "
        "of every tenth batch, over the epoch and with dropout. The gap is "
        "training less validation. The paper: training +3 to +4 dB, "
        "validation and test << 0 dB, for which model and length is not said."
    )
    title = "Over-fitting (section 5.5)"
    table = _cell_table(cells, "over_fitting", title, heads, notes)
    rows = [(*row, difference(row[3], row[4])) for row in table.rows]
    if not any(is_number(row[3]) for row in rows):
        rows = []  # of a grid that did not measure it
    return table._replace(columns=(*table.columns, "gap (dB)"), rows=rows)


PAPER_TABLES = (
    separation_table,
    time_table,
    audio_mae_table,
    mixit_table,
    auxiliary_loss_table,
)
OUR_TABLES = (measures_table, costs_table, over_fitting_table)
