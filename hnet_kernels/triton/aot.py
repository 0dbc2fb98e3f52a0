"""Compiles every kernel ahead of time, without a GPU, exactly as it is launched, and reports what it uses.

`python -m hnet_kernels.info --compile` prints the table and fails on a register spill, on more shared memory than the
device has, and where registers and shared memory leave room for less than a quarter of the warps a multiprocessor can
hold, unless the kernel says why that is enough. Built for every target: rows of 256 to 2048 columns in bf16 and fp32;
at one width also fp16, and in every dtype the kernel with all of its optional arguments; with none of them, and (once,
as only Triton's front end cares, and only to see that it compiles) rows of one column, whose stride of 1 Triton turns
into a constant.

What a kernel used is kept under ~/.cache/hnet-kernels by the hash of its file, so that a second run only compiles what
has changed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
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

from . import common
from .common import Kernel

FILES = ("routing", "compaction", "pool", "dechunk", "ratio_loss", "ema", "ssd", "ssd_edges")
WIDTHS = (256, 1024, 1536, 2048)
WIDTH = 1024  # where one must do
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
LEAST = 0.25  # of the warps of a multiprocessor


class Target(NamedTuple):
    """shared: what a block may ask for, in bytes, on the smallest device that runs the target's code (sm_80: sm_86 and
    89). The rest is of one multiprocessor: shared memory, warps, blocks."""

    gpu: GPUTarget
    shared: int
    all_shared: int
    warps: int
    blocks: int

    def resident(self, registers: int, warps: int, shared: int) -> int:
        """Warps resident on a multiprocessor with blocks of `warps` warps, in each of its four quarters registers for
        16384 threads' worth (NVIDIA: 32 threads a warp, 8 registers at a time; AMD: 512 a lane, 8 waves at most)."""
        if self.gpu.backend == "hip":
            quarter = min(8, 512 // (-(-max(registers, 1) // 8) * 8))
            by_shared = self.all_shared // max(shared, 1)
        else:
            quarter = 16384 // (-(-max(registers, 1) // 8) * 8 * 32)
            by_shared = self.all_shared // (shared + 1024)
        return min(4 * quarter // warps, by_shared, self.blocks, self.warps // warps) * warps


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 99 << 10, 164 << 10, 64, 32),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 64, 32),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 64, 32),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 << 10, 100 << 10, 48, 24),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 32, 32),
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
    resident: int  # warps on a multiprocessor

    @property
    def problems(self) -> list[str]:
        target = TARGETS[self.variant.target]
        if self.variant.case == "ones":  # so narrow that what it needs is no matter
            return []
        moved = target.gpu.backend == "hip" and not self.stack and kernels()[self.variant.kernel].moved
        found = [f"{self.spills} spilled"] if self.spills and not moved else []
        if self.shared > target.shared:
            found.append(f"{self.shared} of {target.shared} B shared")
        if self.resident < LEAST * target.warps and not kernels()[self.variant.kernel].few_warps:
            found.append(f"{self.resident} of {target.warps} warps, and the kernel does not say why that is enough")
        return found

    @property
    def ok(self) -> bool:
        return not self.problems


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
        widths = (WIDTHS if target == "sm_90" else WIDTHS[1:]) if "D" in planned else (WIDTH,)
        for dtype in ("bf16", "fp32") if by_dtype else ("bf16",):
            yield from (Variant(name, dtype, D, "planned", target) for D in widths)
        if by_dtype:
            yield Variant(name, "fp16", WIDTH, "planned", target)
        flags = {on for flag, on in planned.items() if _optional(flag)}
        if False in flags:
            yield from (Variant(name, d, WIDTH, "full", target) for d in (DTYPES if by_dtype else ("bf16",)))
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
    gpu = TARGETS[target].gpu
    code = source(kernel, f"*{dtype}", f"*{dtype}" if case == "even" else "*fp32", constexprs, aligned=case != "ones")
    binary = triton.compile(code, target=gpu, options=options)
    used = amd_usage(binary.asm["amdgcn"]) if gpu.backend == "hip" else nvidia_usage(binary.asm, target)
    shared = binary.metadata.shared
    return Report(variant, *used, shared, TARGETS[target].resident(used[0], binary.metadata.num_warps, shared))


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


def _kept(name: str, kernel: Kernel) -> Path:
    """Where the reports of a kernel are kept: another file for other sources, another Triton or other targets."""
    sources = {Path(__file__), Path(common.__file__), Path(kernel.fn.fn.__code__.co_filename)}
    parts = [triton.__version__, repr(TARGETS), *(file.read_text() for file in sorted(sources))]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hnet-kernels" / f"gate-{name}-{key}.json"


def compile_all(names: tuple[str, ...] = (), processes: int | None = None) -> list[Report]:
    """Every variant of the kernels named (default: of all), on `processes` cores (default: those there are)."""
    found: dict[Variant, Report] = {}
    chosen = {name: kernel for name, kernel in kernels().items() if not names or name in names}
    kept = {name: _kept(name, kernel) for name, kernel in chosen.items()}
    for path in kept.values():
        if path.exists():
            found |= {(v := Variant(*first)): Report(v, *rest) for first, *rest in json.loads(path.read_text())}
    wanted = [v for name, kernel in chosen.items() for v in variants(name, kernel)]
    jobs = [v for v in wanted if v not in found]
    with ProcessPoolExecutor(processes) as pool:
        found |= {r.variant: r for r in pool.map(compile_one, jobs, chunksize=4)}
    for name in {v.kernel for v in jobs}:
        kept[name].parent.mkdir(parents=True, exist_ok=True)
        kept[name].write_text(json.dumps([found[v] for v in wanted if v.kernel == name]))
    return [found[v] for v in wanted]


def table(reports: list[Report]) -> str:
    """One line a kernel and dtype: of its variants the most registers, spills and KiB of shared memory, and the fewest
    warps that fit on a multiprocessor."""
    lines = [f"{f'triton {triton.__version__}: registers/spills/KiB/warps':48}" + "".join(f"{t:>16}" for t in TARGETS)]
    rows = {(r.variant.kernel, r.variant.dtype): None for r in reports}
    for kernel, dtype in rows:
        cells = ""
        for target in TARGETS:
            rs = [r for r in reports if r.variant[:2] == (kernel, dtype) and r.variant.target == target]
            most = [max(column) for column in zip(*((r.registers, r.spills, r.shared) for r in rs), strict=True)]
            cell = f"{most[0]}/{most[1]}/{most[2] / 1024:.0f}/{min(r.resident for r in rs)}" if rs else "-"
            cells += f"{cell:>16}"
        lines.append(f"{kernel:32}{dtype:16}{cells}")
    lines += [f"registers moved in {name} (AMD): {k.moved}" for name, k in kernels().items() if k.moved]
    lines += [f"few warps in {name}: {k.few_warps}" for name, k in kernels().items() if k.few_warps]
    return "\n".join(lines)
