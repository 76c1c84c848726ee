"""Runs what is left of a grid, and keeps what came of it.

Each cell has a ``cell.json``: what was run, how it ended, and for how long. A
grid that was stopped, or killed, goes on where it was.
"""

import contextlib
import datetime
import json
import shlex
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from trackformer_sb.training import grid_report
from trackformer_sb.training.grid import DEMO_SECONDS
from trackformer_sb.training.grid_checks import (
    check_configuration,
    check_encoder,
)
from trackformer_sb.training.grid_processes import Probes, Processes, locked
from trackformer_sb.training.grid_tables import read_json
from trackformer_sb.training.keys import MAY_CHANGE

DEMO_SONGS = 60
MAKE_BAND = """
import sys
from trackformer_sb.data.band import make_band
folder, songs, seconds, rate = sys.argv[1:]
make_band(folder, int(songs), float(seconds), sample_rate=int(rate))
"""


def write_json(path, content):
    """Replaces a file as a whole."""
    grid_report.write_text(path, json.dumps(content, indent=2))


def settings(words):
    """Keys of a command line that decide whether a training can go on."""
    pairs = [word[2:].split("=", 1) for word in words if "=" in word]
    changing = (*MAY_CHANGE, "device", "optimizer_step_limit")
    return {key: value for key, value in pairs if key not in changing}


def set_aside(folder):
    """Renames a folder, so that another can take its place."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}_{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


class Runner:
    """Runs what is left of a grid.

    Arguments
    ---------
    grid : Grid
        What to run.
    devices : sequence of str
        As many trainings run at once, each on its own entry.
    retry_oom : bool
        Whether to run again what ran out of memory.
    """

    def __init__(self, grid, devices=("cpu",), retry_oom=False):
        self.grid, self.devices, self.retry_oom = grid, devices, retry_oom
        self.processes = Processes(devices, grid.memory_gb)
        self.probes = Probes(self.processes, grid.folder)
        self.change = threading.Condition()
        self.waiting, self.running, self.error = [], [], None

    def make_band(self, folder, log):
        """Makes the demo band that all trainings share."""
        print(f"demo band: {folder}", flush=True)
        rate = self.grid.band_sample_rate()
        arguments = map(str, (folder, DEMO_SONGS, DEMO_SECONDS, rate))
        command = [sys.executable, "-c", MAKE_BAND, *arguments]
        status, reason = self.processes.execute(command, log)
        if status in ("failed", "oom"):
            raise ValueError(f"no demo band in {folder}, {status}: {reason}")

    def steps_in_time(self, job, step_seconds):
        """Optimizer steps that a job's minutes are enough for, at least 1."""
        seconds = step_seconds * job.batches_per_step()
        return max(1, int(job.budget[1] * 60 / seconds))

    def knows_cost(self, job, record):
        """Whether a record has a probe of this job, as its network is now."""
        measured = record.get("probe", {}).get("of", "")
        return measured.startswith(f"{job.network} on ")

    def train(self, job, device, record):
        """Trains one job.

        Returns
        -------
        dict
            What there is to add to its record.
        """
        unit, number = job.budget
        # those of an earlier attempt may be of another budget
        record.pop("steps", None)
        if unit == "steps":
            record["steps"] = number
        elif unit == "minutes":
            if not self.knows_cost(job, record):
                status, reason, probe = self.probes.shared(job, device)
                if status != "done":
                    return {"status": status, "reason": reason}
                record["probe"] = probe
            cost = record["probe"]["step_seconds"]
            record["steps"] = self.steps_in_time(job, cost)
        keys = job.budget_keys(record.get("steps"))
        command = job.command(**keys, device=device)
        record["command"] = shlex.join(command)
        write_json(job.folder / "cell.json", record)
        status, reason = self.processes.execute(
            command, job.log, record["memory_gb"]
        )
        if status != "done":
            # its metrics.json may be half written
            return {"status": status, "reason": reason}
        metrics = read_json(job.output_folder / "metrics.json")
        if not metrics:
            return {"status": "failed", "reason": "it left no metrics.json"}
        step_seconds = metrics.get("step_seconds")
        return {"status": status, "reason": None, "step_seconds": step_seconds}

    def has_other_settings(self, job, record):
        """Whether a job left checkpoints that it cannot go on with."""
        if not any(job.output_folder.glob("save/CKPT*")):
            return False
        before = settings(shlex.split(record.get("command", "")))
        return bool(before) and before != settings(job.command())

    def needs(self, job):
        """Jobs that have to end before another one begins."""
        own = self.grid.pretrain
        return [own] if own and job.name.startswith("performer_mae/") else []

    def run_job(self, job, device, number):
        """Runs one job and keeps its record."""
        path = job.folder / "cell.json"
        record = read_json(path)
        if self.has_other_settings(job, record):
            record = {}
            aside = set_aside(job.output_folder)
            print(f"{number} {job.name}: begun anew, before: {aside}")
        record |= {"status": "running", "reason": None, "device": device}
        record["started"] = datetime.datetime.now().isoformat("T", "seconds")
        record["memory_gb"] = self.processes.limit_gb(device)
        job.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        print(f"{number} {job.name}: started on {device}", flush=True)
        begun = time.monotonic()
        failed = [
            needed
            for needed in self.needs(job)
            if self.status(needed) != "done"
        ]
        if failed:
            found = {
                "status": "failed",
                "reason": f"no encoder: {failed[0].name} is "
                f"{self.status(failed[0])}, see {failed[0].log}",
            }
        else:
            found = self.train(job, device, record)
        seconds = time.monotonic() - begun
        record |= found
        record["seconds"] = record.get("seconds", 0.0) + seconds
        write_json(path, record)
        if record["status"] == "running":
            return
        done = record["status"] == "done"
        metrics = read_json(job.output_folder / "metrics.json") if done else {}
        with self.change:
            left = len(self.waiting) + len(self.running) - 1
            grid_report.write_tables(self.grid.folder)
        words = grid_report.summary(record, metrics)
        print(f"{number} {job.name}: {words}; {left} left", flush=True)

    def status(self, job):
        """What became of a job so far; None before it was begun."""
        return read_json(job.folder / "cell.json").get("status")

    def next_job(self):
        """The next job whose needs are met; None if there is none left."""
        with self.change:
            while self.waiting and not self.processes.stopping:
                for job in self.waiting:
                    needs = self.needs(job)
                    busy = [*self.waiting, *self.running]
                    if not any(needed in busy for needed in needs):
                        self.waiting.remove(job)
                        self.running.append(job)
                        return job
                self.change.wait()
        return None

    def work(self, device):
        """Runs jobs on one device until there are none."""
        total = len(self.grid.jobs)
        while (job := self.next_job()) is not None:
            number = f"[{self.grid.jobs.index(job) + 1}/{total}]"
            try:
                self.run_job(job, device, number)
            except BaseException as error:
                # of the grid itself, such as a full disk
                self.error = error
                self.stop()
            finally:
                with self.change:
                    self.running.remove(job)
                    self.change.notify_all()

    def stop(self):
        """Ends all; the same grid goes on from there."""
        self.processes.stop()
        with self.change:
            self.change.notify_all()

    @contextlib.contextmanager
    def stoppable(self):
        """On Ctrl-C or SIGTERM ends all processes before it ends itself."""
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield
        except KeyboardInterrupt:
            print("stopping", flush=True)
            self.stop()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    def run(self):
        """Runs all that is not done.

        Returns
        -------
        list of Job
            Those that failed.

        Raises
        ------
        ValueError
            If the folder holds another grid, or a process runs this one.
        KeyboardInterrupt
            After Ctrl-C or SIGTERM, when all processes have ended.
        """
        folder, jobs = self.grid.folder, self.grid.jobs
        check_encoder(self.grid)
        check_configuration(self.grid, self.retry_oom)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            config = check_configuration(self.grid, self.retry_oom)
            write_json(folder / "grid.json", config)
            over = ("done",) if self.retry_oom else ("done", "oom")
            self.waiting = [job for job in jobs if self.status(job) not in over]
            if len(self.waiting) < len(jobs):
                count = len(jobs) - len(self.waiting)
                print(f"{count} of {len(jobs)} were run before", flush=True)
            with self.stoppable():
                try:
                    if self.grid.band and self.waiting:
                        log = folder / "demo_band.log"
                        self.make_band(self.grid.band, log)
                    self.work_on_all_devices()
                except KeyboardInterrupt:
                    self.stop()
                    grid_report.write_figures_at_stop(folder)
                    raise
            grid_report.write_tables(folder)
            grid_report.write_figures(folder)
        return [job for job in jobs if self.status(job) == "failed"]

    def work_on_all_devices(self):
        """Runs the jobs, a thread for each device."""
        workers = [
            threading.Thread(target=self.work, args=(device,), daemon=True)
            for device in self.devices
        ]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
        except KeyboardInterrupt:
            self.stop()
            for worker in workers:
                worker.join()
            raise
        if self.error:
            raise self.error

    def estimate(self, job, folder, more):
        """What a probe says about the cost of a job, for a dry run."""
        status, reason, metrics = self.probes.run(
            job, self.devices[0], folder, folder / "console.txt", **more
        )
        found = {"status": status, "reason": reason}
        if status != "done":
            return found
        unit, number = job.budget
        step_seconds = metrics["step_seconds"]
        batches = number * metrics["batches"]
        if unit != "epochs":
            if unit == "minutes":
                number = self.steps_in_time(job, step_seconds)
            unit, batches = "steps", number * job.batches_per_step()
            found["keys"] = job.budget_keys(number)
        return found | {
            "budget": f"{number} {unit}",
            "step_seconds": step_seconds,
            "minutes": batches * step_seconds / 60,
            "peak_memory_mb": metrics.get("peak_memory_mb"),
        }

    def dry_run(self, with_probe=True):
        """Prints what would be run and what it would cost.

        Arguments
        ---------
        with_probe : bool
            Whether to run a few batches of each job, in a temporary folder.

        Returns
        -------
        list of Job
            Those whose probe failed.
        """
        check_encoder(self.grid)
        check_configuration(self.grid, self.retry_oom)
        rows = []
        more = {"pretrained_encoder": "null"} if self.grid.pretrain else {}
        with (
            tempfile.TemporaryDirectory(prefix="reproduce_") as temporary,
            self.stoppable(),
        ):
            if self.grid.band and with_probe:
                more["data_folder"] = Path(temporary, "demo_band")
                log = Path(temporary, "demo_band.log")
                self.make_band(more["data_folder"], log)
            for job in self.grid.jobs:
                row = {"job": job, "keys": job.budget_keys()}
                row["budget"] = "{1:g} {0}".format(*job.budget)
                if with_probe:
                    folder = Path(temporary, job.name)
                    keys = {k: v for k, v in more.items() if k in job.keys}
                    row |= self.estimate(job, folder, keys)
                    if job is self.grid.pretrain:
                        # an encoder of a few batches costs what another does
                        for encoder in folder.glob("**/encoder"):
                            more["pretrained_encoder"] = encoder
                rows.append(row)
        print(grid_report.plan_text(rows), flush=True)
        return [row["job"] for row in rows if row.get("status") == "failed"]
