"""Compiles every kernel ahead of time, without a GPU, exactly as it is launched, and reports what it uses.

`python -m hnet_kernels.info --compile` prints the table and fails on a register spill or on more shared memory than the
device has. Widths 256 to 2048, fp32 and bf16 rows, for sm_80, sm_90, sm_100 and gfx942.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .common import Kernel

FILES = ("routing", "pool", "dechunk", "ema")
WIDTHS = (256, 1024, 1536, 2048)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}


class Report(NamedTuple):
    kernel: str
    dtype: str
    D: int
    target: str
    registers: int
    spills: int  # bytes on NVIDIA, registers on AMD
    shared: int  # bytes
    limit: int

    @property
    def ok(self) -> bool:
        return self.spills == 0 and self.shared <= self.limit


def kernels() -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    for file in FILES:
        found |= importlib.import_module(f"hnet_kernels.triton.{file}").KERNELS
    return found


def variants(kernel: Kernel) -> Iterator[tuple[str, int]]:
    """(dtype, D) that give different code: dtype only matters if rows are read, D only if it is a constexpr."""
    by_dtype = any(kind == "*T" for kind in kernel.args.values())
    by_width = "D" in kernel.plan(1024, torch.bfloat16)[0]
    for dtype in DTYPES if by_dtype else ("bf16",):
        yield from ((dtype, D) for D in (WIDTHS if by_width else (1024,)))


def compile_one(name: str, dtype: str, D: int, target: str) -> Report:
    kernel = kernels()[name]
    constexprs, options = kernel.plan(D, DTYPES[dtype])
    if target.startswith("gfx") and constexprs.get("PRECISION") == "tf32x3":
        constexprs = {**constexprs, "PRECISION": "ieee"}  # as the launcher chooses there
    signature = {n: kind.replace("*T", f"*{dtype}") for n, kind in kernel.args.items()}
    signature |= dict.fromkeys(constexprs, "constexpr")
    aligned = [n for n, kind in kernel.args.items() if kind.startswith("*") or n.endswith("stride")]
    names = kernel.fn.arg_names
    attrs: Any = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    gpu, limit = TARGETS[target]
    binary = triton.compile(ASTSource(kernel.fn, signature, constexprs, attrs), target=gpu, options=options)
    registers, spills = (
        amd_usage(binary.asm["amdgcn"]) if gpu.backend == "hip" else nvidia_usage(binary.asm["ptx"], target)
    )
    return Report(name, dtype, D, target, registers, spills, binary.metadata.shared, limit)


def amd_usage(assembly: str) -> tuple[int, int]:
    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    return value("vgpr_count"), value("vgpr_spill_count") + value("sgpr_spill_count")


def nvidia_usage(ptx: str, target: str) -> tuple[int, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = tools / ("ptxas-blackwell" if target == "sm_100" and (tools / "ptxas-blackwell").exists() else "ptxas")
    arch = re.search(r"\.target (\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            str(ptxas),
            "-v",
            f"-arch={arch[1] if arch else target}",
            str(source),
            "-o",
            f"{folder}/kernel.cubin",
        ]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return int(used[1]) if used else 0, sum(map(int, spilled.groups()[1:])) if spilled else 0


def compile_all(widths: tuple[int, ...] = WIDTHS, processes: int | None = None) -> list[Report]:
    jobs = [
        (name, dtype, D, target)
        for name, kernel in kernels().items()
        for dtype, D in variants(kernel)
        if D in widths or D == 1024
        for target in TARGETS
    ]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(compile_one, *zip(*jobs, strict=True), chunksize=4))


def table(reports: list[Report]) -> str:
    """One line a kernel and dtype: registers, and shared memory in KiB, over the widths, for each target."""
    lines = [f"{'kernel':24} {'rows':5}" + "".join(f"{t + ' regs/spill/KiB':>26}" for t in TARGETS)]
    groups: dict[tuple[str, str], dict[str, list[Report]]] = {}
    for r in reports:
        groups.setdefault((r.kernel, r.dtype), {}).setdefault(r.target, []).append(r)
    for (kernel, dtype), by_target in groups.items():
        cells = ""
        for target in TARGETS:
            rs = by_target.get(target, [])
            regs, spills, shared = max(r.registers for r in rs), max(r.spills for r in rs), max(r.shared for r in rs)
            cells += f"{f'{regs}/{spills}/{shared / 1024:.0f}':>26}"
        lines.append(f"{kernel:24} {dtype:5}{cells}")
    return "\n".join(lines)
