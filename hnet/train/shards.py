"""Tensors that are spread over the processes by rows (DTensor, with fsdp), and tensors that are not, treated alike.

                process 0    process 1                          what it gives
    spread x    rows 0..3    rows 4..7
                    |            |
    local_rows  rows 0..3    rows 4..7    a plain tensor, the memory of x; sends nothing
    all_rows    rows 0..7    rows 0..7    a plain tensor, a copy; sends: all processes must ask
    spread_like rows 0..3    rows 4..7    the way back: of a plain tensor with all rows, which all have; sends nothing
    joined      rows 0..7    rows 0..7    of plain tensors, each process's rows of one; sends: all processes must ask
    rows_here   rows 0..3    rows 4..7    of a plain tensor with all rows: a view of those that are here; sends nothing

A tensor that is not spread (ddp, one process) comes back as it is from all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def sharded(model: nn.Module) -> bool:
    """True if the parameters are spread over the processes."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def local_rows(x: Any) -> Tensor:
    """The rows of x (R, ...) that are here (r, ...), sharing its memory."""
    if not hasattr(x, "to_local"):
        return x
    with torch.no_grad():
        return x.to_local()


def all_rows(x: Any) -> Tensor:
    """All of x (R, ...) on all processes, who all must ask; on the CPU if it was spread."""
    return x.detach().full_tensor().cpu() if hasattr(x, "full_tensor") else x


def spread_like(x: Tensor, other: Any) -> Tensor:
    """x (R, ...), which every process has, spread as `other` is. Unchanged if it has another shape."""
    if not hasattr(other, "full_tensor") or x.shape != other.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def joined(rows: Tensor, like: Any) -> Tensor:
    """(R, ...), all rows, of a tensor whose rows here are `rows`, where `like` is spread. On its device."""
    if not hasattr(like, "full_tensor"):
        return rows
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    spread = DTensor.from_local(rows, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return spread.full_tensor()


def rows_here(x: Tensor, like: Any) -> Tensor:
    """The rows of x (R, ...) that `like` has here."""
    if not hasattr(like, "full_tensor"):
        return x
    rows = -(-x.shape[0] // like.device_mesh.size())  # of the first processes; the last have what is left
    first = like.device_mesh.get_local_rank() * rows
    return x[first : first + rows]


def spread_state_like(state: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`spread_like` for every name that `others` has too."""
    return {k: spread_like(v, others[k]) if k in others else v for k, v in state.items()}
