"""Whether a run's training step becomes a CUDA graph (captured.py), and if not, why."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch

from hnet.device import World, pick_autocast
from hnet.errors import UserError
from hnet.model import attention
from hnet.model.cost import positions_per_byte
from hnet.model.mamba2 import Mamba2

from . import captured
from .captured import CapturedStep
from .device_step import DeviceStep

SMALL = 2e13  # FLOP of a micro-batch, about 50 ms of an H100: above, the host starts kernels faster than they run


def capture(config: Any, inner: DeviceStep, device: torch.device, world: World) -> tuple[CapturedStep | None, str]:
    """The step to replay, or None and the reason, which is empty where nobody asked.

    Raises:
        UserError: cuda_graph is "on" and it cannot be.
    """
    setting = getattr(config, "cuda_graph", "off")
    if setting == "off" or (setting == "auto" and device.type == "cpu"):
        return None, ""
    task = inner.task
    why = obstacle(config, task, device, world)
    if setting == "on" and why:
        raise UserError(f"cuda_graph must be auto or off here, got 'on': {why}")
    if setting == "auto":
        why = why or doubt(config, task)
    if why:
        return None, why
    T = task.pack_bytes
    limit = min((math.ceil(m * T) for m in config.max_chunks), default=T)
    return CapturedStep(
        inner, device, captured.CudaGraph(device), positions=T, accumulation=config.accumulation,
        longest=config.seq_len, limit=limit, required=setting == "on",
    ), ""  # fmt: skip


def obstacle(config: Any, task: Any, device: torch.device, world: World) -> str:
    """Why the step cannot be recorded, as far as is known without trying; empty if nothing is in the way."""
    if device.type != "cuda":
        return f"it needs a GPU, and the device is {device.type}"
    if world.size > 1:
        return "several processes, and what they send one another is not recorded"
    if task.model.config.num_stages > 1 and not config.max_chunks:
        return "max_chunks is not set, and without it the host reads the number of chunks in every step"
    if any(isinstance(m, attention.CausalAttention) for m in task.model.modules()):
        if pick_autocast(config.dtype, device) is None:
            return "attention in fp32 sorts sequences by length on the host; dtype = 'bf16' does not"
        if attention._cuda_varlen() is None:
            return "this PyTorch has no attention for packed sequences, and flash-attn is not installed"
    if config.recompute and config.dropout:
        return "recompute with dropout keeps states of the random generator on the host"
    return ""


def doubt(config: Any, task: Any) -> str:
    """Why "auto" leaves it, though it may be possible."""
    if importlib.util.find_spec("mamba_ssm") and any(isinstance(m, Mamba2) for m in task.model.modules()):
        return "mamba-ssm's kernels have never been recorded; cuda_graph = 'on' tries"
    shares = positions_per_byte(config.compression)
    flops = task.pack_bytes * sum(cost.flops * share for cost, share in zip(task.costs, shares, strict=True))
    if flops > SMALL:
        return f"a micro-batch is {flops:.2g} FLOP, long enough for the host to keep ahead; cuda_graph = 'on' insists"
    return ""
