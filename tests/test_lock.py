"""One run at a time in a folder, and what killed ones leave there."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from trackformer_sb.training.lock import LOCK, locked

RUN = """
import sys, time
from trackformer_sb.training import experiment
from trackformer_sb.training.lock import locked

def main(argv):
    with locked(argv[0]):
        print("begun", flush=True)
        time.sleep(600)

experiment.run(main)
"""


@pytest.fixture
def begun(tmp_path):
    """A run of another process, at work in a folder."""
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "begun\n"
        yield process
        process.kill()


def test_a_run_at_work_keeps_others_out_and_is_named(begun, tmp_path):
    message = f"{tmp_path} is in use by process {begun.pid} on "
    with pytest.raises(FileExistsError, match=message), locked(tmp_path):
        pass
    assert (tmp_path / LOCK).is_file()
    begun.terminate()
    assert "the same command goes on" in begun.communicate()[1]
    assert begun.returncode == 128 + signal.SIGINT
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_leaves_is_taken_over(begun, tmp_path):
    begun.kill()
    begun.wait()
    with locked(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path):
        assert (tmp_path / LOCK).is_file()
