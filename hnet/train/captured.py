"""The training step as a CUDA graph: recorded once, then replayed as one launch.

A small model is limited by how fast the host starts kernels. With `max_chunks` no shape of a step depends on the data
but the number of sequences, which here is padded to a fixed one by empty sequences at the end; so all of the step is
replayed on new data in the same memory. `capturable.py` says when it cannot be, or does not pay.

The first WARMUP steps run one by one, in the memory that the graph will read and on the stream it is recorded on: that
compiles kernels, makes the optimiser's moments and settles the allocator. Recording computes nothing; the step that was
recorded is replayed like all others. What the host decides is fixed in a graph. Where that changes (a target moves a
notch, a pack has more sequences than there is room for) or memory is replaced (a rollback), the graph is thrown away,
and made again after WARMUP steps; a target that moves at every step keeps it away until it stands still.

The graph keeps the memory of a step's activations to itself, beside what evaluations take.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hnet.data.packing import Batch
from hnet.errors import UserError
from hnet.events import Event

from .device_step import DeviceStep

WARMUP = 3  # steps
FEWEST = 16  # sequences that there is room for


class CapturedStep:
    """`DeviceStep.run` for micro-batches that are still on the host, by replaying a graph of it.

    positions, accumulation, longest: of a micro-batch, how many of them, longest sequence. limit: most sequences of a
    micro-batch that the budgets have room for; a step with more runs by itself. required: an error, not an event, if
    the step cannot be recorded. graph: `CudaGraph`, or what a test puts in its place.
    """

    def __init__(
        self, inner: DeviceStep, device: torch.device, graph: Any, *, positions: int, accumulation: int, longest: int,
        limit: int, required: bool,
    ) -> None:  # fmt: skip
        self.inner, self.device, self.graph, self.required = inner, device, graph, required
        self.positions, self.accumulation, self.longest, self.limit = positions, accumulation, longest, limit
        self.slots = 0  # sequences of a micro-batch that there is room for
        self.batches: list[Batch] = []  # the memory that is read
        self.constants: Hashable = None
        self.warm, self.recorded, self.given_up = 0, False, False
        self.events: list[Event] = []  # to be told
        if inner.optimizers.rates is None:
            inner.optimizers.keep_rates_on(device)

    def run(self, batches: list[Batch], step: int) -> Tensor:
        """As `DeviceStep.run`; the values are a copy."""
        most = max(b.cu_seqlens.shape[0] - 1 for b in batches)
        if self.given_up or most > self.limit:
            return self.inner.run([b.to(self.device) for b in batches], step)
        if most > self.slots:
            self._make_room(most)
        for mine, new in zip(self.batches, batches, strict=True):
            self._fill(mine, new)
        constants = self.inner.task.constants(step)
        if constants != self.constants:
            self.forget()
            self.constants = constants
        if self.recorded or (self.warm >= WARMUP and self._record(step)):
            return self.graph.replay().clone()
        self.warm += 1
        return self.graph.beside(lambda: self.inner.run(self.batches, step))

    def forget(self) -> None:
        """Throw the graph away: memory that it knows, or a constant in it, is no longer what it was."""
        self.graph.forget()
        self.recorded, self.warm = False, 0

    def _record(self, step: int) -> bool:
        try:
            self.graph.record(lambda: self.inner.run(self.batches, step))
        except Exception as e:  # CUDA, Triton and the compiler have no error in common
            self.inner.optimizers.zero_grad()
            why = _first_cause(e)
            if self.required:
                raise UserError(f"cuda_graph = 'on', but the training step cannot be recorded: {why}") from e
            self.given_up = True
            self.events.append(Event("not_captured", f"the training step runs without a CUDA graph: {why}"))
            return False
        self.recorded = True
        room = f"{self.accumulation} x {self.positions} positions, up to {self.slots} sequences each"
        self.events.append(Event("captured", f"the training step is a CUDA graph from here on ({room})"))
        return True

    # --- the memory that a graph reads ----------------------------------------------------------------------------

    def _make_room(self, sequences: int) -> None:
        """For twice as many, up to a power of two, so that it is rarely done again."""
        self.forget()
        self.slots = min(max(FEWEST, 1 << (2 * sequences - 1).bit_length()), self.limit)

        def memory(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=self.device)

        T = self.positions
        self.batches = [
            Batch(memory(T, torch.int64), memory(T, torch.int64), memory(self.slots + 1, torch.int32), self.longest, 0)
            for _ in range(self.accumulation)
        ]

    def _fill(self, mine: Batch, new: Batch) -> None:
        empty = self.slots + 1 - new.cu_seqlens.shape[0]
        cu_seqlens = F.pad(new.cu_seqlens, (0, empty), value=self.positions)
        for into, x in ((mine.input_ids, new.input_ids), (mine.targets, new.targets), (mine.cu_seqlens, cu_seqlens)):
            into.copy_(x.pin_memory() if into.is_cuda else x, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        return {"slots": self.slots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As much room as there was: the same kernels on the same shapes."""
        if state["slots"] > self.slots:
            self._make_room((min(state["slots"], self.limit) + 1) // 2)


def _first_cause(e: BaseException) -> str:
    """In a line. Ending a recording that has failed fails again, with an error that says less."""
    while e.__context__ is not None:
        e = e.__context__
    return f"{type(e).__name__}: {(str(e).strip() or '?').splitlines()[0]}"


class CudaGraph:
    """Work that is recorded once and replayed: the calls of torch.cuda that this takes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Tensor | None = None  # in memory of the graph, written anew by every replay

    def beside(self, work: Callable[[], Tensor]) -> Tensor:
        """Run `work` on the stream that will be recorded, in turn with the current one."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            result = work()
        here.wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], Tensor]) -> None:
        """`work` must leave no gradients: they would be memory of the graph."""
        self.forget()
        gc.collect()  # an old autograd graph in a cycle would tie the leaves to the stream it was made on
        here, generator = torch.cuda.current_stream(self.device), torch.cuda.default_generators[self.device.index]
        untouched = generator.clone_state()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: a checkpoint that is written in the background may go on copying
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                result = work()
        except BaseException:  # torch.cuda.graph does not put these back
            torch.cuda.set_stream(here)
            generator.graphsafe_set_state(untouched)
            raise
        self.graph, self.result = graph, result

    def replay(self) -> Tensor:
        assert self.graph is not None
        assert self.result is not None
        self.graph.replay()
        return self.result

    def forget(self) -> None:
        if self.graph is not None:
            torch.cuda.synchronize(self.device)  # a replay may still be running
            self.graph = self.result = None
