"""A tape in the place of a CUDA graph: what PyTorch was asked to do in a piece of work, done again on its memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hnet.model.cache import HNetCache
from hnet.model.decode_graphs import Graphs

LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")  # what a host cannot do without waiting


def looks(func, args) -> bool:
    name = func._schema.name.removeprefix("aten::").partition(".")[0]
    by_mask = name in ("index", "index_put", "index_put_", "_unsafe_index") and any(
        i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
    )
    return by_mask or name.startswith(LOOKS)


class EveryCall(TorchDispatchMode):
    """Sees the parts of an operation that is made of others, which inference mode would hide."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            out = func.decompose(*args, **kwargs)
        return self.call(func, args, kwargs) if out is NotImplemented else out

    def call(self, func, args, kwargs):
        return func(*args, **kwargs)


class Tape(EveryCall):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def call(self, func, args, kwargs):
        assert not looks(func, args), f"{func} waits for the device: it cannot be part of a graph"
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def state(cache: HNetCache) -> list[Tensor]:
    parts = [x for s in cache.root.stages() for x in [s, s.route, *s.layers, *s.decoder] if x is not None]
    return [x for part in parts for x in vars(part).values() if isinstance(x, Tensor)]


def taped(cache: HNetCache) -> Graphs:
    """Capturing runs the work, to see it, and leaves the cache as it was: a graph's launches are not made."""

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        before = [x.clone() for x in state(cache)]
        with Tape() as tape:
            work()
        for x, old in zip(state(cache), before, strict=True):
            x.copy_(old)
        return tape.replay

    return Graphs(capture)
