"""One run at a time in a folder."""

import fcntl
import os
import socket
from contextlib import contextmanager
from pathlib import Path

LOCK = "run.lock"


@contextmanager
def locked(folder):
    """Keeps a second run out of a folder, by a file that names the first.

    The system keeps the lock for as long as the process lives, on network file
    systems among all hosts; where there are no locks nobody is kept out. The
    folder is made if need be; a FileExistsError says who is at work there.
    """
    path = Path(folder, LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # any other is of a file system without locks
            if isinstance(error, BlockingIOError):
                file.seek(0)
                raise FileExistsError(
                    f"{folder} is in use by {file.read()}: expected another "
                    "output_folder, or that this run is over"
                ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
