"""What a separator is, what it can, and what it costs on this machine."""

import time

import torch

from trackformer_sb.inference.card import card_tables
from trackformer_sb.inference.download import model_file
from trackformer_sb.inference.loading import load_separator
from trackformer_sb.inference.separator import resolved
from trackformer_sb.memory import peak_memory_mb


def measure_speed(separator, seconds=10.0):
    """Separates noise, once to warm up and once to measure.

    Arguments
    ---------
    separator : PerformerSeparation
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
    rate = separator.hparams.sample_rate
    noise = torch.randn(1, max(1, round(seconds * rate))).to(separator.device)
    cuda = noise.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(noise.device)
    with torch.no_grad():
        for _ in range(2):
            started = time.perf_counter()
            separator.separate_batch(noise)
            if cuda:
                torch.cuda.synchronize(noise.device)
            taken = time.perf_counter() - started
    return {
        "seconds": seconds,
        "real_time_factor": taken * rate / noise.shape[1],
        "peak_memory_mb": peak_memory_mb(noise.device),
    }


def describe_model(source, device=None, seconds=10.0, trust_yaml=False):
    """What a separator is, from its files and by running it.

    Arguments
    ---------
    source : str or Path
        Folder, or id on the hub.
    device : str, optional
        Where to run it; by default a GPU if there is one.
    seconds : float
        Length of the noise that it separates.
    trust_yaml : bool
        Of ``load_separator``.

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
    source = resolved(source)
    separator, loaded_from = load_separator(source, device, trust_yaml)
    modules = dict(separator.mods.items())
    parameters = [p for module in modules.values() for p in module.parameters()]
    state = [
        value
        for module in modules.values()
        for value in module.state_dict().values()
    ]
    try:
        path = model_file(source, "README.md")
        card = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        card = ""
    return {
        "model": str(source),
        "loaded_from": loaded_from,
        "classes": {
            name: type(module).__name__ for name, module in modules.items()
        },
        "num_spks": separator.hparams.num_spks,
        "stems": separator.groups and list(separator.groups),
        "sample_rate": separator.hparams.sample_rate,
        "mixture_consistency": getattr(
            separator.hparams, "mixture_consistency", False
        ),
        "parameters": sum(p.numel() for p in parameters),
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
        ("model", f"{about['model']} ({about['loaded_from']})"),
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
