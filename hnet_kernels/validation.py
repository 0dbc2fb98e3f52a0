"""Argument checks shared by the ops. Each raises before any kernel runs, naming what was given and expected."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import Routing


def check_matrix(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{name} must be packed rows (T, D), got shape {tuple(x.shape)}")


def check_like(name: str, x: Tensor, ref_name: str, ref: Tensor) -> None:
    check_matrix(name, x)
    if x.shape != ref.shape:
        raise ValueError(f"{name} must have the shape of {ref_name}, {tuple(ref.shape)}, got {tuple(x.shape)}")
    check_device(name, x, ref_name, ref)


def check_device(name: str, x: Tensor, ref_name: str, ref: Tensor) -> None:
    if x.device != ref.device:
        raise ValueError(f"{name} must be on the device of {ref_name}, {ref.device}, got {x.device}")


def check_vector(name: str, x: Tensor, length: int, dtype: torch.dtype, ref_name: str, ref: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    if x.dim() != 1 or x.shape[0] != length:
        raise ValueError(f"{name} must have shape ({length},), got {tuple(x.shape)}")
    check_device(name, x, ref_name, ref)


def check_cu_seqlens(cu_seqlens: Tensor, ref_name: str, ref: Tensor) -> None:
    """Shape, dtype and device. The values are read only where that is free: `check_cu_seqlens_values`."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (N+1,), got {tuple(cu_seqlens.shape)}")
    check_device("cu_seqlens", cu_seqlens, ref_name, ref)


def check_cu_seqlens_values(cu_seqlens: Tensor, T: int, padded: bool = False) -> None:
    """Starts at 0, does not decrease, ends at T (or before it, if `padded`). Reads only CPU tensors: never a sync."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    cu = cu_seqlens.tolist()
    if cu[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {cu[0]}")
    for i in range(1, len(cu)):
        if cu[i] < cu[i - 1]:
            raise ValueError(f"cu_seqlens must not decrease, got {cu[i - 1]} before {cu[i]} at index {i}")
    if cu[-1] > T if padded else cu[-1] != T:
        raise ValueError(f"cu_seqlens must end at T = {T}, the number of positions, got {cu[-1]}")


def check_routing(r: Routing, ref_name: str, ref: Tensor) -> None:
    if not isinstance(r, Routing):
        raise TypeError(f"r must be the Routing that hnet_kernels.route returned, got {type(r).__name__}")
    check_device("r", r.boundary_mask, ref_name, ref)


def check_probability_dtype(name: str, p: Tensor, x: Tensor) -> None:
    """Probabilities are fp32 next to fp32, bf16 or fp16 rows and fp64 next to fp64 rows."""
    want = torch.float64 if x.dtype == torch.float64 else torch.float32
    if p.dtype != want:
        raise TypeError(f"{name} must be {want} next to {x.dtype} rows, got {p.dtype}")
