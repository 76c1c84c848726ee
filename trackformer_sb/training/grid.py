"""The paper's experiment: a grid of models, segment lengths and losses.

A cell is a run of recipes/train.py in a process of its own, so that one that
runs out of memory takes nothing else down. When it has ended there is a
``cell.json`` in its folder; a cell without one is run, or goes on from its last
checkpoint. Nothing here imports torch, the memory is the cells'.
"""

import fcntl
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

from trackformer_sb.training.grid_tables import (
    SHOWN,
    markdown,
    read_json,
    records,
    write_figures,
    write_tables,
)

# SpeechBrain's run options that make sense for every cell: to ask SpeechBrain
# for them would import torch
RUN_OPTIONS = (
    "precision",
    "eval_precision",
    "grad_accumulation_factor",
    "max_grad_norm",
    "compile",
    "ckpt_interval_minutes",
    "noprogressbar",
)
# What a pre-training has in common with the separators that take its encoder.
SHARED_KEYS = (
    "music",
    "num_workers",
    "matmul_precision",
    "sample_rate",
    "n_fft",
    "hop_length",
    "num_layers",
    "d_model",
    "nhead",
    "n_features",
    "dropout",
)
# of each model its yaml, and the overrides it takes beside those of all cells
YAMLS = {
    "performer_mae": ("performer_mixit_mae.yaml", "performer"),
    "performer": ("performer_mixit.yaml", "performer"),
    "convtasnet": ("convtasnet_mixit.yaml", "convtasnet"),
    "asteroid_convtasnet": (
        "asteroid_convtasnet_mixit.yaml",
        "asteroid_convtasnet",
    ),
}
GROUPS = ("performer", "convtasnet", "asteroid_convtasnet", "mae")
# with the auxiliary losses the weights are those of the yaml
MIXIT_ALONE = dict.fromkeys(
    ("lambda_diversity", "lambda_sparsity", "lambda_mask_count"), 0
)
BUDGETS = {
    "epochs": "epochs, less where early stopping ends them",
    "steps": "optimizer steps, without early stopping",
    "minutes": "minutes of training, without early stopping",
}
DEMO_SONGS, PROBED_SONGS = 60, 12  # of the demo band, and for a dry run
DEMO_SECONDS = 30.0  # a song of it holds the paper's longest segment
PROBE_BATCHES = 8
ENDLESS = 1_000_000  # epochs, where steps are the budget
OUT_OF_MEMORY = re.compile(
    "out of memory|can(?:not|'t) allocate memory|MemoryError|bad_alloc",
    re.IGNORECASE,
)


class Job(NamedTuple):
    """One run: a cell, or the pre-training before them."""

    name: str  # its folder in the grid's
    group: str  # of GROUPS, whose overrides it takes
    yaml: Path
    overrides: dict  # the user's
    keys: dict  # the grid's own, which count more
    budget: tuple  # epochs, steps or minutes, and how many
    settings: dict  # what cells of one table have in common, in words

    @property
    def seconds(self):
        """Length of a segment."""
        return float({**self.overrides, **self.keys}.get("segment_seconds", 3))

    @property
    def accumulation(self):
        """Batches of an optimizer step."""
        return int(self.overrides.get("grad_accumulation_factor", 1))


class Ended(Exception):
    """A process that did not end well: its status, and the reason."""


def outcome(code, lines):
    """What became of a process: done, oom or failed, and why.

    Arguments
    ---------
    code : int
        Its exit status, negative for the signal that ended it.
    lines : list of str
        The end of what it said.

    Example
    -------
    >>> outcome(1, ["Traceback", "RuntimeError: CUDA out of memory."])
    ('oom', 'RuntimeError: CUDA out of memory.')
    """
    if code == 0:
        return "done", None
    said = [line.strip() for line in lines if line.strip()]
    for line in reversed(said):
        if OUT_OF_MEMORY.search(line):
            return "oom", line
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "oom", "killed, as a system short of memory does it"
    return "failed", said[-1] if said else f"exit status {code}"


def visible_devices():
    """Devices to train on: all GPUs that torch sees, else the CPU."""
    code = "import torch; print(torch.cuda.device_count())"
    command = [sys.executable, "-c", code]
    count = int(subprocess.check_output(command, text=True))
    return [f"cuda:{number}" for number in range(count)] or ["cpu"]


def free_memory_gb():
    """Memory that is free for new processes; None where not Linux tells it."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    return int(re.search(r"MemAvailable:\s+(\d+)", path.read_text())[1]) / 2**20


def write_json(path, content):
    """Replaces a file as a whole."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=2), "utf-8")
    os.replace(unfinished, path)


def _in_words(keys):
    """As on a command line, without the folders that are this machine's."""
    words = " ".join(
        f"--{key}={Path(value).name if os.path.isabs(value) else value}"
        for key, value in sorted(keys.items())
    )
    return words and f"`{words}`"


def _budget_text(budget):
    unit, number = budget
    return f"{number:g} {BUDGETS[unit]}"


class Grid:
    """All cells of the experiment, and how they are run.

    Arguments
    ---------
    recipes : pathlib.Path
        Folder of train.py and pretrain.py; their yamls are in hparams beside.
    options : argparse.Namespace
        The options of recipes/reproduce.py.
    overrides : dict
        Group of GROUPS, or "" for all cells -> key -> value.

    Raises
    ------
    ValueError
        For data without a folder, or keys that a yaml has not.
    FileNotFoundError
        For a folder or a yaml that is not there.
    """

    def __init__(self, recipes, options, overrides):
        self.recipes, self.options, self.overrides = recipes, options, overrides
        self.folder, demo = options.output_folder, options.dataset == "demo"
        names = ("dataset", "data_folder", "test_dataset", "test_folder")
        data = {name: getattr(options, name) for name in (*names, "seed")}
        self.data = {k: str(v) for k, v in data.items() if v is not None}
        self.settings = {"Data": _in_words(self.data)}
        if not demo and not options.data_folder:
            raise ValueError(
                "--data_folder: expected a folder of music with --dataset="
                f"{options.dataset}, got none"
            )
        for name in ("data_folder", "test_folder", "pretrained_encoder"):
            folder = getattr(options, name)
            made = demo and name == "data_folder"
            if folder and not made and not folder.is_dir():
                raise FileNotFoundError(f"--{name}: no folder {folder}")
        # one band for all, of longer songs than the recipes make
        self.band = demo and (options.data_folder or self.folder / "demo_band")
        if demo:
            self.data |= {"dataset": "stems", "data_folder": self.band}
        own = "performer_mae" in options.models
        own = own and not options.pretrained_encoder
        self.pretrain = self._pretraining() if own else None
        self.cells = [
            self._cell(model, length, loss)
            for length in dict.fromkeys(options.lengths)
            for loss in dict.fromkeys(options.losses)
            for model in dict.fromkeys(options.models)
        ]
        self.jobs = [self.pretrain] * own + self.cells
        self.over = ("done",) if options.retry_oom else ("done", "oom")
        self.devices = options.devices or visible_devices()
        cpus = sum(not device.startswith("cuda") for device in self.devices)
        self.memory_gb, free = options.memory_gb, free_memory_gb()
        if cpus and free and not self.memory_gb:
            # the system must have no reason to kill others
            self.memory_gb = round(0.9 * free / cpus, 2)
        self.environment = dict(os.environ)
        if cpus > 1:
            threads = str(max(1, (os.cpu_count() or 1) // cpus))
            self.environment["OMP_NUM_THREADS"] = threads
        self.lock, self.probing = threading.Lock(), threading.Lock()
        self.children, self.stopping, self.claim = [], False, None

    def _cell(self, model, length, loss):
        yaml, group = YAMLS[model]
        overrides = {**self.overrides[""], **self.overrides[group]}
        keys = {**self.data, "segment_seconds": f"{length:g}"}
        settings = {"Budget of a cell": _budget_text(self.options.budget)}
        if loss == "mixit":
            keys |= MIXIT_ALONE
        if model == "performer_mae":
            given = self.options.pretrained_encoder
            made = self.folder / "pretrain" / "encoder"
            keys["pretrained_encoder"] = given or made
            settings["Pre-trained encoder"] = given.name if given else ""
        budget, name = self.options.budget, f"{model}/{length:g}s/{loss}"
        return self._job(name, group, yaml, overrides, keys, budget, settings)

    def _pretraining(self):
        yaml, plain = self.options.pretrain_yaml, self.overrides[""]
        budget = self.options.pretrain_budget or self.options.budget
        # the encoder must fit the separators
        both = {**plain, **self.overrides["performer"]}
        if "MaskNet" in both and "Features" not in self.overrides["mae"]:
            raise ValueError(
                "--performer.MaskNet: expected --mae.Features, with the same "
                "sizes, beside it"
            )
        overrides = {
            **{key: both[key] for key in both if key in SHARED_KEYS},
            **{key: plain[key] for key in plain if key in RUN_OPTIONS},
            **self.overrides["mae"],
        }
        settings = {"Pre-training": f"{yaml}, {_budget_text(budget)}"}
        return self._job(
            "pretrain", "mae", yaml, overrides, self.data, budget, settings
        )

    def _job(self, name, group, yaml, overrides, keys, budget, settings):
        yaml = self.recipes.parent / "hparams" / yaml
        known = {*re.findall(r"^(\w+):", yaml.read_text("utf-8"), re.M)}
        # without the auxiliary losses their weights are of no concern
        known = (known | {*RUN_OPTIONS}) - (keys.keys() - MIXIT_ALONE.keys())
        for key in overrides.keys() - known:
            raise ValueError(
                f"expected keys of hparams/{yaml.name} that the grid does not "
                f"set by an option of its own, for {name}, got --{key}. For "
                f"some models only: --performer.{key}, --convtasnet.{key} ..."
            )
        settings |= self.settings
        settings[f"Overrides of {group}"] = _in_words(overrides)
        return Job(name, group, yaml, overrides, keys, budget, settings)

    def _check_settings(self):
        """Keeps runs of different settings out of one table."""
        asked = {}
        for job in self.jobs:
            asked |= job.settings
        for path, record in records(self.folder).items():
            differ = [
                f"{name}: expected {words}, got {asked[name]}"
                for name, words in record["settings"].items()
                if asked.get(name, words) != words
            ]
            if differ and record["status"] in self.over:
                raise ValueError(
                    f"{path} was run with other settings; choose another "
                    f"--output_folder, or those. {'; '.join(differ)}"
                )

    def _make_band(self, folder, songs):
        # slow to import, and not needed with other music
        from trackformer_sb.data.band import make_band

        print(f"demo band: {folder}", flush=True)
        rate = int(self.overrides[""].get("sample_rate", 44100))
        make_band(folder, songs, DEMO_SECONDS, sample_rate=rate)

    def status(self, job):
        """What became of a job; None before it ended."""
        return read_json(self.folder / job.name / "cell.json").get("status")

    def command(self, job, **more):
        """The command line of a job; more keys count instead of its own."""
        script = "pretrain.py" if job.name == "pretrain" else "train.py"
        keys = {**job.overrides, **job.keys}
        keys |= {"output_folder": self.folder / job.name, **more}
        words = [sys.executable, self.recipes / script, job.yaml]
        words += [f"--{key}={value}" for key, value in keys.items()]
        return [*map(str, words), "--noprogressbar"]

    def _limit_gb(self, device):
        return None if device.startswith("cuda") else self.memory_gb

    def _execute(self, command, log, device):
        """Runs a command, or raises Ended."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as file:
            print("$", shlex.join(command), file=file, flush=True)
            with self.lock:
                if self.stopping:
                    raise Ended("failed", "stopped")
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    # the folder stays claimed as long as a run writes to it
                    pass_fds=[self.claim.fileno()] if self.claim else (),
                )
                self.children.append(process)
        limit = int((self._limit_gb(device) or 0) * 2**30)
        if limit and hasattr(resource, "prlimit"):
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))
        code = process.wait()
        said = log.read_text("utf-8", errors="replace").splitlines()
        status, reason = outcome(code, said[1:][-50:])
        if status != "done":
            raise Ended(status, reason)

    def _probe(self, job, device, folder, batches, **more):
        """The metrics.json of a few batches, the first of which warms up."""
        keys = {"debug_batches": batches, "debug_epochs": 1, **more}
        keys |= {"output_folder": folder, "device": device}
        command = [*self.command(job, **keys), "--debug"]
        self._execute(command, folder / "console.txt", device)
        return read_json(folder / "debug" / "metrics.json")

    def _steps(self, job, step_seconds):
        """Optimizer steps of a budget; None where it is in epochs."""
        unit, number = job.budget
        if unit == "minutes":
            batches = number * 60 / step_seconds
            return max(1, int(batches / job.accumulation))
        return number if unit == "steps" else None

    def _step_seconds(self, job, device):
        """What a batch takes, measured once for all cells of one network."""
        kind, words = device.split(":")[0], _in_words(job.overrides)
        network = f"{job.group} {job.seconds:g}s {words} on {kind}"
        with self.probing:
            path = self.folder / "probes.json"
            known = read_json(path)
            if network not in known:
                folder = self.folder / job.name / "probe"
                metrics = self._probe(job, device, folder, PROBE_BATCHES)
                shutil.rmtree(folder)
                known[network] = metrics["step_seconds"]
                write_json(path, known)
        return known[network]

    def _train(self, job, device):
        """Runs a job, or raises Ended; returns its steps, if those count."""
        needs = self.pretrain and "pretrained_encoder" in job.keys
        if needs and self.status(self.pretrain) != "done":
            status = self.status(self.pretrain)
            raise Ended("failed", f"no encoder: pretrain is {status}")
        timed = job.budget[0] == "minutes"
        seconds = self._step_seconds(job, device) if timed else None
        steps = self._steps(job, seconds)
        keys = {"number_of_epochs": job.budget[1]}
        if steps is not None:
            keys = {"number_of_epochs": ENDLESS, "early_stop_epochs": ENDLESS}
            keys["optimizer_step_limit"] = steps
        command = self.command(job, **keys, device=device)
        log = self.folder / job.name / "console.txt"
        self._execute(command, log, device)
        return steps

    def _work(self, device, left):
        """Runs jobs on one device until there are none left."""
        for job in left:
            number = f"[{self.jobs.index(job) + 1}/{len(self.jobs)}]"
            print(f"{number} {job.name}: started on {device}", flush=True)
            begun, steps = time.monotonic(), None
            try:
                steps = self._train(job, device)
                status, reason = "done", None
            except Ended as ended:
                status, reason = ended.args
            if self.stopping and status != "done":
                return  # to go on with, whatever it said
            record = {
                "status": status,
                "reason": reason,
                "steps": steps,
                "memory_gb": self._limit_gb(device),
                "settings": job.settings,
            }
            folder = self.folder / job.name
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "cell.json", record)
            with self.lock:
                write_tables(self.folder)
            words = f"after {(time.monotonic() - begun) / 60:.1f} minutes"
            words += f" ({reason}), see {folder}" if reason else ""
            status = SHOWN.get(status, status)
            print(f"{number} {job.name}: {status} {words}", flush=True)

    def _run_jobs(self, jobs):
        """Runs what is left of jobs, one at a time on each device."""
        left = iter([job for job in jobs if self.status(job) not in self.over])
        with futures.ThreadPoolExecutor(len(self.devices)) as pool:
            workers = [pool.submit(self._work, x, left) for x in self.devices]
            try:
                for worker in futures.as_completed(workers):
                    worker.result()
            except BaseException:  # Ctrl-C, or a full disk
                with self.lock:
                    self.stopping = True
                for process in self.children:
                    process.terminate()
                raise

    def run(self):
        """Runs all that is not done, and writes the tables.

        Returns
        -------
        list of str
            Names of what failed.

        Raises
        ------
        ValueError
            If cells were run with other settings, or a process runs the grid.
        """
        self._check_settings()
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w", encoding="utf-8") as self.claim:
            try:
                fcntl.flock(self.claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    "--output_folder: another process runs the grid in "
                    f"{self.folder}; wait for it, or name another folder"
                ) from None
            if self.band:
                self._make_band(self.band, DEMO_SONGS)
            if self.pretrain:
                self._run_jobs([self.pretrain])
            self._run_jobs(self.cells)
            write_figures(self.folder)
        return [job.name for job in self.jobs if self.status(job) == "failed"]

    def dry_run(self):
        """Prints the cells, and about what they would take.

        One step of each network is measured, at its shortest segments. A step
        is taken to grow with the length, an epoch to take as long.

        Returns
        -------
        list of str
            Names of what failed.
        """
        self._check_settings()
        # the encoder is still to be made
        more = {"pretrained_encoder": "null"} if self.pretrain else {}
        probes, songs = {}, 1.0
        with tempfile.TemporaryDirectory(
            prefix="reproduce_", ignore_cleanup_errors=True
        ) as temporary:
            if self.band:
                more["data_folder"] = Path(temporary, "demo_band")
                songs = DEMO_SONGS / PROBED_SONGS
                self._make_band(more["data_folder"], PROBED_SONGS)
            for job in sorted(self.jobs, key=lambda job: job.seconds):
                if job.group in probes:
                    continue
                keys = {k: more[k] for k in more.keys() & job.keys.keys()}
                folder = Path(temporary, job.group)
                try:
                    found = self._probe(job, self.devices[0], folder, 2, **keys)
                except Ended as ended:
                    found = ended
                probes[job.group] = job.seconds, found
        rows, failed, total = [], [], 0.0
        for job in self.jobs:
            shortest, found = probes[job.group]
            budget = "{1:g} {0}".format(*job.budget)
            if isinstance(found, Ended):
                status, reason = found.args
                failed += [job.name] if status == "failed" else []
                rows.append((job.name, budget, SHOWN.get(status, status), None))
                print(f"{job.name}: {reason}")
                continue
            longer = job.seconds / shortest
            seconds = found["step_seconds"] * longer
            steps = self._steps(job, seconds)
            if steps is None:
                batches = job.budget[1] * found["batches"] * songs / longer
            else:
                batches = steps * job.accumulation
            rows.append((job.name, budget, seconds, batches * seconds / 60))
            total += batches * seconds / 60
        rows.append((f"{len(self.jobs)} runs", "", None, total))
        print(markdown(("run", "budget", "batch (s)", "minutes"), rows))
        return failed
