"""Pieces of a long pack, small enough for fp64: what an op gives in the middle of a piece does not depend on the rest.

A boundary's probability is above one half, so chunks further than HALO away weigh less than 2^-HALO, either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hnet_kernels import Routing

HALO = 64


class Window(NamedTuple):
    positions: slice  # of the pack
    chunks: slice
    inner_positions: slice  # of the window: those that its edges do not touch
    inner_chunks: slice
    r: Routing  # of the window alone, on the CPU, fp64

    def cut(self, x: Tensor, where: str = "positions") -> Tensor:
        """The window's rows of x, a leaf in fp64 on the CPU."""
        return x.detach()[getattr(self, where)].cpu().double().requires_grad_()


def windows(r: Routing, places: list[float], size: int = 100) -> Iterator[Window]:
    """Windows of `size` chunks, and HALO on either side, at these places (0: the start of the pack, 1: its end)."""
    M, T = int(r.num_chunks), r.boundary_prob.shape[0]
    for place in places:
        m0 = round(place * max(M - size, 0))
        m1 = min(m0 + size, M)
        yield window(r, max(m0 - HALO, 0), m0, m1, min(m1 + HALO, M), M, T)


def window(r: Routing, c0: int, m0: int, m1: int, c1: int, M: int, T: int) -> Window:
    def start(m: int) -> int:
        return T if m == M else int(r.chunk_start[m])

    a, b = start(c0), start(c1)
    cuts = [int(c) - a for c in r.cu_seqlens.tolist() if a < c < b]
    cu = torch.tensor([0, *cuts, b - a], dtype=torch.int32)
    index = r.chunk_index[a:b].cpu() - c0
    starts = r.chunk_start[c0:c1].cpu() - a
    cu_chunks = torch.searchsorted(starts, cu).to(torch.int32)
    prob, selected = (x.detach()[a:b].cpu().double().requires_grad_() for x in (r.boundary_prob, r.selected_prob))
    sub = Routing(
        prob, r.boundary_mask[a:b].cpu(), selected, index, starts, cu_chunks, cu, prob.new_zeros(len(cu) - 1),
        prob.new_zeros(len(cu) - 1), torch.tensor(0, dtype=torch.int32),
    )  # fmt: skip
    return Window(
        slice(a, b), slice(c0, c1), slice(start(m0) - a, start(m1) - a), slice(m0 - c0, m1 - c0), sub
    )  # fmt: skip
