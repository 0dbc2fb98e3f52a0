"""Registration of the ops with PyTorch, and the modules their backends live in."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from . import eager

_LIB = torch.library.Library("hnet_kernels", "DEF")


def define(
    schema: str,
    impl: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Registers one op: schema, Python entry (its last argument names the backend), fake, gradient.

    Returns what calls it: with `torch.ops`, or in plain eager mode straight with `impl`, to the same effect.
    """
    name = schema[: schema.index("(")]
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(f"hnet_kernels::{name}", impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hnet_kernels::{name}", fake, lib=_LIB)
    function = None
    if backward is not None:
        torch.library.register_autograd(f"hnet_kernels::{name}", backward, setup_context=setup_context, lib=_LIB)
        function = _function(name, impl, setup_context, backward)
    op = getattr(torch.ops.hnet_kernels, name)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not eager.plain(args):  # said here too for Dynamo, which looks no further
            return op(*args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return impl(*args)
        return op(*args) if function is None else function.apply(*args)  # where none is registered, PyTorch says so

    return call


def _function(name: str, impl: Callable, setup_context: Callable | None, backward: Callable) -> Any:
    """What `register_autograd` makes for the dispatcher, without it."""

    def forward(ctx, *args):
        output = impl(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"_{name}", (torch.autograd.Function,), methods)


@functools.cache
def kernels(backend: str, op_file: str) -> ModuleType:
    """The module that implements the ops of `op_file` on `backend`."""
    if backend == "cpu":
        return importlib.import_module("hnet_kernels.native")
    return importlib.import_module(f"hnet_kernels.{backend}.{op_file}")
