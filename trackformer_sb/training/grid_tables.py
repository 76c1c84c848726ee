"""The paper's five tables from a grid of trainings, beside the paper's values.

"Music Separation Using Self-Supervised Learning" (Trackformer). Everything is
read from the grid's folder: what is there so far shows, the rest is "not run".
"""

import json
from typing import NamedTuple

# in the order of the tables
PAPER_MODELS = ("performer_mae", "performer", "convtasnet")
MODELS = (*PAPER_MODELS, "asteroid_convtasnet")
CONVTASNETS = MODELS[2:]
LOSSES = ("mixit", "mixit_div_sp")

# What the paper says; its Performers have the auxiliary losses.
PAPER_LENGTHS = (3.0, 5.0, 10.0, 30.0)
PAPER_LOSS = "mixit_div_sp"
PAPER_SI_SNR = {
    "performer_mae": dict(zip(PAPER_LENGTHS, (1.66, 2.00, 2.33, 3.52))),
    "performer": {3.0: 2.60},
    "convtasnet": dict(zip(PAPER_LENGTHS, (-9.11, -8.52, -9.73, "OOM"))),
}
PAPER_TIME_RATIO = "0.74 to 0.83"  # epochs 17 to 26 % shorter
NOT_AT_HAND = '"-" under paper: the paper\'s value is not at hand.'

CELL_COLUMNS = (
    "length",
    "loss",
    "model",
    "status",
    "mixture_si_snr",
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
    if cell["status"] == "done":
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


def _keys(cells, models=MODELS):
    """The cells there are and those that the paper has."""
    keys = {key for key in cells if key[2] in models}
    keys |= {
        (length, PAPER_LOSS, model)
        for model in models
        for length in PAPER_SI_SNR.get(model, ())
    }
    return sorted(keys, key=_order)


def _paper_si_snr(length, loss, model):
    # which loss the paper's ConvTasNet had is not at hand: it stands in both
    if loss != PAPER_LOSS and model != "convtasnet":
        return None
    return PAPER_SI_SNR.get(model, {}).get(length)


def separation_table(cells):
    """Table 1: SI-SNR by model and length."""
    names = ("si_snri", "si_snri_grouped", "sdr", "test_items")
    rows = [
        (
            *key,
            figure(cells, key, "mixture_si_snr"),
            _paper_si_snr(*key),
            *(figure(cells, key, name) for name in names),
        )
        for key in _keys(cells)
    ]
    notes = [
        "Mixture SI-SNR is the paper's measure: the best remix of the outputs "
        "against the two mixtures. The others are against real stems: the "
        "improvement with one output per stem, with outputs added up, and SDR. "
        "Which of the losses the paper's ConvTasNet had is not at hand, its "
        f"values stand at both. {NOT_AT_HAND}"
    ]
    heard = [
        f"{cell['test_songs_pretrained_on']} at {length:g} s ({loss})"
        for (length, loss, _), cell in cells.items()
        if cell["test_songs_pretrained_on"]
    ]
    if heard:
        notes.append(
            "**Test songs of performer_mae that its pre-training heard: "
            f"{', '.join(heard)}.** A test folder keeps them apart."
        )
    columns = (
        *("length (s)", "loss", "model", "mixture SI-SNR (dB)", "paper (dB)"),
        *("SI-SNRi (dB)", "SI-SNRi grouped (dB)", "SDR (dB)", "test items"),
    )
    title = "Table 1: separation by model and length"
    return Table(title, columns, rows, " ".join(notes))


def time_table(cells):
    """Table 2: seconds, and how the Performer's relate to ConvTasNet's."""
    rows = []
    for key in _keys(cells):
        length, loss, model = key
        epoch, *others = (
            figure(cells, key, name)
            for name in ("epoch_seconds", "step_seconds", "total_seconds")
        )
        ratio = paper = None
        if model not in CONVTASNETS:
            peers = [
                figure(cells, (length, loss, peer), "epoch_seconds")
                for peer in CONVTASNETS
            ]
            peers = [seconds for seconds in peers if is_number(seconds)]
            if is_number(epoch) and peers:
                ratio = epoch / min(peers)
        in_paper = _paper_si_snr(length, loss, "convtasnet")
        if (loss, model) == (PAPER_LOSS, MODELS[0]) and is_number(in_paper):
            paper = PAPER_TIME_RATIO
        rows.append((*key, epoch, *others, ratio, paper))
    columns = (
        *("length (s)", "loss", "model", "epoch (s)", "batch (s)"),
        *("training and validation (s)", "epoch / ConvTasNet's", "paper"),
    )
    notes = (
        "Epochs without their validation. With a budget of steps or minutes an "
        "epoch is the median time of a batch, times the batches of an epoch. "
        "ConvTasNet's is the shorter one where both kinds ran. "
        "The paper: Performer epochs 17 to 26 % shorter than ConvTasNet's; its "
        f"seconds are not at hand. {NOT_AT_HAND}"
    )
    return Table("Table 2: time", columns, rows, notes)


def memory_table(cells):
    """Table 3: peak memory."""
    rows = []
    for key in _keys(cells):
        paper = _paper_si_snr(*key)
        limit = cells.get(key, {}).get("memory_gb")
        peak = figure(cells, key, "peak_memory_mb")
        rows.append((*key, peak, limit, paper if paper == "OOM" else None))
    columns = (
        *("length (s)", "loss", "model", "peak memory (MB)", "limit (GB)"),
        "paper",
    )
    notes = (
        "On a GPU what is allocated there, on a CPU the whole process; OOM: "
        "out of memory. The paper: ConvTasNet is out of memory at 30 s. "
        f"{NOT_AT_HAND}"
    )
    return Table("Table 3: peak memory", columns, rows, notes)


def audio_mae_table(cells):
    """Table 4: with and without pre-training."""
    pair = PAPER_MODELS[:2]
    rows = []
    for length, loss in dict.fromkeys(key[:2] for key in _keys(cells, pair)):
        figures = []
        for name in ("mixture_si_snr", "si_snri"):
            both = [figure(cells, (length, loss, x), name) for x in pair]
            figures += [*both, difference(*both)]
        paper = [_paper_si_snr(length, loss, model) for model in pair]
        rows.append((length, loss, *figures, *paper, difference(*paper)))
    columns = ["length (s)", "loss"]
    for measure in ("mixture SI-SNR", "SI-SNRi", "paper"):
        words = ("with", "without", "difference")
        columns += [f"{measure} {word} (dB)" for word in words]
    notes = (
        "With: performer_mae, without: performer. The paper: worse with "
        f"Audio-MAE at every length. {NOT_AT_HAND}"
    )
    return Table("Table 4: Audio-MAE", tuple(columns), rows, notes)


def auxiliary_loss_table(cells):
    """Table 5: with and without diversity and sparsity loss."""
    names = ["mixture_si_snr", "si_snri", "mask_overlap"]
    names.append("effective_mask_count")
    rows = []
    for length, model in dict.fromkeys(key[::2] for key in _keys(cells)):
        pair = [(length, loss, model) for loss in LOSSES]
        for name in names if cells.keys() & pair else names[:1]:
            both = [figure(cells, key, name) for key in pair]
            ours = difference(*both[::-1])
            known = (model, name) == ("performer_mae", "mixture_si_snr")
            paper = "below 0" if known else None
            rows.append((length, model, name, *both, ours, paper))
    columns = ("length (s)", "model", "measure", *LOSSES, "difference", "paper")
    notes = (
        "Difference: what the auxiliary losses change; SI-SNR in dB. Mask "
        "overlap is the mean cosine similarity of two masks, effective mask "
        "count the number of masks in use. The paper: the auxiliary losses "
        f"cost SI-SNR, how much is not at hand. {NOT_AT_HAND}"
    )
    return Table("Table 5: auxiliary losses", columns, rows, notes)


TABLES = (
    separation_table,
    time_table,
    memory_table,
    audio_mae_table,
    auxiliary_loss_table,
)
