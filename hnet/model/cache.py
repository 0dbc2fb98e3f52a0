"""What decoding remembers, one slot for each sequence of the batch, and which slots a step advances.

Slots are independent: sequences may have different lengths and fire boundaries at different bytes. How many positions
every slot has seen is kept on the device, for the layers, and on the host, so that no step asks the device for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

FIRST_ROWS = 256  # of keys and values; doubled when they are full

T = TypeVar("T")


@dataclass
class AttentionCache:
    """Keys and values (after rotary). With a window the rows are a ring; without, they grow up to `max_length`."""

    k: Tensor  # (B, capacity, heads, width)
    v: Tensor
    max_length: int

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    def reserve(self, positions: int) -> None:
        """Make room for so many positions a slot (a window needs no more than itself)."""
        positions = min(positions, self.max_length)
        if positions <= self.capacity:
            return
        before = self.capacity
        grown = min(max(positions, 2 * before), self.max_length)
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_zeros(old.shape[0], grown, *old.shape[2:])
            new[:, :before] = old
            setattr(self, name, new)


@dataclass
class ConvCache:
    tail: Tensor  # (B, kernel - 1, channels), the last inputs, oldest first


@dataclass
class MambaCache:
    tail: Tensor  # (B, d_conv - 1, channels)
    ssm: Tensor  # (B, heads, headdim, d_state) fp32


LayerCache = AttentionCache | ConvCache | MambaCache


@dataclass
class RouteCache:
    q_last: Tensor  # (B, d_model), the last position's W_q x
    ema: Tensor  # (B, d_model) fp32, the dechunked value
    tail: Tensor  # (B, 3) uint8, the last bytes, for boundaries at the ends of characters


class Rows:
    """The slots that a step advances, one row each in any order, and what its layers derive from them: computed when
    first asked for and shared by all layers.

    slots: (n,) int64, on the device.  length: (B,) int64, positions seen by every slot of the stage.
    order: "first": slots 0, 1, ..., n - 1; "all": every slot, in another order; "some": anything else.
    """

    def __init__(self, slots: Tensor, length: Tensor, order: str) -> None:
        self.slots, self.length, self.order = slots, length, order
        self._shared: dict[Any, Any] = {}

    def __len__(self) -> int:
        return self.slots.shape[0]

    def take(self, state: Tensor) -> Tensor:
        """Rows of state (B, ...); where `order` is first, a view of it."""
        if self.order != "first":
            return state[self.slots]
        return state if len(self) == state.shape[0] else state[: len(self)]

    def put(self, state: Tensor, new: Tensor) -> None:
        if self.order == "first":
            old = self.take(state)
            if old.data_ptr() != new.data_ptr():  # else changed in place
                old.copy_(new)
        else:
            state.index_copy_(0, self.slots, new.to(state.dtype))

    @cached_property
    def position(self) -> Tensor:
        """(n,) int64: place of each new row in its sequence. Not to be used after `advance`."""
        return self.take(self.length)

    def shared(self, key: Any, make: Callable[[], T]) -> T:
        """`make()` of the first layer that asks for `key`."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def advance(self) -> None:
        """The new rows have been seen, on the device."""
        if self.order == "some":
            self.length.index_copy_(0, self.slots, self.position + 1)
        else:
            (self.length[: len(self)] if self.order == "first" else self.length).add_(1)


@dataclass
class StageCache:
    """One stage. The innermost has only `layers`."""

    layers: list[LayerCache]  # encoder, or main network
    decoder: list[LayerCache]
    length: Tensor  # (B,) int64, positions seen
    seen: list[int]  # the same, on the host
    places: Tensor  # (B,) int64: 0, 1, ...
    route: RouteCache | None = None
    inner: StageCache | None = None

    def stages(self) -> Iterator[StageCache]:
        """This one and those inside of it."""
        yield self
        if self.inner is not None:
            yield from self.inner.stages()

    def attention(self) -> Iterator[AttentionCache]:
        return (layer for layer in [*self.layers, *self.decoder] if isinstance(layer, AttentionCache))

    def move(self, source: int, to: int) -> None:
        """Slot `to` takes over what slot `source` has seen."""
        seen = self.seen[source]
        for layer in self.attention():
            rows = slice(min(seen, layer.capacity))
            layer.k[to, rows] = layer.k[source, rows]
            layer.v[to, rows] = layer.v[source, rows]
        states = [self.length]
        for kept in [*self.layers, *self.decoder, self.route]:
            if isinstance(kept, ConvCache):
                states += [kept.tail]
            elif isinstance(kept, MambaCache):
                states += [kept.tail, kept.ssm]
            elif isinstance(kept, RouteCache):
                states += [kept.q_last, kept.ema, kept.tail]
        for state in states:
            state[to] = state[source]
        self.seen[to] = seen

    def reserve(self, named: list[int]) -> None:
        """Make room for one new position of each of these slots."""
        longest = max(self.seen[s] for s in named) + 1
        for layer in self.attention():
            layer.reserve(longest)

    def rows(self, named: list[int]) -> Rows:
        """For one new position of each of these slots, for which there is room afterwards."""
        self.reserve(named)
        if named == list(range(len(named))):
            return Rows(self.places[: len(named)], self.length, "first")
        order = "all" if len(named) == len(self.seen) else "some"
        return Rows(upload(named, self.length.device), self.length, order)

    def advanced(self, named: list[int]) -> None:
        """`Rows.advance`, on the host."""
        for s in named:
            self.seen[s] += 1

    def filled(self, named: list[int], slots: Tensor, lengths: Tensor) -> None:
        """These slots have seen `lengths` (n,) positions."""
        self.length[slots] = lengths.long()
        for s, n in zip(named, lengths.tolist(), strict=True):
            self.seen[s] = n


def run_directly(piece: Callable[..., tuple[Tensor, ...]], cache: StageCache, rows: Rows, *inputs: Tensor):
    """How a piece of a step runs, unless by `hnet.model.decode_graphs`."""
    return piece(cache, rows, *inputs)


@dataclass
class HNetCache:
    root: StageCache
    size: int  # slots; the tensors may have a spare one besides
    max_length: int
    run: Callable[..., tuple[Tensor, ...]] = run_directly
    recent: Tensor | None = None  # (B, n) int64, the last bytes of every slot, for embeddings of n-grams
    fused: bool = False  # steps may be one call of the extension
    native: Any = None  # `native_step.NativeStep`, once there was one

    def recall(self, named: list[int], new: Tensor) -> Tensor:
        """The bytes before the new one of these slots, and it, a row each; it is remembered."""
        assert self.recent is not None
        where = slice(len(named)) if named == list(range(len(named))) else upload(named, new.device)
        recent = torch.cat([self.recent[where], new[:, None]], 1)
        self.recent[where] = recent[:, 1:]
        return recent

    @torch.inference_mode()
    def move(self, source: int, to: int) -> None:
        """Slot `to` takes over what slot `source` has seen, so that those in use lie first, where a step gathers
        nothing. The source keeps its state until it is filled anew.

        Raises:
            ValueError: one of them is not there, or they are the same.
        """
        self.checked([source, to])
        for stage in self.root.stages():
            stage.move(source, to)
        if self.recent is not None:
            self.recent[to] = self.recent[source]

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Forget keys and values that are no numbers: attention gives unseen rows the weight 0, and 0 x NaN is NaN for
        whoever has the slot next. All else is overwritten when it is filled."""
        self.checked([slot])
        for stage in self.root.stages():
            for layer in stage.attention():
                layer.k[slot] = 0
                layer.v[slot] = 0

    @property
    def length(self) -> Tensor:
        """(B,) int64, on the CPU: bytes seen by every slot."""
        return torch.tensor(self.root.seen[: self.size], dtype=torch.int64)

    def checked(self, slots: Tensor | Sequence[int] | None) -> list[int]:
        """`slots` on the host (None: all), if they are places of this cache, each named once: two rows for one slot
        would have no order. A tensor on a GPU costs a wait for it.

        Raises:
            ValueError: they are not.
        """
        if slots is None:
            return list(range(self.size))
        if isinstance(slots, Tensor):
            if slots.dim() != 1 or slots.dtype != torch.int64:
                raise ValueError(f"slots must be (n,) int64, got {tuple(slots.shape)} {slots.dtype}")
            slots = slots.tolist()
        named = list(slots)
        places = all(type(s) is int and 0 <= s < self.size for s in named)
        if not named or not places or len(set(named)) < len(named):
            raise ValueError(f"slots must be distinct and from 0 to {self.size - 1}, at least one, got {named}")
        return named


def upload(values: list[int], device: torch.device) -> Tensor:
    """(n,) int64 on the device; the host does not wait until a GPU has it."""
    x = torch.tensor(values, dtype=torch.int64)
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def write_kv(cache: AttentionCache, k: Tensor, v: Tensor, slots: Tensor, at: Tensor) -> None:
    """Put rows k, v (n, heads, width) at rows `at` of the keys and values of `slots`."""
    cache.k[slots, at] = k.to(cache.k.dtype)
    cache.v[slots, at] = v.to(cache.v.dtype)


def allocate_kv(batch: int, heads: int, width: int, max_length: int, window: int, like: Tensor) -> AttentionCache:
    limit = min(max_length, window + 1) if window >= 0 else max_length
    shape = (batch, min(limit, FIRST_ROWS), heads, width)
    return AttentionCache(like.new_zeros(shape), like.new_zeros(shape), limit)


def allocate_stage(
    batch: int, layers: list[LayerCache], decoder: list[LayerCache], route: RouteCache | None,
    inner: StageCache | None, device: torch.device,
) -> StageCache:  # fmt: skip
    length = torch.zeros(batch, dtype=torch.int64, device=device)
    return StageCache(layers, decoder, length, [0] * batch, torch.arange(batch, device=device), route, inner)
