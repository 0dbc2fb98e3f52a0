"""What the kernels share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from hnet_kernels.dispatch import triton_interpreted

INTERPRETED = triton_interpreted()
SPLIT = 64  # positions of a block of a long chunk

# Arguments that change from batch to batch. Triton compiles another kernel for an integer that is 1 or divisible by 16;
# of these it must not, or it goes on compiling, a second at a time, far into a training run.
LENGTHS = ("T", "M", "N", "B", "steps", "num_blocks", "budget", "tiles")


def jit(fn: Callable[..., Any]) -> Any:
    """A kernel. Functions that kernels call are `triton.jit`."""
    return triton.jit(fn, do_not_specialize=LENGTHS)


Plan = Callable[[int, torch.dtype, str], tuple[dict[str, Any], dict[str, int]]]


@functools.cache
def target(device: torch.device) -> str:
    """Which of the targets of the compile gate (`aot.TARGETS`) stands for this device."""
    if device.type == "cpu":  # the interpreter
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


POINTER, LENGTH, STRIDE, NUMBER = range(4)  # what an argument is, and so what of it Triton compiles a kernel for


def _odd(kind: int, a: Any) -> bool:
    """Whether an address is not divisible by 16, an integer does not fit 32 bits."""
    return a is not None and kind != NUMBER and (a % 16 if kind == POINTER else a >> 31) != 0


@dataclass(frozen=True, eq=False)
class Kernel:
    """How a kernel is launched for rows of width D: what the launcher uses and what the compile gate builds.

    args: the run-time arguments in order, name to type: "*T" a pointer to rows of the op's dtype, "*R" to rows of that
    dtype or fp32, else as Triton writes it ("*fp32", "i32"). plan(D, dtype, target): its constexprs and options
    (num_warps, num_stages). few_warps: why less than a quarter of the warps a multiprocessor can hold are enough.
    moved: why registers that AMD's compiler moves to other registers, none to memory, do no harm.
    """

    fn: Any
    args: dict[str, str]
    plan: Plan
    few_warps: str = ""
    moved: str = ""

    @functools.cache  # noqa: B019 (a kernel lives as long as its module)
    def _blocks(self, D: int, dtype: torch.dtype, gpu: str) -> dict[str, Any]:
        return self.plan(D, dtype, gpu)[0]

    def blocks(self, x: Tensor, D: int) -> dict[str, Any]:
        """The constexprs planned for rows of width D like those of `x`."""
        return self._blocks(D, x.dtype, target(x.device))

    @functools.cached_property
    def _kinds(self) -> tuple[int, ...]:
        def kind(written: str, as_it_is: bool) -> int:
            if written.startswith("*"):
                return POINTER
            return NUMBER if written.startswith("fp") else LENGTH if as_it_is else STRIDE

        specialised = self.fn.params[: len(self.args)]
        return tuple(kind(a, p.do_not_specialize) for a, p in zip(self.args.values(), specialised, strict=True))

    @functools.cached_property
    def _compiled(self) -> dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]]:
        """The kernels launched so far, and the constexprs that go behind their arguments."""
        return {}

    def launch(self, grid: tuple[int, ...], like: Tensor, D: int, *args: Any, **constexprs: Any) -> None:
        """Launches on the device of `like`, as planned for rows of its dtype and width D.

        At every launch Triton works out anew which of the kernels it has compiled the arguments call for, at twice the
        cost of the launch. What it found is kept here, by all that it looks at: the device; the plan; of each argument
        whether it is given and its dtype; of an address whether 16 divides it; of a stride also whether it is 1; of any
        integer whether it needs 64 bits.
        """
        if 0 in grid:
            return
        index = like.device.index
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self.launch(grid, like, D, *args, **constexprs)
            return
        if INTERPRETED:
            self._through_triton(grid, like, D, args, constexprs)
            return
        flat: list[Any] = []
        key: list[Any] = [index, like.dtype, D, *constexprs.items()]
        addresses = integers = 0
        for kind, a in zip(self._kinds, args, strict=True):
            if a is None:
                key.append(None)
            elif kind == POINTER:
                key.append(a.dtype)
                a = a.data_ptr()
                addresses |= a
            elif kind != NUMBER:
                integers |= a
                if kind == STRIDE:
                    key.append(0 if a % 16 == 0 else 1 if a == 1 else 2)
            flat.append(a)
        if addresses % 16 or integers >> 31:  # hardly ever
            key.append(tuple(_odd(kind, a) for kind, a in zip(self._kinds, flat, strict=True)))
        found = self._compiled.get(tuple(key))
        if found is not None:
            kernel, constants = found
            kernel[(*grid, 1, 1)[:3]](*flat, *constants)
            return
        kernel, constants = self._through_triton(grid, like, D, args, constexprs)
        if isinstance(kernel, CompiledKernel):  # and not the promise of one
            self._compiled[tuple(key)] = kernel, constants

    def _through_triton(self, grid, like, D, args, constexprs) -> tuple[Any, tuple[Any, ...]]:
        """Compiles or interprets, and launches; returns what Triton launched and its constexprs."""
        planned, options = self.plan(D, like.dtype, target(like.device))
        planned = {**planned, **constexprs}
        flat = [a.view(torch.uint8) if isinstance(a, Tensor) and a.dtype == torch.bool else a for a in args]
        kernel = self.fn[grid](*flat, **planned, **options)
        return kernel, tuple(planned[name] for name in self.fn.arg_names[len(args) :])


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` is made for kernels, and slow outside of them."""
    return -(-a // b)


def rows(x: Tensor | None) -> Tensor | None:
    """x with contiguous rows; its row stride is x.stride(0)."""
    return x if x is None or x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def dense(*tensors: Tensor | None) -> list[Any]:
    """The tensors a kernel reads by a bare pointer, each with contiguous elements; copies only those that need it."""
    return [None if x is None else x.contiguous() for x in tensors]


def stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def search_steps(N: int) -> int:
    """Halvings that find one of N + 1 places."""
    return N.bit_length()


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


@triton.jit
def sequence_of(t, cu_seqlens, N, steps):
    """The sequence of each position: the last n with cu_seqlens[n] <= t, N past the end."""
    lo = t * 0
    hi = lo + N
    for _ in range(steps):
        mid = (lo + hi + 1) // 2
        below = tl.load(cu_seqlens + mid) <= t
        lo = tl.where(below, mid, lo)
        hi = tl.where(below, hi, mid - 1)
    return lo


@triton.jit
def chunk_end(chunk_start, m, num_chunks, pack_end):
    """One past the last position of chunks m"""
    inside = m + 1 < num_chunks
    return tl.load(chunk_start + m + 1, mask=inside, other=0) + tl.where(inside, 0, pack_end)


@triton.jit
def outer_rows(begin, end, SPLIT: tl.constexpr):
    """A chunk without the aligned blocks of SPLIT positions inside it: begin .. head_end - 1 and tail .. end - 1"""
    head_end = tl.minimum(tl.cdiv(begin, SPLIT) * SPLIT, end)
    tail = tl.maximum(end // SPLIT * SPLIT, head_end)
    return head_end, tail


@triton.jit
def weighted_sum(w, z, acc, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + w @ z with fp32 weights. DOT is the row dtype, or fp32 in the interpreter, whose bf16 products are wrong.
    16-bit rows: w goes in two parts, so that only z's own rounding remains."""
    z = z.to(DOT)
    if tl.float32 == DOT:
        return tl.dot(w, z, acc, input_precision=PRECISION)
    high = w.to(DOT)
    low = (w - high.to(tl.float32)).to(DOT)
    acc = tl.dot(high, z, acc)
    return tl.dot(low, z, acc)


@triton.jit
def decay_matrix(a, LAG: tl.constexpr, BLOCK: tl.constexpr):
    """W[i, j] = a_{j+1} ... a_{i-LAG} for j <= i - LAG, else 0, given the vector a_{i-LAG}"""
    i = tl.arange(0, BLOCK)[:, None] - LAG
    j = tl.arange(0, BLOCK)[None, :]
    steps = tl.where(i > j, a[:, None] + 0.0 * j, 1.0)
    return tl.where(i >= j, tl.cumprod(steps, 0), 0.0)


_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dot_dtype(dtype: torch.dtype) -> Any:
    return tl.float32 if INTERPRETED else _TL[dtype]


def dot_precision(gpu: str) -> str:
    """For fp32 operands: three TF32 products where tensor cores have them, true fp32 elsewhere."""
    return "ieee" if INTERPRETED or gpu.startswith("gfx") else "tf32x3"


def block_columns(D: int, most: int) -> int:
    """Columns of a tile: the power of two that covers D, at least 16, at most `most`."""
    return min(most, max(16, triton.next_power_of_2(D)))
