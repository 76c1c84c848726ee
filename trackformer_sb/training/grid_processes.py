"""Processes of the grid: memory limits, what became of them, an end to all.

And probes: processes that run a few batches to see what they cost.

Every training is a process of its own, so that one that runs out of memory
takes nothing else down.
"""

import contextlib
import fcntl
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

from trackformer_sb.training.grid_tables import read_json

TAIL_LINES = 50
PROBE_BATCHES = 8
STOP_SECONDS = 10  # until a process that does not end is killed
OUT_OF_MEMORY = re.compile(
    r"out of memory|can(?:not|'t) allocate memory|bad_alloc|MemoryError"
    r"|not enough memory|killed by signal: killed|failed to map segment"
    r"|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED"
    # what libraries of CUDA say where the GPU is full
    r"|CUBLAS_STATUS_NOT_INITIALIZED|unable to find an engine to execute"
    r"|failed to CUDA calloc",
    re.IGNORECASE,
)
# Limits its memory, will die with the grid, and becomes the command. As
# preexec_fn it might hang: several threads start processes.
LAUNCHER = """
import os, resource, signal, sys
limit, parent = int(sys.argv[1]), int(sys.argv[2])
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit("the grid is no more")
if limit:
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
os.execv(sys.argv[3], sys.argv[3:])
"""


def outcome(code, lines):
    """What became of a process.

    Arguments
    ---------
    code : int
        Its exit status, negative for the signal that ended it.
    lines : list of str
        The end of what it said.

    Returns
    -------
    status : str
        done, oom (out of memory) or failed.
    reason : str or None
        Why it is not done.

    Example
    -------
    >>> outcome(1, ["Traceback", "RuntimeError: CUDA out of memory."])
    ('oom', 'RuntimeError: CUDA out of memory.')
    >>> outcome(1, ["ValueError: lr"])
    ('failed', 'ValueError: lr')
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


def available_memory():
    """Memory that is free for new processes, in GB; None where not known."""
    meminfo = pathlib.Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    free = int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1])
    free *= 1024
    group = pathlib.Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, TypeError):
        # a container may have less than the machine; no limit reads "max"
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = (group / "memory.stat").read_text()
        # files in the cache make room when needed
        used -= int(re.search(r"^inactive_file (\d+)", stat, re.M)[1])
        free = min(free, limit - used)
    return max(free, 0) / 2**30


def visible_devices():
    """Devices to train on: all GPUs that CUDA will see, else the CPU.

    Torch is not asked, it would take its memory from the cells.

    Returns
    -------
    tuple of str
        cuda:0, cuda:1 and so on, or cpu.
    """
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ("cpu",)
    count = len(re.findall(r"^GPU \d+:", listed, re.MULTILINE))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        # CUDA numbers those anew, and ends at the first that is not there
        known = [
            int(name) < count
            if name.isdecimal()
            else name.startswith(("GPU-", "MIG-")) and name in listed
            for name in names
        ]
        count = [*known, False].index(False)
    return tuple(f"cuda:{number}" for number in range(count)) or ("cpu",)


@contextlib.contextmanager
def locked(folder):
    """Refuses a second process on the same grid."""
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--output_folder: another process runs the grid in {folder}; "
                "wait for it, or name another folder"
            ) from None
        yield


class Processes:
    """Starts processes, waits for them and ends them.

    Arguments
    ---------
    devices : sequence of str
        As many processes run at once, each on its own entry.
    memory_gb : float, optional
        Limit of a process on a CPU device, in GB. By default its share of 90 %
        of what is free, so that the system has no reason to kill others.

    Example
    -------
    >>> log = pathlib.Path(getfixture("tmpdir")) / "log.txt"
    >>> Processes().execute([sys.executable, "-c", "exit('no')"], log)
    ('failed', 'no')
    """

    def __init__(self, devices=("cpu",), memory_gb=None):
        cpus = sum(not device.startswith("cuda") for device in devices)
        free = available_memory()
        if cpus and memory_gb is None and free:
            memory_gb = round(0.9 * free / cpus, 2)
        self.memory_gb = memory_gb
        self.environment = dict(os.environ)
        if cpus > 1:
            threads = str(max(1, (os.cpu_count() or 1) // cpus))
            names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
            self.environment |= dict.fromkeys(names, threads)
        self.lock, self.children = threading.Lock(), set()
        self.stopping = False

    def limit_gb(self, device):
        """Memory limit on a device in GB, None for none."""
        return None if device.startswith("cuda") else self.memory_gb

    def execute(self, command, log, limit_gb=None):
        """Runs a command.

        Arguments
        ---------
        command : list of str
            The command.
        log : pathlib.Path
            File that takes all it says, added to what is there.
        limit_gb : float, optional
            Memory limit.

        Returns
        -------
        status, reason : str, str or None
            See ``outcome``; running for one that was stopped.
        """
        limit = int((limit_gb or 0) * 2**30)
        launch = [sys.executable, "-c", LAUNCHER, str(limit), str(os.getpid())]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            start = file.tell()
            with self.lock:
                if self.stopping:
                    return "running", "stopped"
                # a group of its own: Ctrl-C reaches it through us only
                process = subprocess.Popen(
                    [*launch, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    start_new_session=True,
                )
                self.children.add(process)
        code = process.wait()
        with self.lock:
            self.children.remove(process)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # loader workers of a process that was killed
            os.killpg(process.pid, signal.SIGKILL)
        if self.stopping and code:
            return "running", "stopped"
        with open(log, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(start, end - 2**16))
            said = file.read().decode(errors="replace")
        return outcome(code, re.split(r"[\r\n]+", said)[-TAIL_LINES - 1 :])

    def stop(self):
        """Ends all processes; what they have is resumed later."""
        with self.lock:
            self.stopping = True
            children = list(self.children)
        for process in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        end = time.monotonic() + STOP_SECONDS
        for process in children:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


class Probes:
    """Runs a few batches of trainings, to see what they cost.

    Arguments
    ---------
    processes : Processes
        What starts them.
    folder : pathlib.Path
        The grid's, where records have what was measured before.
    """

    def __init__(self, processes, folder):
        self.processes, self.folder = processes, folder
        self.lock, self.locks, self.found = threading.Lock(), {}, {}

    def run(self, job, device, folder, log, **more):
        """Runs a few batches of a job.

        Arguments
        ---------
        job : Job
            What to try.
        device : str
            Where.
        folder : pathlib.Path
            Folder for what it writes.
        log : pathlib.Path
            File for what it says.
        **more
            Keys that count instead of the job's.

        Returns
        -------
        status, reason : str, str or None
            See ``outcome``.
        metrics : dict
            Its metrics.json.
        """
        shutil.rmtree(folder, ignore_errors=True)
        keys = {"debug_batches": PROBE_BATCHES, "debug_epochs": 1}
        keys |= {"output_folder": folder, "device": device, **more}
        status, reason = self.processes.execute(
            [*job.command(**keys), "--debug"],
            log,
            self.processes.limit_gb(device),
        )
        metrics = read_json(folder / "debug" / "metrics.json")
        missing = {"step_seconds", "batches"} - metrics.keys()
        if status == "done" and missing:
            names = " and ".join(sorted(missing))
            return "failed", f"no {names} in the probe's metrics.json", metrics
        return status, reason, metrics

    def shared(self, job, device):
        """What a batch of a job takes, measured once for each network.

        So that jobs of one network get the same number of steps for their
        minutes, however noisy the measurement; on a GPU and on a CPU it is
        measured apart.

        Arguments
        ---------
        job : Job
            What to try.
        device : str
            Where.

        Returns
        -------
        status, reason : str, str or None
            See ``outcome``.
        probe : dict
            For the job's record: the network and step_seconds; {} if it is not
            done.
        """
        name = f"{job.network} on {device.split(':')[0]}"
        with self.lock:
            lock = self.locks.setdefault(name, threading.Lock())
        with lock:
            probe = self.found.get(name) or self.recorded(name)
            if not probe:
                folder = job.folder / "probe"
                status, reason, metrics = self.run(job, device, folder, job.log)
                shutil.rmtree(folder, ignore_errors=True)
                if status != "done":
                    return status, reason, {}
                probe = {"of": name, "step_seconds": metrics["step_seconds"]}
            self.found[name] = probe
        return "done", None, probe

    def recorded(self, name):
        """The probe of a network that a cell's record has, {} if none has."""
        for path in self.folder.glob("*/*s/*/cell.json"):
            probe = read_json(path).get("probe", {})
            if probe.get("of") == name:
                return probe
        return {}
