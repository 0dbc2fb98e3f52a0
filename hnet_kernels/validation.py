"""Argument checks shared by the ops. Each raises before any kernel runs, naming what was given and expected.

What a tensor holds is read only where that is free, on a CPU outside of a trace, and never costs a GPU a wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .types import Routing

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_LOGIT_BIAS = 80.0  # e^beta and its inverse are fp32 numbers


def check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {x.layout}")


def check_matrix(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.dtype not in ROW_DTYPES:
        raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64, got {x.dtype}")
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


def check_vector(name: str, x: Tensor, length: int | None, dtype: torch.dtype, ref_name: str, ref: Tensor) -> None:
    """length None: any."""
    check_tensor(name, x)
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    if x.dim() != 1 or (length is not None and x.shape[0] != length):
        want = "M" if length is None else length
        raise ValueError(
            f"{name} must have shape ({want},), got {tuple(x.shape)}, next to {ref_name} of {tuple(ref.shape)}"
        )
    check_device(name, x, ref_name, ref)


def check_state(name: str, x: Tensor, B: int, of: str, z: Tensor) -> None:
    """One row for each of B sequences, which `of` gives, as wide as z."""
    check_tensor(name, x)
    shape, dtype = (B, z.shape[1]), probability_dtype(z)
    if x.shape != shape or x.dtype != dtype:
        raise ValueError(
            f"{name} must be {dtype} of shape {shape}, by {of} and the width of z, got {x.dtype} {tuple(x.shape)}"
        )
    check_device(name, x, "z", z)


def check_rows(name: str, x: Tensor, shape: torch.Size, dtype: torch.dtype, ref: Tensor) -> None:
    check_matrix(name, x)
    if x.shape != shape or x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} of shape {tuple(shape)}, next to x, got {x.dtype} {tuple(x.shape)}")
    check_device(name, x, "x", ref)


def check_channels(name: str, x: Tensor, shape: tuple[int, ...], ref: Tensor) -> None:
    """A parameter next to rows x."""
    check_tensor(name, x)
    if x.dtype not in ROW_DTYPES:
        raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64, got {x.dtype}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, next to x of {tuple(ref.shape)}, got {tuple(x.shape)}")
    check_device(name, x, "x", ref)


def check_flag(name: str, x: bool) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {x!r}")


def readable(x: Tensor) -> bool:
    """Whether a look at the values is free: on a CPU, and no tensor of a tracer."""
    return not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"


def check_cu_seqlens(cu_seqlens: Tensor, ref_name: str, ref: Tensor, name: str = "cu_seqlens") -> None:
    """Shape, dtype and device. The values: `check_cu_seqlens_values`."""
    check_tensor(name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must have shape (N+1,), got {tuple(cu_seqlens.shape)}")
    check_device(name, cu_seqlens, ref_name, ref)


def check_cu_seqlens_values(cu_seqlens: Tensor, T: int, padded: bool = False) -> None:
    """Starts at 0, does not decrease, ends at T (or before it, if `padded`)."""
    if not readable(cu_seqlens):
        return
    cu = cu_seqlens.tolist()
    if cu[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {cu[0]}")
    for i in range(1, len(cu)):
        if cu[i] < cu[i - 1]:
            raise ValueError(f"cu_seqlens must not decrease, got {cu[i - 1]} before {cu[i]} at index {i}")
    if cu[-1] > T if padded else cu[-1] != T:
        raise ValueError(f"cu_seqlens must end at T = {T}, the number of positions, got {cu[-1]}")


def check_logit_bias(logit_bias: float | Tensor, ref_name: str, ref: Tensor) -> None:
    if isinstance(logit_bias, Tensor):
        if logit_bias.dim() != 0 or not logit_bias.dtype.is_floating_point:
            raise ValueError(
                f"logit_bias must be a float or a 0-d float tensor, got {logit_bias.dtype} {tuple(logit_bias.shape)}"
            )
        check_device("logit_bias", logit_bias, ref_name, ref)
        if not readable(logit_bias):
            return
        logit_bias = logit_bias.item()
    elif torch.compiler.is_compiling():
        return
    elif not isinstance(logit_bias, int | float):
        raise TypeError(f"logit_bias must be a float or a 0-d float tensor, got {type(logit_bias).__name__}")
    if not abs(logit_bias) <= MAX_LOGIT_BIAS:
        raise ValueError(f"logit_bias must be from {-MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}, got {logit_bias}")


def check_routing(r: Routing, ref_name: str, ref: Tensor) -> None:
    """The layout of the chunks, which every kernel trusts for its addresses."""
    if not isinstance(r, Routing):
        raise TypeError(f"r must be the Routing that hnet_kernels.route returned, got {type(r).__name__}")
    check_tensor("r.chunk_index", r.chunk_index)
    check_device("r", r.chunk_index, ref_name, ref)
    check_vector("r.chunk_index", r.chunk_index, None, torch.int32, ref_name, ref)
    check_vector("r.chunk_start", r.chunk_start, None, torch.int32, ref_name, ref)
    check_sequences(r, ref_name, ref)


def check_sequences(r: Routing, ref_name: str, ref: Tensor) -> None:
    check_cu_seqlens(r.cu_seqlens, ref_name, ref, "r.cu_seqlens")
    check_vector("r.cu_chunks", r.cu_chunks, r.cu_seqlens.shape[0], torch.int32, "r.cu_seqlens", r.cu_seqlens)


def check_routing_values(r: Routing) -> None:
    """That a Routing put together by hand is one that `route` could have made."""
    cu, cu_chunks, start, index = r.cu_seqlens, r.cu_chunks, r.chunk_start, r.chunk_index
    if not all(map(readable, (cu, cu_chunks, start, index))):
        return
    check_cu_seqlens_values(cu, index.shape[0], padded=True)
    chunks, used = int(cu_chunks[-1]), cu_chunks.diff() > 0
    ok = int(cu_chunks[0]) == 0 and chunks <= start.shape[0] and bool((cu_chunks.diff() >= 0).all())
    ok = ok and torch.equal(used, cu.diff() > 0)
    if ok and chunks:
        start = start[:chunks]
        ok = torch.equal(start[cu_chunks[:-1][used].long()], cu[:-1][used])
        ok = ok and bool((start.diff() > 0).all()) and bool(start[-1] < cu[-1])
        place = torch.arange(int(cu[-1]), dtype=torch.int32)
        ok = ok and torch.equal(index[: int(cu[-1])].long(), torch.bucketize(place, start, right=True) - 1)
    if not ok:
        raise ValueError(
            "routing is inconsistent: chunk_start must rise within each sequence and begin at its first position, "
            "cu_chunks must count its entries and chunk_index name the last of them at or before a position"
        )


def probability_dtype(x: Tensor) -> torch.dtype:
    """Probabilities are fp32 next to fp32, bf16 or fp16 rows and fp64 next to fp64 rows."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
