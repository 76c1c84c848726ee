"""On what machine a benchmark runs, and what else that does meanwhile."""

import os
import pathlib
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version

import torch


def _processor():
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*: (.*)$", text, re.M)
    return found[1] if found else platform.processor()


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver():
    """Version of NVIDIA's driver, from Linux; "unknown" elsewhere."""
    try:
        path = pathlib.Path("/proc/driver/nvidia/version")
        text = path.read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", text)
    return found[1] if found else "unknown"


def machine(device):
    """Processor, memory, GPU and versions, as lines of markdown."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [
        f"- CPU: {_processor()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads used; memory {memory:.0f} GB"
    ]
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        lines.append(
            f"- GPU: {gpu.name}, {gpu.total_memory / 2**30:.0f} GB, driver "
            f"{_driver()}, CUDA {torch.version.cuda}; where float32 is "
            "multiplied, TF32 in matrix products "
            f"{torch.backends.cuda.matmul.allow_tf32}, in convolutions "
            f"{torch.backends.cudnn.allow_tf32}"
        )
    packages = (
        "torch",
        "speechbrain",
        "asteroid",
        "performer-pytorch",
        "demucs",
        "openunmix",
    )
    lines.append(
        f"- Python {platform.python_version()}, "
        + ", ".join(f"{name} {_version(name)}" for name in packages)
        + f"; computed on {device}"
    )
    return lines


class Load:
    """What else the machine does while a benchmark runs."""

    def __init__(self):
        self.before = self._averages()
        self.started = self._seconds()

    def _averages(self):
        text = " ".join(f"{load:.2f}" for load in os.getloadavg())
        try:
            loads = pathlib.Path("/proc/loadavg").read_text(encoding="ascii")
        except OSError:
            return text
        return f"{text}, {loads.split()[3].split('/')[0]} runnable"

    def _seconds(self):
        """Clock, this benchmark's and all processor seconds."""
        try:
            first = pathlib.Path("/proc/stat").read_text(encoding="ascii")
        except OSError:
            return None
        # user nice system idle iowait irq softirq
        ticks = [int(word) for word in first.split()[1:8]]
        busy = sum(ticks) - ticks[3] - ticks[4]
        own = sum(os.times()[:4])
        return time.monotonic(), own, busy / os.sysconf("SC_CLK_TCK")

    def lines(self):
        """Load before and after, as lines of markdown."""
        lines = [
            f"- load averages (1, 5, 15 minutes) before: {self.before}; "
            f"now: {self._averages()} (this benchmark included)"
        ]
        now = self._seconds()
        if self.started and now:
            elapsed, own, busy = (
                b - a for a, b in zip(self.started, now, strict=True)
            )
            other = max(0.0, (busy - own) / max(elapsed, 1e-9))
            lines.append(
                f"- over {elapsed / 60:.1f} minutes, other processes used "
                f"{other:.2f} cores on average"
            )
        return lines
