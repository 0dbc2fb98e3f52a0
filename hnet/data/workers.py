"""Batches made ahead by worker processes, with the same packs, order and state as without."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
import weakref
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from .corpus import Corpus
from .pack_stream import PackStream, merge
from .packing import Batch


class Workers:
    """A `PackStream` read by `count` processes, each one batch ahead.

    Worker j makes this rank's packs j, j + count, ... Every batch travels with the state after it, so `state_dict` is
    that of the last batch handed out, whatever was made ahead. What a worker raises is raised here; when this process
    ends, however it ends, so do the workers.
    """

    def __init__(self, stream: PackStream, count: int) -> None:
        if count < 1:
            raise ValueError(f"num_workers must be at least 1, got {count}")
        self.stream, self.count = stream, count
        self._state = stream.state_dict()
        self._turn = 0
        self._stop: weakref.finalize | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stop is None:
            self._start()
        worker = self._turn
        try:
            packed, state, error = self._pipes[worker].recv()
        except (EOFError, ConnectionResetError):
            process = self._processes[worker]
            process.join(5)
            self.close()
            raise RuntimeError(f"data worker {worker} died with exit code {process.exitcode}") from None
        if error is not None:
            self.close()
            raise error[0] from RuntimeError(f"in data worker {worker}:\n{error[1]}")
        self._state = merge([self._state, state])  # each knows the place of the documents it read
        self._turn = (worker + 1) % self.count
        return packed.batch()

    def _start(self) -> None:
        # A forked worker shares the documents; elsewhere they are copied to it.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._turn = 0
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._stop = weakref.finalize(self, _stop, self._processes, self._pipes)
        for j in range(self.count):
            ours, theirs = context.Pipe(duplex=False)
            self._pipes.append(ours)
            # Each worker closes what it inherited of our ends: only then does its pipe break when this process dies.
            inherited = list(self._pipes) if sys.platform == "linux" else []
            process = context.Process(
                target=_work, args=(self.stream, self._state, j, self.count, theirs, inherited), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self.stream.load_state_dict(state)
        self._state = self.stream.state_dict()

    @property
    def epochs(self) -> float:
        return self._state["epochs"]

    @property
    def corpus(self) -> Corpus:
        return self.stream.corpus

    def close(self) -> None:
        """End the workers; the next batch starts new ones, where the last batch left off."""
        if self._stop is not None:
            self._stop()
            self._stop = None


def with_workers(stream: PackStream, num_workers: int) -> PackStream | Workers:
    """The stream itself for num_workers = 0."""
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}")
    return Workers(stream, num_workers) if num_workers else stream


def _stop(processes: list[Any], pipes: list[Connection]) -> None:
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()


def _work(
    stream: PackStream, state: dict[str, Any], worker: int, count: int, pipe: Connection, inherited: list[Connection]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also comes here, but the main process decides what it means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()
    try:
        stream.load_state_dict(state)
        stream.skip(worker)
        while True:
            packed = stream.take()
            if not _send(pipe, (packed, stream.state_dict(), None)):
                return
            stream.skip(count - 1)
    except Exception as e:
        if not _send(pipe, (None, state, (e, traceback.format_exc()))):
            return


def _send(pipe: Connection, message: Any) -> bool:
    """False when nobody listens any more."""
    try:
        pipe.send(message)
    except (BrokenPipeError, ConnectionResetError):
        return False
    except Exception:  # an exception that cannot be pickled
        error = message[2] or ("", "")
        pipe.send((None, message[1], (RuntimeError(str(error[0])), error[1])))
    return True
