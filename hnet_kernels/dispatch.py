"""Which backend runs a call.

`reference` is plain PyTorch, `cpu` the native extension, `triton` and `cuda` the GPU kernels. `auto`, the default,
takes the first usable of triton/cuda/cpu and else the reference; HNET_KERNELS_PREFER, a list like "cuda:route", puts a
GPU backend first for the ops it names. A backend named by hand is never replaced: if it cannot run, `resolve` raises
and lists the reason of every backend. `cuda` for all that a block calls means CUDA C++ where an op has it and Triton
where it has not; in a call of one op it means that op's CUDA kernel.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "triton", "cuda")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

GPU_OPS = frozenset({"mamba2"})  # ops without a C++ kernel for CPUs

# Ops with a CUDA C++ kernel, and those where `auto` prefers it to Triton: none until a measurement in
# benchmarks/results shows one ahead. Fewer launches are only a reason to measure.
CUDA_OPS = frozenset({"route", "route_step", "dechunk_step"})
CUDA_PREFERRED: frozenset[str] = frozenset()

# Ops with kernels for a CPU only: on a GPU, PyTorch has them fused, or torch.compile fuses them.
CPU_OPS = frozenset({"add_rms_norm", "attention", "cross_entropy", "gated_conv", "swiglu"})


class BackendUnavailable(RuntimeError):
    """The backend that was named cannot run here."""


def _check_name(name: str, where: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{where} must be one of {', '.join((*BACKENDS, 'auto'))}, got {name!r}")
    return name


def preferences(text: str) -> dict[str, str]:
    """Op to backend, from HNET_KERNELS_PREFER: "cuda:route,cuda:dechunk_step"."""
    found = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, op = item.partition(":")
        if name not in ("triton", "cuda") or op not in CUDA_OPS:
            raise ValueError(
                "HNET_KERNELS_PREFER must be a list of cuda:OP or triton:OP, with OP one of "
                f"{', '.join(sorted(CUDA_OPS))}, got {item!r}"
            )
        found[op] = name
    return found


_active, _preferred = os.environ.get("HNET_KERNELS_BACKEND", "auto"), dict.fromkeys(CUDA_PREFERRED, "cuda")
_environment_error: str | None = None  # an import that fails could only end in a traceback
try:
    _check_name(_active, "HNET_KERNELS_BACKEND")
    _preferred |= preferences(os.environ.get("HNET_KERNELS_PREFER", ""))
except ValueError as e:
    _environment_error = str(e)


def check_environment() -> None:
    """
    Raises:
        ValueError: HNET_KERNELS_BACKEND or HNET_KERNELS_PREFER is not what it must be. So does every op.
    """
    if _environment_error is not None:
        raise ValueError(_environment_error)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use backend `name` for every call inside the `with` block that does not name one itself.

    "cuda" is CUDA C++ for the ops that have it (route, route_step, dechunk_step) and Triton for the others, so that a
    whole model can run with it.
    """
    global _active
    previous, _active = _active, _check_name(name, "backend")
    try:
        yield
    finally:
        _active = previous


def in_force() -> str:
    """The name the innermost `backend(...)` block set, else HNET_KERNELS_BACKEND, else "auto"."""
    return _active


@functools.cache
def native_error() -> str | None:
    """Why the native extension cannot be used, or None."""
    try:
        importlib.import_module("hnet_kernels._C")
    except ImportError as e:
        return f"the native extension is not built or does not load ({e})"
    return None


@functools.cache
def triton_error() -> str | None:
    """Why triton cannot be used, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module("triton")
    except Exception as e:  # a broken install raises anything
        return f"triton does not import ({type(e).__name__}: {e})"
    return None


def triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(name: str, op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot run `op` on such tensors, or None if it can."""
    if name == "reference":
        return None
    if dtype not in KERNEL_DTYPES:
        return f"it takes fp32, bf16 or fp16, not {dtype}"
    if name == "cpu" and op in GPU_OPS:
        return f"{op} has no CPU kernel; there it is plain PyTorch"
    if name == "cpu":
        return native_error() or (None if device_type == "cpu" else f"the tensors are on {device_type}, not the cpu")
    if op in CPU_OPS:
        return f"{op} has no {name} kernel: on a GPU the reference runs"
    if name == "triton":
        if (error := triton_error()) is not None:
            return error
        if device_type == "cuda" or (device_type == "cpu" and triton_interpreted()):
            return None
        return f"the tensors are on {device_type}, not a GPU (TRITON_INTERPRET=1 runs it on the cpu, slowly)"
    if (error := native_error()) is not None:
        return error
    if not importlib.import_module("hnet_kernels._C").has_cuda():
        return "the native extension was built without CUDA (HNET_CUDA=ON to insist)"
    if op not in CUDA_OPS:
        return f"{op} has no CUDA C++ kernel; its GPU kernel is the triton one"
    if device_type != "cuda":
        return f"the tensors are on {device_type}, not a GPU"
    if torch.version.cuda is None:
        return "PyTorch is not built for CUDA"
    if op == "route" and (error := triton_error()) is not None:
        return f"its backward is the triton one: {error}"
    return None


def _choose(name: str, op: str, device_type: str, dtype: torch.dtype, of_many: bool) -> str:
    check_environment()
    if of_many and op in CPU_OPS and name in ("triton", "cuda"):
        name = "auto"
    if name != "auto":
        runs = "triton" if name == "cuda" and of_many and op not in CUDA_OPS else name
        if why_not(runs, op, device_type, dtype) is None:
            return runs
        reasons = "".join(f"\n  {b}: {why_not(b, op, device_type, dtype) or 'usable'}" for b in BACKENDS)
        raise BackendUnavailable(f"backend {name!r} cannot run {op} here:{reasons}")
    order: tuple[str, ...] = ("cuda", "triton", "cpu") if _preferred.get(op) == "cuda" else ("triton", "cuda", "cpu")
    if device_type == "cpu":
        order = ("cpu",)  # the interpreter is for proving kernels, never a default
    return next((b for b in order if why_not(b, op, device_type, dtype) is None), "reference")


# What torch.compiler.assume_constant_result does, without its import of Dynamo (0.8 s, and triton where installed)
vars(_choose)["_dynamo_marked_constant"] = True


def resolve(name: str | None, op: str, x: Tensor) -> str:
    """The backend for `op` on tensors like `x`: `name`, else the `backend(...)` in force, else the best usable.

    Raises:
        ValueError: `name`, or what the environment names, is not a backend.
        BackendUnavailable: the backend named cannot run here; the message has the reason of each.
    """
    if name is None:
        return _choose(_active, op, x.device.type, x.dtype, True)
    return _choose(_check_name(name, "backend"), op, x.device.type, x.dtype, False)
