"""Decoding steps as CUDA graphs: a thousand launches of a byte become three replays.

`HNet.step` is made of pieces between its looks at the device: encoder and routing, dechunk and decoder, the innermost
stage. Here a piece runs as it is the first time (libraries set themselves up, Triton compiles), is captured the second
time and replayed from then on; an inner stage's only where a chunk begins. A graph is for a piece, a number of rows,
the way they lie to the slots, the capacity of the attention caches and where its inputs come from. Up to 8 rows every
number has a graph of its own; above, multiples of 8 have: the rows left over are computed for the spare slot that
`allocate_cache` adds. Outputs lie outside of the graphs' memory, which all share, and are the next piece's inputs
without a copy. What a piece gives is overwritten when it runs again.

Weights may be changed in place; the cache's tensors may be replaced only by growing (then all is captured anew).
Tested on a CPU with a tape in the place of a graph (tests/model/test_decode_graphs.py), on a GPU by tests/gpu.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cache import Rows, StageCache

EXACT = 8
LIMIT = 256  # graphs kept; one takes about a kilobyte for each of its launches

Piece = Callable[..., tuple[Tensor, ...]]


def bucket(rows: int) -> int:
    """Rows that a graph for so many has."""
    return rows if rows <= EXACT else -(-rows // EXACT) * EXACT


class CudaCapture:
    """capture(work): a function that repeats the launches of work(), which are not made now."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


@dataclass
class Recorded:
    """A piece seen once, or captured (`replay`), with the buffers that its graph reads and writes."""

    outputs: list[Tensor]
    slots: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    replay: Callable[[], None] | None = None


class Graphs:
    """The `run` of an HNetCache: captured pieces. For one cache.

    Args:
        capture: makes a replay of a function that takes and gives nothing; default: a CUDA graph.
    """

    def __init__(self, capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None) -> None:
        self.capture = capture or CudaCapture()
        self.recorded: dict[tuple, Recorded] = {}
        self.buffers: dict[int, Tensor] = {}  # outputs of captured pieces, by address
        self.sizes: dict[int, tuple[int, ...]] = {}  # capacities of each stage's caches when its pieces were captured
        self.why_not = ""  # in words, once something could not be captured: all runs as it is from then on

    def __call__(self, piece: Piece, cache: StageCache, rows: Rows, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.why_not or torch.is_autocast_enabled(cache.length.device.type):
            return piece(cache, rows, *inputs)
        sizes = tuple(layer.capacity for layer in cache.attention())
        if self.sizes.setdefault(id(cache), sizes) != sizes or len(self.recorded) >= LIMIT:
            self.recorded.clear()
            self.buffers.clear()
            self.sizes = {id(cache): sizes}
        size = bucket(len(rows))
        order = rows.order if size == len(rows) else "some"
        known = [self._buffer(x, size) for x in inputs]
        key = (id(cache), piece.__name__, size, order, *(0 if b is None else b.data_ptr() for b in known))
        found = self.recorded.get(key)
        if found is None:
            out = piece(cache, rows, *inputs)
            self.recorded[key] = Recorded([x.new_empty(size, *x.shape[1:]) for x in out], rows.slots)
            return out
        if found.replay is None:
            try:
                self._record(found, piece, cache, rows, order, inputs, known)
            except RuntimeError as e:
                self.why_not = f"{piece.__name__} cannot be captured, so decoding launches its kernels one by one: {e}"
                warnings.warn(self.why_not, stacklevel=2)
                return piece(cache, rows, *inputs)
        self._fill(found, cache, rows, inputs)
        assert found.replay is not None
        found.replay()
        return tuple(x[: len(rows)] for x in found.outputs)

    def _buffer(self, x: Tensor, size: int) -> Tensor | None:
        """The output of a captured piece whose first rows x is."""
        b = self.buffers.get(x.data_ptr())
        return b if b is not None and (b.shape, b.dtype) == ((size, *x.shape[1:]), x.dtype) else None

    def _record(
        self, found: Recorded, piece: Piece, cache: StageCache, rows: Rows, order: str, inputs: tuple[Tensor, ...],
        known: list[Tensor | None],
    ) -> None:  # fmt: skip
        size = found.outputs[0].shape[0]
        found.inputs = [x.new_zeros(size, *x.shape[1:]) if b is None else b for x, b in zip(inputs, known, strict=True)]
        # slots in order stay where the cache keeps them
        found.slots = rows.slots if order == "first" else cache.places.new_zeros(size)
        self._fill(found, cache, rows, inputs)
        slots, outputs, sources = found.slots, found.outputs, found.inputs

        def work() -> None:
            out = piece(cache, Rows(slots, cache.length, order), *sources)
            for buffer, x in zip(outputs, out, strict=True):
                buffer.copy_(x)

        found.replay = self.capture(work)
        self.buffers |= {x.data_ptr(): x for x in outputs}

    @staticmethod
    def _fill(found: Recorded, cache: StageCache, rows: Rows, inputs: tuple[Tensor, ...]) -> None:
        n = len(rows)
        for buffer, x in zip([found.slots, *found.inputs], [rows.slots, *inputs], strict=True):
            if buffer.data_ptr() != x.data_ptr():
                buffer[:n].copy_(x)
        if n < len(found.slots):
            found.slots[n:].fill_(len(cache.seen) - 1)  # the spare one
