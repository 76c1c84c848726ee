"""What the benchmarks share: fair timing, peak memory, and their record.

Candidates are timed in one process with interleaved repetitions, so that
whatever else the machine does falls on all of them alike; medians are
reported. Memory is measured in a fresh process for each candidate, since an
allocator keeps what an earlier candidate made it take.
"""

import argparse
import gc
import math
import multiprocessing
import pathlib
import re
import resource
import statistics
import sys
import time

import torch
from machine import Load, machine


def say(*words, sep=" "):
    """Prints progress at once, also into a pipe."""
    print(*words, sep=sep, flush=True)


def synchronise(device):
    """Waits for the GPU, whose calls return before they are done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(call, device):
    """Seconds that a call takes."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def interleave(calls, repetitions, device):
    """Times several calls turn by turn.

    Arguments
    ---------
    calls : dict
        Name -> callable.
    repetitions : dict
        Name -> how often; the rarer ones are spread over the turns.
    device : str
        Where the calls compute.

    Returns
    -------
    dict
        Name -> list of seconds.
    """
    seconds = {name: [] for name in calls}
    turns = max(repetitions.values(), default=0)
    for turn in range(turns):
        for name, call in calls.items():
            number = repetitions[name]
            if (turn + 1) * number // turns > turn * number // turns:
                seconds[name].append(timed(call, device))
    return seconds


def spread(seconds):
    """Median, smallest and largest time as text, in ms."""
    middle, low, high = (
        1e3 * f(seconds) for f in (statistics.median, min, max)
    )
    digits = 1 if middle >= 5 else 3
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def exponent(lengths, values):
    """The p of the power law ``value = c * length ** p`` that fits best.

    Least squares of the logarithms.

    Example
    -------
    >>> exponent([1, 2, 4], [3, 12, 48])
    2.0
    """
    fit = statistics.linear_regression(
        [math.log(x) for x in lengths], [math.log(y) for y in values]
    )
    return round(fit.slope, 3)


def _status():
    """Memory of this process in MB, from Linux; empty elsewhere."""
    try:
        text = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return {}
    return {
        key: int(kib) / 2**10
        for key, kib in re.findall(r"^(Vm\w+):\s+(\d+) kB", text, re.M)
    }


def peak_extra_mb(call, device):
    """How much more memory was in use at most during a call, in MB.

    On a GPU what the allocator handed out. On a CPU the largest resident set
    during the call (VmHWM, set back before) minus that before it. ru_maxrss
    is the same figure where the kernel knows no VmHWM; a child process starts
    with the ru_maxrss of its parent, which hides anything smaller.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronise(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass  # then the peak so far counts as what was there before
    before = _peak_mb()
    call()
    return _peak_mb() - before


def _peak_mb():
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    in_mb = 2**20 if sys.platform == "darwin" else 2**10
    return _status().get("VmHWM", usage / in_mb)


def free_cache(device):
    """Gives back what the GPU's allocator keeps, for processes beside it."""
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def limit_of(limit_gb, device):
    """The limit in GB, on a GPU no more than the card has."""
    if torch.device(device).type != "cuda":
        return limit_gb
    total = torch.cuda.get_device_properties(device).total_memory
    return min(limit_gb, total / 2**30)


def limit_memory(limit_gb, device):
    """Makes the process fail rather than take more than this beyond now.

    On a GPU beyond nothing: what the process holds counts too.
    """
    if torch.device(device).type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = limit_of(limit_gb, device) * 2**30 / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        return
    limit = int((_status().get("VmSize", 0) + 1024 * limit_gb) * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def in_fresh_process(function, *args, timeout=None):
    """Calls a top-level function in a process of its own.

    Returns
    -------
    result
        What it returned, None if it did not.
    reason : str or None
        Why there is no result: "out of memory", "over ... s", or a package
        that is not installed.

    Raises
    ------
    RuntimeError
        If it failed for another reason.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return None, f"over {timeout:g} s"
        outcome, value = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode >= 0:
            raise RuntimeError("see the error of the process above") from None
        # bad_alloc in a library ends the process by a signal
        return None, f"out of memory (signal {-process.exitcode})"
    finally:
        process.kill()
        process.join()
    if outcome == "result":
        return value, None
    if outcome == "missing":
        return None, value
    if "memory" in value.lower():
        return None, "out of memory"
    raise RuntimeError(value)


def _call(sender, function, args):
    try:
        sender.send(("result", function(*args)))
    except ImportError as error:
        sender.send(("missing", str(error)))
    except (RuntimeError, MemoryError) as error:
        sender.send(("error", f"{type(error).__name__}: {error}"))


def command_line():
    """The command that runs; of absolute paths only the last part."""
    words = ["python", *sys.argv]
    here = pathlib.Path.cwd()
    for i, word in enumerate(words):
        key, equals, value = word.rpartition("=")
        path = pathlib.Path(value)
        if path.is_absolute():
            inside = path.is_relative_to(here)
            short = path.relative_to(here) if inside else f".../{path.name}"
            words[i] = f"{key}{equals}{short}"
    return " ".join(words)


def table(header, rows):
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, x)) + " |" for x in lines)


def verdict(what, measured, target, higher_is_better=True):
    """One line that says whether a target is met."""
    met = measured >= target if higher_is_better else measured <= target
    bound = "at least" if higher_is_better else "at most"
    return (
        f"- {what}: {measured:.3g}, target {bound} {target:g}: "
        f"{'met' if met else 'MISSED'}"
    )


class Record:
    """The markdown file of a benchmark; make it before anything is measured.

    Arguments
    ---------
    title : str
        Heading.
    how : str
        What is measured and how, a paragraph or more.
    output : path
        The file.
    device : str
        cpu or cuda.
    """

    def __init__(self, title, how, output, device):
        self.title, self.how, self.device = title, how.strip(), device
        self.output = pathlib.Path(output)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.load = Load()

    def write(self, *blocks):
        """Writes all there is so far; call it again as there is more."""
        parts = [
            f"# {self.title}",
            f"    {command_line()}",
            self.how,
            "\n".join(
                [
                    f"- {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC",
                    *machine(self.device),
                    *self.load.lines(),
                ]
            ),
            *blocks,
        ]
        text = "\n\n".join(parts) + "\n"
        self.output.write_text(text, encoding="utf-8")


def new_parser(doc, name):
    """A parser with the arguments of every benchmark."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--device",
        # SpeechBrain warns of "cuda" without a number
        type=lambda name: "cuda:0" if name == "cuda" else name,
        default="cpu",
        help="cpu or cuda (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        help=f"the record to write (default: benchmarks/results/{name}.md, on "
        "a GPU in a folder there with its name)",
    )
    parser.set_defaults(record=name)
    return parser


def parse_args(parser):
    """Parses, and says where the record goes; of ``new_parser``."""
    args = parser.parse_args()
    if args.output is None:
        folder = pathlib.Path("benchmarks/results")
        # a CPU's record stays beside it
        if torch.device(args.device).type == "cuda":
            gpu = torch.cuda.get_device_name(args.device).lower()
            folder /= re.sub(r"[^a-z0-9]+", "-", gpu).strip("-")
        dtype = getattr(args, "dtype", "float32")
        kind = "" if dtype == "float32" else f"_{dtype}"
        args.output = folder / f"{args.record}{kind}.md"
    return args
