"""What a separator is, what it can, and what it costs on this machine."""

import resource
import sys
import time
from pathlib import Path

import torch
from huggingface_hub import ModelCard

from trackformer_sb.inference.hub import model_folder
from trackformer_sb.inference.separator import load_separator


def peak_memory_mb(device):
    """The most that a GPU's tensors, else the process, took so far, in MB."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure_speed(separator, seconds=10.0):
    """Separates noise of one channel, once to warm up and once to measure.

    Returns a dict: ``seconds`` of noise, ``real_time_factor`` (time taken per
    length, below 1 is faster than it plays) and ``peak_memory_mb`` (of the
    GPU, or of the whole process).
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
    """Title -> key -> value of the tables in a model card's sections."""
    tables, title = {}, ""
    for line in card.splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 4 and cells[1].strip("-"):
            tables.setdefault(title, {})[cells[1]] = cells[2]
    return tables


def describe_model(source, device=None, seconds=10.0):
    """What a separator is, from its files, and what it costs, by running it.

    A dict of plain values. ``source`` and ``device`` are as of
    ``load_separator``, ``seconds`` is the length of noise that it separates.
    """
    separator = load_separator(source, device)
    state = separator.state_dict().values()
    card, text = model_folder(source) / "README.md", ""
    if card.is_file():
        text = card.read_text("utf-8")
    elif not Path(source).is_dir():
        text = ModelCard.load(str(source)).text
    return {
        "model": str(source),
        "classes": [type(x).__name__ for x in separator.children()],
        "num_spks": separator.num_spks,
        "stems": separator.groups and list(separator.groups),
        "sample_rate": separator.sample_rate,
        "mixture_consistency": separator.mixture_consistency,
        "parameters": sum(p.numel() for p in separator.parameters()),
        "weights_mb": sum(v.numel() * v.element_size() for v in state) / 1e6,
        "device": str(separator.device),
        "threads": torch.get_num_threads(),
        **measure_speed(separator, seconds),
        "card": card_tables(text),
    }


def description_text(description):
    """A description of ``describe_model`` for people, a line per value."""
    lines = []
    for name, value in description.items():
        if isinstance(value, dict):
            lines += ["", name, *description_text(value).splitlines()]
        elif value is not None:
            if isinstance(value, list):
                value = ", ".join(value)
            elif isinstance(value, float):
                value = f"{value:.3g}"
            lines.append(f"{name:<24}{value}")
    return "\n".join(lines)
