"""Stands in for `hnet.train.captured.CudaGraph` on a CPU, as strictly as a graph."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from hnet.model.attention import rotate

from .no_host_reads import NoHostReads


class Recorder:
    """Work is written down op by op with the tensors it was done on, and a replay does that again in the same memory.
    No Python runs then: what the host had decided stays decided. (A graph computes at its first replay, this while it
    is recorded, so that its first replay has nothing to do.)"""

    made: ClassVar[list[Recorder]] = []

    def __init__(self, device) -> None:
        self.tape: Tape | None = None
        self.recorded = self.replays = self.warm = 0
        Recorder.made.append(self)

    def beside(self, work):
        self.warm += 1
        return work()

    def record(self, work) -> None:
        self.recorded += 1
        self.tape, self.done = Tape(), True
        with self.tape:
            self.result = work()

    def replay(self) -> Tensor:
        self.replays += 1
        if not self.done:
            self.tape.run()
        self.done = False
        return self.result

    def forget(self) -> None:
        self.tape = self.result = None


RESHAPES = ("squeeze_", "unsqueeze_", "transpose_", "t_")  # in place; every op keeps the shapes that it met


class Tape(NoHostReads):
    """Ops with aliases of their tensors, and which outputs are memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        met = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        inputs = {t.untyped_storage().data_ptr() for t in tensors(met)}
        fresh = [t.untyped_storage().data_ptr() not in inputs for t in tensors(out)]
        if func.overloadpacket.__name__ not in RESHAPES:
            self.ops.append((func, *met, [t.detach() for t in tensors(out)], fresh))
        return out

    def run(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, outs, fresh in self.ops:
                for old, new, write in zip(outs, tensors(func(*args, **kwargs)), fresh, strict=True):
                    if write:
                        old.copy_(new)


def tensors(tree) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def masked_fused(qkv: Tensor, pack, window: int, rotary_dim: int) -> Tensor:
    """hnet.model.attention.fused, likewise"""
    qk = rotate(qkv[:, :2], *pack.rotary(rotary_dim)) if rotary_dim else qkv[:, :2]
    return masked_attention(qk, qkv[:, 2], pack, window)


def masked_attention(qk: Tensor, v: Tensor, pack, window: int) -> Tensor:
    """hnet.model.attention.attention with shapes that do not depend on lengths, as kernels on a GPU have them."""
    place = torch.arange(len(v))
    distance = place[:, None] - place
    visible = (pack.seq_idx[:, None] == pack.seq_idx) & (distance >= 0)
    if window >= 0:
        visible = visible & (distance <= window)
    q, k, v = (x.transpose(0, 1)[None] for x in (*qk.unbind(1), v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)[0].transpose(0, 1)
    return torch.where((pack.seq_idx < pack.N)[:, None, None], out, 0)
