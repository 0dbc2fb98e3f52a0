"""The layout of a packed batch, and what mixers derive from it."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

WASTE = 1.25  # sequences whose lengths differ by no more than this factor are padded together


class Groups(NamedTuple):
    """Sequences of about equal length, padded to the longest of their group, groups end to end."""

    shapes: list[tuple[int, int]]  # (sequences, longest) of each group
    rows: Tensor | None  # (sum of lengths,) int64: place of each row; None if nothing has to move
    size: int  # rows of all groups together


class Pack:
    """N sequences end to end in T rows. Rows from cu_seqlens[-1] on, if any, are padding (a budgeted inner stage).

    cu_seqlens: (N+1,) int32.  max_seqlen: an upper bound on sequence length, known without reading the device.
    padded: there may be padding rows.
    Everything else is computed when first asked for and shared by all layers of the stage.
    """

    def __init__(self, cu_seqlens: Tensor, T: int, max_seqlen: int | None = None, padded: bool = False) -> None:
        self.cu_seqlens = cu_seqlens
        self.T = T
        self.padded = padded
        self.max_seqlen = T if max_seqlen is None else max_seqlen

        self._rotary: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def N(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @cached_property
    def seq_idx(self) -> Tensor:
        """(T,) int32: the sequence of each row; N for padding."""
        rows = torch.arange(self.T, device=self.cu_seqlens.device, dtype=torch.int32)
        return torch.bucketize(rows, self.cu_seqlens[1:], right=True, out_int32=True)

    @cached_property
    def position(self) -> Tensor:
        """(T,) int32: place of each row in its sequence (padding counts as one more sequence)."""
        rows = torch.arange(self.T, device=self.cu_seqlens.device, dtype=torch.int32)
        return rows - self.cu_seqlens[self.seq_idx.long()]

    def rotary(self, dim: int) -> tuple[Tensor, Tensor]:
        """cos, sin (T, 1, 1, dim / 2) fp32 of every row's position"""
        if dim not in self._rotary:
            self._rotary[dim] = rotary(self.position, dim)
        return self._rotary[dim]

    @cached_property
    def lengths(self) -> list[int]:
        """Sequence lengths on the host. Free on a CPU; waits for the device elsewhere."""
        return (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).tolist()

    @cached_property
    def groups(self) -> Groups:
        lengths, used = self.lengths, sum(self.lengths)
        order = sorted((n for n in range(len(lengths)) if lengths[n]), key=lengths.__getitem__)
        if used == self.T and len(set(lengths)) == 1:
            return Groups([(len(lengths), lengths[0])], None, used)
        shapes, place, i, base = [], torch.empty(len(lengths), dtype=torch.int64), 0, 0
        while i < len(order):
            limit = max(lengths[order[i]] * WASTE, lengths[order[i]] + 8)
            j = next((j for j in range(i, len(order)) if lengths[order[j]] > limit), len(order))
            longest = lengths[order[j - 1]]
            for n in order[i:j]:
                place[n], base = base, base + longest
            shapes.append((j - i, longest))
            i = j
        rows = place.to(self.cu_seqlens.device)[self.seq_idx[:used].long()] + self.position[:used]
        return Groups(shapes, rows, base)

    @cached_property
    def starts(self) -> list[int]:
        return self.cu_seqlens[:-1].tolist()


def rotary(position: Tensor, dim: int, base: float = 1e4) -> tuple[Tensor, Tensor]:
    """cos, sin (T, 1, 1, dim / 2) fp32"""
    angle = (position.float()[:, None] * inverse_frequencies(dim, base, position.device))[:, None, None, :]
    return angle.cos(), angle.sin()


def inverse_frequencies(dim: int, base: float = 1e4, device: torch.device | str = "cpu") -> Tensor:
    """(dim / 2,) fp32"""
    return base ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
