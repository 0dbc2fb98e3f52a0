"""`python -m hnet_kernels.info`: what is built, what is usable, and why not."""

from __future__ import annotations

import importlib
import platform

import torch

from . import dispatch

OPS = ("route", "pool", "dechunk", "ema", "route_step", "dechunk_step")


def report() -> str:
    """One readable page."""
    lines = [
        f"hnet-kernels on {platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    ]
    error = dispatch.native_error()
    if error is None:
        _C = importlib.import_module("hnet_kernels._C")
        lines.append(
            f"native extension: built; CPU kernels for {_C.cpu_isa()}, OpenMP {'on' if _C.has_openmp() else 'off'}, "
            f"{torch.get_num_threads()} threads; CUDA kernels {'built' if _C.has_cuda() else 'not built'}"
        )
    else:
        lines.append(f"native extension: {error}")
    lines.append(f"triton: {dispatch.triton_error() or 'installed'}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        lines.append(f"GPU: {torch.cuda.get_device_name()}")
    else:
        lines.append("GPU: PyTorch sees none")
    for device in devices:
        lines.append(f"on {device}:")
        for name in dispatch.BACKENDS:
            reason = dispatch.why_not(name, "route", device, torch.float32)
            lines.append(f"  {name:9} {'usable' if reason is None else reason}")
        auto = {op: dispatch.resolve("auto", op, torch.empty(0, device=device)) for op in OPS}
        chosen = "; ".join(f"{b} for {', '.join(o for o in OPS if auto[o] == b)}" for b in dict.fromkeys(auto.values()))
        lines.append(f"  auto picks {chosen}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
