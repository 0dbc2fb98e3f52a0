"""Compiles every kernel ahead of time, without a GPU, exactly as it is launched, and reports what it uses.

`python -m hnet_kernels.info --compile` prints the table and fails on a register spill or on more shared memory than
the device has. Built for every target: rows of 256 to 2048 columns in bf16 and fp32; at one width also fp16, the
kernel with all of its optional arguments and with none, and (once, as only Triton's front end cares) rows of one
column, whose stride of 1 Triton turns into a constant.
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

FILES = ("routing", "pool", "dechunk", "ratio_loss", "ema")
WIDTHS = (256, 1024, 1536, 2048)
WIDTH = 1024  # where one must do
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
# A target, and the shared memory a block may ask for on the smallest device that runs its code (sm_80: sm_86 and 89)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 99 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}


class Variant(NamedTuple):
    """One compilation of a kernel. case: "planned" is the usual call; "full" and "bare" have all and none of the
    optional arguments; "even" has "*R" rows in the dtype of the others, where the usual call has fp32 next to 16-bit
    ones; "ones" has rows of one column, and so strides equal to 1."""

    kernel: str
    dtype: str
    D: int
    case: str
    target: str


class Report(NamedTuple):
    variant: Variant
    registers: int  # of a thread; on AMD the vector registers
    spills: int  # bytes stored and loaded on NVIDIA, registers on AMD
    stack: int  # bytes of a thread
    shared: int  # bytes of a block
    limit: int

    @property
    def ok(self) -> bool:
        return self.spills == 0 and self.shared <= self.limit


def kernels() -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    for file in FILES:
        found |= importlib.import_module(f"hnet_kernels.triton.{file}").KERNELS
    return found


def variants(name: str, kernel: Kernel) -> Iterator[Variant]:
    """Those that give different code: the dtype only matters if rows are read, D only if it is a constexpr."""
    for target in TARGETS:
        planned, _ = kernel.plan(WIDTH, torch.bfloat16, target)
        by_dtype = any(kind == "*T" for kind in kernel.args.values())
        for dtype in ("bf16", "fp32") if by_dtype else ("bf16",):
            yield from (Variant(name, dtype, D, "planned", target) for D in (WIDTHS if "D" in planned else (WIDTH,)))
        if by_dtype:
            yield Variant(name, "fp16", WIDTH, "planned", target)
        flags = {on for flag, on in planned.items() if _optional(flag)}
        if False in flags:
            yield Variant(name, "bf16", WIDTH, "full", target)
        if True in flags:
            yield Variant(name, "bf16", WIDTH, "bare", target)
        if "*R" in kernel.args.values():
            yield Variant(name, "bf16", WIDTH, "even", target)
    if any(n.endswith("stride") for n in kernel.args):
        yield Variant(name, "bf16", 1, "ones", "sm_90")


def _optional(constexpr: str) -> bool:
    return constexpr.startswith("HAS_") or constexpr == "STRAIGHT_THROUGH"


def source(kernel: Kernel, rows: str, residual: str, constexprs: dict[str, Any], aligned: bool) -> ASTSource:
    """What the just-in-time compiler makes of a launch: `rows` and `residual` are the types of "*T" and "*R"; all
    pointers, and with `aligned` all strides, are multiples of 16."""
    signature = {n: {"*T": rows, "*R": residual}.get(kind, kind) for n, kind in kernel.args.items()}
    names = kernel.fn.arg_names
    attrs: Any = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n, kind in signature.items()
        if kind.startswith("*") or (aligned and n.endswith("stride"))
    }
    return ASTSource(kernel.fn, signature | dict.fromkeys(constexprs, "constexpr"), constexprs, attrs)


def compile_one(variant: Variant) -> Report:
    """Raises triton.CompilationError where the kernel does not compile."""
    name, dtype, D, case, target = variant
    kernel = kernels()[name]
    constexprs, options = kernel.plan(D, DTYPES[dtype], target)
    if case in ("full", "bare"):
        constexprs = {n: case == "full" if _optional(n) else value for n, value in constexprs.items()}
    if case == "ones":
        constexprs = constexprs | {n: 1 for n in kernel.args if n.endswith("stride")}
    gpu, limit = TARGETS[target]
    code = source(kernel, f"*{dtype}", f"*{dtype}" if case == "even" else "*fp32", constexprs, aligned=case != "ones")
    binary = triton.compile(code, target=gpu, options=options)
    used = amd_usage(binary.asm["amdgcn"]) if gpu.backend == "hip" else nvidia_usage(binary.asm, target)
    return Report(variant, *used, binary.metadata.shared, limit)


def amd_usage(assembly: str) -> tuple[int, int, int]:
    """Registers, spills, stack"""

    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"{key} is missing from the assembly that triton {triton.__version__} wrote")
        return int(found[1])

    return (
        value("vgpr_count"),
        value("vgpr_spill_count") + value("sgpr_spill_count"),
        value("private_segment_fixed_size"),
    )


def nvidia_usage(asm: Any, target: str) -> tuple[int, int, int]:
    """Registers, spills, stack. A spill needs stack, so ptxas is only asked about kernels that have some."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump says nothing of registers: {usage}")
        registers, stack = int(found[1]), int(found[2])
        if stack == 0:
            return registers, 0, 0
        ptx.write_text(asm["ptx"])
        ptxas = "ptxas-blackwell" if target in ("sm_100", "sm_120") else "ptxas"
        arch = re.search(r"\.target (\w+)", asm["ptx"])
        log = _tool(ptxas, "-v", f"-arch={arch[1] if arch else target}", str(ptx), "-o", str(cubin))
        spilled = re.findall(r"(\d+) bytes spill", log)
        return registers, sum(map(int, spilled)), stack


def _tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(path), *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def compile_all(names: tuple[str, ...] = (), processes: int | None = None) -> list[Report]:
    """Every variant of the kernels named (default: of all), on `processes` cores (default: those there are)."""
    jobs = [v for name, kernel in kernels().items() if not names or name in names for v in variants(name, kernel)]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(compile_one, jobs, chunksize=4))


def table(reports: list[Report]) -> str:
    """One line a kernel and dtype: the most registers, spills, stack and KiB of shared memory of its variants."""
    lines = [f"{'registers/spills/stack/shared KiB':38}" + "".join(f"{t:>16}" for t in TARGETS)]
    rows = {(r.variant.kernel, r.variant.dtype): None for r in reports}
    for kernel, dtype in rows:
        cells = ""
        for target in TARGETS:
            rs = [r for r in reports if r.variant[:2] == (kernel, dtype) and r.variant.target == target]
            most = [max(column) for column in zip(*(r[1:5] for r in rs), strict=True)]
            cells += f"{f'{most[0]}/{most[1]}/{most[2]}/{most[3] / 1024:.0f}':>16}"
        lines.append(f"{kernel:32}{dtype:6}{cells}")
    return "\n".join(lines)
