"""`python -m hnet_kernels.info`: what is built, what is usable, and why not."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from . import __version__, dispatch

OPS = (
    "route",
    "pool",
    "dechunk",
    "ema",
    "route_step",
    "dechunk_step",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "gated_conv",
    "mamba2",
    "swiglu",
)


def report() -> str:
    """One readable page."""
    lines = [
        f"hnet-kernels {__version__} on {platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    ]
    if dispatch._environment_error is not None:
        return f"{lines[0]}\nNOTHING RUNS: {dispatch._environment_error}"
    error = dispatch.native_error()
    if error is None:
        _C = importlib.import_module("hnet_kernels._C")
        lines.append(
            f"native extension: built; CPU kernels for {_C.cpu_isa()}, OpenMP {'on' if _C.has_openmp() else 'off'}, "
            f"{torch.get_num_threads()} threads; "
            + (f"CUDA kernels for {_C.cuda_archs()}" if _C.has_cuda() else "CUDA kernels not built")
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


def compile_gate() -> int:
    """Compile every Triton kernel ahead of time for every target; 1 if one spills or leaves room for too few warps."""
    from .triton.aot import compile_all, table

    reports = compile_all()
    print(table(reports))
    bad = [r for r in reports if not r.ok]
    for r in bad:
        print(f"FAILED {' '.join(map(str, r.variant))}: {'; '.join(r.problems)}")
    print(f"{len(reports)} compiled, {len(bad)} over the limits")
    return int(bool(bad))


def compile_gate_under(folder: str) -> int:
    """The gate under another Triton, the one in `folder` (pip install --no-deps --target FOLDER triton==...)."""
    if not (Path(folder) / "triton").is_dir():
        print(f"there is no triton in {folder}: pip install --no-deps --target {folder} triton==VERSION")
        return 2
    paths = [str(Path(folder).resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "hnet_kernels.info", "--compile"]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m hnet_kernels.info", description="What is built and usable here.")
    parser.add_argument(
        "--compile", action="store_true", help="compile every Triton kernel ahead of time; needs no GPU"
    )
    parser.add_argument("--triton", metavar="FOLDER", help="with --compile: under the triton in this folder")
    args = parser.parse_args()
    if args.compile:
        sys.exit(compile_gate_under(args.triton) if args.triton else compile_gate())
    print(report())
