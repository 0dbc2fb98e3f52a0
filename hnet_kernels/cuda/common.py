"""Calls into the CUDA part of the native extension."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hnet_kernels import native


def extension():
    return importlib.import_module("hnet_kernels._C")


def run(launch: Callable[[int, int], None], like: Tensor) -> None:
    """launch(device, stream) with the device of `like` current, on PyTorch's current stream there."""
    index = like.device.index
    if index == torch.cuda.current_device():
        launch(index, torch.cuda.current_stream().cuda_stream)
    else:
        with torch.cuda.device(index):
            launch(index, torch.cuda.current_stream().cuda_stream)


def call(function: str, like: Tensor, *args) -> None:
    """Launches `function` where `like` is. Copies made of arguments go back to PyTorch's allocator, which reuses them
    in stream order."""
    flat, _alive = native.pointers(args)
    run(partial(getattr(extension(), function), *flat), like)


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)
