"""Registration of the ops with PyTorch, and the modules their backends live in."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch

_LIB = torch.library.Library("hnet_kernels", "DEF")


def define(
    schema: str,
    impl: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Registers one op: schema, Python entry (its last argument names the backend), fake, gradient."""
    name = f"hnet_kernels::{schema[: schema.index('(')]}"
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIB)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIB)


@functools.cache
def kernels(backend: str, op_file: str) -> ModuleType:
    """The module that implements the ops of `op_file` on `backend`."""
    if backend == "cpu":
        return importlib.import_module("hnet_kernels.native")
    return importlib.import_module(f"hnet_kernels.{backend}.{op_file}")
