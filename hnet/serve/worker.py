"""One thread owns the engine; the server's event loop asks it for texts and hears of them through queues.

A `Call` is what one HTTP request asked for, one or more texts. Nothing of it stays here once its texts have ended or
its client has left.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import dataclass

from hnet.generate import Engine, Request
from hnet.generate.sampling import NOT_FINITE, Choice

from .errors import ApiError
from .limits import Limits
from .metrics import Metrics
from .task import Task

log = logging.getLogger("hnet.serve")
ILL = 3  # steps that failed one after the other


@dataclass(frozen=True)
class Piece:
    """What has become of text `index` of a call since its last piece.

    depths: of how many stages a chunk begins at each further byte: of the prompt first, where it is echoed.
    finish: None while it goes on; "eos", "stop", "length", "time" and "shutdown" (cut), "error".
    """

    index: int
    new: bytes
    depths: list[int]
    logprobs: list[Choice]
    finish: str | None
    error: ApiError | None


class Call:
    """Pieces of the texts a client asked for; read by one coroutine of the loop it was made in."""

    def __init__(self, worker: Worker, task: Task) -> None:
        self.worker, self.task = worker, task
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        self.requests: list[Request] = []
        self.open = task.texts

    async def next(self) -> Piece | None:
        """The next piece; None when all texts have ended, or the client is gone."""
        if not self.open:
            return None
        piece = await self.pieces.get()
        if piece is None:
            self.open = 0
        elif piece.finish is not None:
            self.open -= 1
        return piece

    def close(self) -> None:
        """Nobody reads any more: texts that go on end, and free their slots."""
        self.worker.forget(self.requests)
        self.pieces.put_nowait(None)


@dataclass
class Text:
    """A request of the engine, and what of it its client has heard."""

    call: Call
    index: int
    since: float
    until: float
    began: bool = False
    cut: str = ""  # why we ended it
    prompt_depths: int = 0
    depths: int = 0
    logprobs: int = 0


class Worker:
    """
    Args:
        engine: used by nobody else, with `chunks`.
        limits: its slots are those of the engine.
    """

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics) -> None:
        self.engine, self.limits, self.metrics = engine, limits, metrics
        self.changed = threading.Condition()  # guards texts, and what is taken from requests
        self.texts: dict[Request, Text] = {}
        self.stopping = False
        self.cut_at: float | None = None  # draining until then
        self.failures = 0
        self.thread = threading.Thread(target=self._run, name="hnet-engine", daemon=True)
        metrics.slots.set(engine.slots)
        metrics.waiting.set_function(lambda: len(engine.waiting))
        metrics.running.set_function(lambda: sum(r.finish is None for r in list(engine.running)))

    # --- called from the event loop ---------------------------------------------------------------------------------

    def start(self) -> None:
        _ = self.engine.cache  # what does not fit in memory shall be said now
        self.thread.start()

    def stop(self) -> None:
        """End what runs, and the thread."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join()

    def drain(self, grace: float) -> None:
        """Take no more requests, and cut in `grace` seconds those there are. Takes no lock: for signal handlers too."""
        self.cut_at = time.monotonic() + grace

    @property
    def state(self) -> str:
        """ok, stopping, or failed."""
        if not self.thread.is_alive() or self.failures >= ILL:
            return "failed"
        return "ok" if self.cut_at is None else "stopping"

    def submit(self, task: Task) -> Call:
        """
        Raises:
            ApiError: 429, the queue is full; 503, the server stops.
        """
        call = Call(self, task)
        now = time.monotonic()
        with self.changed:
            if self.cut_at is not None or self.stopping:
                raise ApiError(503, "the server is stopping", code="stopping")
            if len(self.texts) + task.texts > self.limits.texts:
                raise ApiError(429, f"{len(self.texts)} texts run or wait: try again later", code="queue_full")
            for index in range(task.texts):
                request = self.engine.submit(
                    task.prompts[index // task.n], task.config, max_new_bytes=task.max_tokens,
                    seed=(task.seed + index) % 2**63, stop=task.stop, stop_at_eos=task.stop_at_eos,
                )  # fmt: skip
                call.requests.append(request)
                self.texts[request] = Text(call, index, now, now + self.limits.seconds)
            self._report()  # one that has nothing to write has ended
            self.changed.notify()
        return call

    def forget(self, requests: list[Request]) -> None:
        """Cancel those that go on; of none there is a piece again."""
        with self.changed:
            for request in requests:
                if self.texts.pop(request, None) is not None:
                    self.engine.cancel(request)
                    self.metrics.texts.labels("disconnected").inc()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.stopping or self.engine.busy)
            if not self.stopping:
                try:
                    self.engine.step()
                    self.failures = 0
                except Exception as e:
                    log.exception("a step failed")
                    self._failed(e)
            with self.changed:
                self._cut()
                self._report()
                if self.stopping:
                    return

    def _failed(self, e: Exception) -> None:
        self.metrics.failed_steps.inc()
        self.failures += 1
        with self.changed:
            if any(request.finish == "error" for request in self.texts):
                return  # those that ran have ended
            for request, text in self.texts.items():  # it failed before any text was at work: none can go on
                text.cut = "error"
                self.engine.cancel(request)

    def _cut(self) -> None:
        """End texts whose time is over."""
        now = time.monotonic()
        over = self.stopping or (self.cut_at is not None and now >= self.cut_at)
        for request, text in self.texts.items():
            if request.finish is None and (over or now >= text.until):
                text.cut = "shutdown" if over else "time"
                self.engine.cancel(request)

    def _report(self) -> None:
        """Tell every call what there is to tell: of a stream every byte, of others the end."""
        now, news = time.monotonic(), []
        for request, text in list(self.texts.items()):
            if request.text and not text.began:
                text.began = True
                self.metrics.first_byte.observe(now - text.since)
            if request.finish is not None:
                del self.texts[request]
                self._count(request, text, now)
            elif not text.call.task.stream or not request.text:
                continue
            news.append((text.call, self._piece(request, text)))
        for loop in {call.loop for call, _ in news}:
            pieces = [(call, piece) for call, piece in news if call.loop is loop]
            loop.call_soon_threadsafe(_deliver, pieces)

    def _piece(self, request: Request, text: Text) -> Piece:
        task, depths, logprobs = text.call.task, [], []
        if task.chunks:
            if task.echo:
                depths = request.prompt_depths[text.prompt_depths :]
                text.prompt_depths += len(depths)
            depths = depths + request.depths[text.depths :]
            text.depths = len(request.depths)
        if task.config.logprobs is not None:  # a byte held back for a stop string is not yet part of the text
            logprobs = request.logprobs[text.logprobs : len(request.text)]
            text.logprobs += len(logprobs)
        finish = text.cut or request.finish
        return Piece(text.index, request.take(), depths, logprobs, finish, error_of(request, finish))

    def _count(self, request: Request, text: Text, now: float) -> None:
        self.metrics.texts.labels(text.cut or request.finish).inc()
        self.metrics.prompt_bytes.inc(len(request.prompt))
        self.metrics.new_bytes.inc(len(request.text))
        self.metrics.whole.observe(now - text.since)


def _deliver(pieces: list[tuple[Call, Piece]]) -> None:
    for call, piece in pieces:
        call.pieces.put_nowait(piece)


def error_of(request: Request, finish: str | None) -> ApiError | None:
    """Of a text that failed, or was cut before its first byte."""
    if finish == "error" and request.error == NOT_FINITE:
        return ApiError(422, f"{NOT_FINITE} after this text", code="not_finite")
    if finish == "error":
        return ApiError(503, "the model failed; the server's log says how", code="model_failed")
    if finish in ("time", "shutdown") and not request.text:
        why = "there was no time to begin the text" if finish == "time" else "the server is stopping"
        return ApiError(503, why, code="timeout" if finish == "time" else "stopping")
    return None
