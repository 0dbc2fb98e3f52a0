"""Where a run computes: device, precision, and which of several processes this is."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hnet.errors import UserError


class World(NamedTuple):
    rank: int
    size: int
    local_rank: int

    @property
    def main(self) -> bool:
        """This process writes files and talks."""
        return self.rank == 0


def pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda' but PyTorch sees no CUDA device")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def pick_autocast(name: str, device: torch.device) -> torch.dtype | None:
    """bf16 where the matrix units have it: every GPU we support, and CPUs with AVX512-BF16 (1.3x a training step
    there; without it bf16 is far slower than fp32)."""
    if name == "auto":
        fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if name == "bf16" else None


def set_matmul_precision(device: torch.device, tf32: bool) -> None:
    """How this process multiplies fp32 matrices on a GPU: in TF32 (a mantissa of 10 bits, sums in fp32) or as they are.
    For a CPU nothing is set."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")


def out_of_memory(e: BaseException) -> bool:
    return isinstance(e, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(e)
