"""The sweep's side of a trial's process: starting it, stopping it, reading its metrics as they come."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hnet.errors import PathTaken, user_path

LOG = "log.txt"
PATIENCE = 60.0  # seconds for a checkpoint after SIGTERM
HANDOVER = 30.0  # seconds that workers of a killed sweep have to stop


class Process:
    """A worker on the trial in `folder`. It holds the sweep's lock as long as it lives."""

    def __init__(self, folder: Path, threads: int, lock: int) -> None:
        command = [sys.executable, "-m", "hnet.sweep.worker", str(folder), str(threads)]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with (folder / LOG).open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, pass_fds=[lock],
                start_new_session=True,  # Ctrl-C is for the sweep, which passes it on
            )  # fmt: skip
        self.stopped: float | None = None

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self.stopped is not None and time.monotonic() - self.stopped > PATIENCE:
            self.process.kill()
        return self.process.poll()

    def stop(self) -> None:
        """Ask it to save and end."""
        if self.stopped is None:
            self.stopped = time.monotonic()
            self.process.terminate()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Tail:
    """Rows of a metrics.jsonl that were not there at the last look; all of them again when the file was replaced."""

    def __init__(self, path: Path) -> None:
        self.path, self.inode, self.offset = path, -1, 0

    def rows(self) -> list[dict[str, Any]]:
        try:
            with self.path.open("rb") as f:
                stat = os.fstat(f.fileno())
                if stat.st_ino != self.inode or stat.st_size < self.offset:
                    self.inode, self.offset = stat.st_ino, 0
                f.seek(self.offset)
                whole, end, _ = f.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self.offset += len(whole) + len(end)
        return [row for line in whole.splitlines() if isinstance(row := json.loads(line), dict)]


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """The folder to oneself: the lock's file descriptor, which workers hold too. Those that a killed sweep left stop by
    themselves, and are waited for.

    Raises:
        PathTaken: a sweep is at work there.
    """
    with user_path(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        until = time.monotonic() + HANDOVER
        while not _try_lock(fd):
            owner = os.pread(fd, 32, 0).decode()
            if time.monotonic() > until or (owner.isdigit() and _alive(int(owner))):
                raise PathTaken(f"another sweep (process {owner}) is at work in {folder}")
            time.sleep(0.1)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield fd
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def why(code: int) -> str:
    """A process that ended without a word."""
    if code >= 0:
        return f"ended with exit code {code}, see {LOG}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
