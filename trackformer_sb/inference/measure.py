"""What a separator is, what it can, and what it costs on this machine."""

import time
from pathlib import Path

import torch
from huggingface_hub import ModelCard

from trackformer_sb.inference.separator import (
    DEFAULT,
    default_folder,
    load_separator,
)
from trackformer_sb.memory import peak_memory_mb


def measure_speed(separator, seconds=10.0):
    """Separates noise, once to warm up and once to measure.

    Arguments
    ---------
    separator : Separator
        The separator.
    seconds : float
        Length of the noise, one channel at the rate of the model.

    Returns
    -------
    dict
        ``seconds`` of noise, ``real_time_factor`` (time taken per length,
        below 1 is faster than it plays) and ``peak_memory_mb`` (of the GPU,
        or of the whole process).
    """
    rate = separator.sample_rate
    noise = torch.randn(1, max(1, round(seconds * rate))).to(separator.device)
    cuda = noise.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(noise.device)
    with torch.no_grad():
        for _ in range(2):
            started = time.perf_counter()
            separator(noise)
            if cuda:
                torch.cuda.synchronize(noise.device)
            taken = time.perf_counter() - started
    return {
        "seconds": seconds,
        "real_time_factor": taken * rate / noise.shape[1],
        "peak_memory_mb": peak_memory_mb(noise.device),
    }


def card_tables(card):
    """The tables of a model card.

    Arguments
    ---------
    card : str
        Markdown, as ``HubModel`` writes it.

    Returns
    -------
    dict
        Title of the section -> dict of name -> text.

    Example
    -------
    >>> card_tables("## Test\\n\\n| | |\\n|---|---|\\n| sdr | 5.1 |\\n")
    {'Test': {'sdr': '5.1'}}
    """
    tables, title = {}, ""
    for line in card.splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 4 and cells[1].strip("-"):
            tables.setdefault(title, {})[cells[1]] = cells[2]
    return tables


def describe_model(source, device=None, seconds=10.0):
    """What a separator is, from its files and by running it.

    Arguments
    ---------
    source : str or Path
        Folder, or id on the hub.
    device : str, optional
        Where to run it; by default a GPU if there is one.
    seconds : float
        Length of the noise that it separates.

    Returns
    -------
    dict
        Plain values: sizes, rate, outputs, classes, names of the stems or
        None, what the card says of the training, and the costs.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, model or file.
    ValueError
        If it does not load.
    """
    if source == DEFAULT:
        source = default_folder()
    separator = load_separator(source, device)
    modules = dict(separator.named_children())
    state = separator.state_dict().values()
    path = Path(source, "README.md")
    if path.is_file():
        card = path.read_text("utf-8", errors="replace")
    elif Path(source).is_dir():
        card = ""
    else:
        card = ModelCard.load(source).text
    return {
        "model": str(source),
        "classes": {
            name: type(module).__name__ for name, module in modules.items()
        },
        "num_spks": separator.num_spks,
        "stems": separator.groups and list(separator.groups),
        "sample_rate": separator.sample_rate,
        "mixture_consistency": separator.mixture_consistency,
        "parameters": sum(p.numel() for p in separator.parameters()),
        "weights_mb": sum(v.numel() * v.element_size() for v in state) / 1e6,
        "card": card_tables(card),
        "device": str(separator.device),
        "threads": torch.get_num_threads(),
        **measure_speed(separator, seconds),
    }


def description_text(description):
    """A description for people.

    Arguments
    ---------
    description : dict
        Of ``describe_model``.

    Returns
    -------
    str
        A line per value.
    """
    about = description
    classes = ", ".join(about["classes"].values())
    where = about["device"]
    if where == "cpu":
        where += f", {about['threads']} threads"
    lines = [
        ("model", about["model"]),
        ("classes", classes),
        ("outputs", about["num_spks"]),
        *([("stems", ", ".join(about["stems"]))] if about["stems"] else []),
        ("rate", f"{about['sample_rate']} Hz"),
        (
            "parameters",
            f"{about['parameters']:,} ({about['weights_mb']:.1f} MB)",
        ),
        (
            "speed",
            f"{about['seconds']:g} s in "
            f"{about['real_time_factor'] * about['seconds']:.2f} s, "
            f"real-time factor {about['real_time_factor']:.3f} ({where})",
        ),
        (
            "memory",
            f"{about['peak_memory_mb']:.0f} MB at most"
            + (", the whole process" if about["device"] == "cpu" else ""),
        ),
    ]
    text = [f"{name:<12}{value}" for name, value in lines]
    for title, table in about["card"].items():
        text += ["", title]
        text += [f"  {name:<24}{value}" for name, value in table.items()]
    return "\n".join(text)
