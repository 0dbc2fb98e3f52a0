"""Tensors that are spread over the processes (DTensor, with fsdp), and tensors that are not, treated alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def sharded(model: nn.Module) -> bool:
    """True if the parameters are spread over the processes."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def local(x: Any) -> Tensor:
    """The rows of x that are here, sharing its memory."""
    with torch.no_grad():
        return x.to_local() if hasattr(x, "to_local") else x


def full(x: Any) -> Tensor:
    """All of x, on all processes, who all must ask; on the CPU if it was spread."""
    return x.detach().full_tensor().cpu() if hasattr(x, "full_tensor") else x


def like(x: Tensor, other: Any) -> Tensor:
    """x, which every process has, spread as `other` is. Sends nothing. Unchanged if it has another shape."""
    if not hasattr(other, "full_tensor") or x.shape != other.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def all_like(state: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: like(v, others[k]) if k in others else v for k, v in state.items()}
