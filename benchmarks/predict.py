"""What every op should cost on an H200, before anyone has measured it: `python -m benchmarks.predict` writes
results/predicted.json and the table in docs/kernels.md. No GPU needed; half a minute of compiling.

The launches are those of the code itself, written down instead of made. Bytes as written: every tensor a launch is
given counts once, whether it is read or written; what neighbouring programs read again is taken to come from the L2.
Registers and warps are those of the compile gate, for sm_90. Time: these bytes at SHARE of BANDWIDTH, and at least
LEAST a launch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

import hnet_kernels as hk
from hnet_kernels import dispatch, validation
from hnet_kernels.triton import aot, common

from . import harness, stage, table
from .harness import Pass
from .shapes import Shape, ragged

TARGET = "sm_90"
BANDWIDTH = 4.3e12  # bytes a second that a copy moves on an H200
SHARE = 0.85  # of it, a guess at what whole-row kernels reach
LEAST = 2.5e-6  # seconds of a launch that does next to nothing
SHAPE = Shape(65536, 1024, 6)  # one that is measured, too
DTYPE = torch.bfloat16


class Launch(NamedTuple):
    kernel: str
    D: int  # the width it is planned for
    sizes: dict[str, int]  # bytes of the tensors it is given, by the kernel's names for them


class Usage(NamedTuple):
    registers: int
    warps: int  # of a block
    resident: int  # warps on a multiprocessor


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Calls go to Triton as on a GPU, planned for TARGET. Kernels are written down and nothing runs, so tensors may
    hold anything and be of any size."""
    names = {id(kernel): name for name, kernel in aot.kernels().items()}
    found: list[Launch] = []

    def record(kernel: common.Kernel, grid: tuple[int, ...], like: Tensor, D: int, *args: Any, **_: Any) -> None:
        given = dict(zip(kernel.args, args, strict=True))
        found.append(Launch(names[id(kernel)], D, {n: x.nbytes for n, x in given.items() if isinstance(x, Tensor)}))

    with ExitStack() as stack:
        patches = [
            (common.Kernel, "launch", record), (common, "target", lambda device: TARGET),
            (dispatch, "why_not", lambda *call: None),
            *((module, "readable", lambda x: False) for module in (validation, sys.modules["hnet_kernels.dechunk"])),
        ]  # fmt: skip
        for place, name, value in patches:
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(hk.backend("triton"))
        yield found


class Op(NamedTuple):
    minimal: tuple[int, int]  # bytes, forward and backward: every input read once, every output written once
    run: Pass
    share_of_x: float = 1.0  # of the rows of x, what the forward reads


def ops(shape: Shape) -> dict[str, Op]:
    """To be called, and run, while `recorded`."""
    T, D, chunk, N = shape
    M, s, cu = T // chunk, DTYPE.itemsize, ragged(T, N)

    def leaf(*size: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.empty(size, dtype=dtype, requires_grad=True)

    def fp32(*size: int) -> Tensor:
        return leaf(*size, dtype=torch.float32)

    def of(outs: Any, *leaves: Tensor) -> object:
        """The gradient of all outputs"""
        return torch.autograd.grad(outs, leaves, [torch.empty_like(out) for out in outs])

    q, k, x, z = leaf(T, D), leaf(T, D), leaf(T, D), leaf(M, D)
    p, c, p_ema, sums = fp32(T), fp32(T), fp32(T), fp32(N)
    r = hk.route(q.detach(), k.detach(), cu, max_chunks=M)._replace(boundary_prob=p, selected_prob=c, prob_sum=sums)
    count, wide = stage.bytes_of(T, M, D, s), stage.bytes_of(T, M, D, s, residual=4)

    def route(budget: int) -> Pass:
        return Pass(
            lambda i: hk.route(q, k, cu, max_chunks=budget),
            lambda i, out: of((out.boundary_prob, out.selected_prob, out.prob_sum, out.entropy_sum), q, k),
        )

    def dechunk(residual: Tensor) -> Pass:
        return Pass(
            lambda i: hk.dechunk(z, r, residual), lambda i, out: of((out,), z, residual, p, c)
        )  # fmt: skip

    found = {
        "route": Op(count["route"], route(T)),
        "route, dropping half": Op((count["route"][0] - 2 * M, count["route"][1]), route(M // 2)),
        "pool": Op(count["pool"], Pass(lambda i: hk.pool(x, r), lambda i, out: of((out,), x)), M / T),
        "dechunk": Op(count["dechunk"], dechunk(leaf(T, D))),
        "dechunk, fp32 residual": Op(wide["dechunk"], dechunk(fp32(T, D))),
        "ema": Op(
            (2 * T * D * s + 4 * T, 3 * T * D * s + 8 * T),
            Pass(lambda i: hk.ema(x, p_ema, cu), lambda i, out: of((out,), x, p_ema)),
        ),
        "ratio_loss": Op((12 * N, 8 * N), Pass(lambda i: hk.ratio_loss(r, 6.0), lambda i, out: of((out,), sums))),
    }
    found["mamba2"] = mamba2(T, D, cu, leaf, fp32, of)
    return found


def mamba2(T: int, D: int, cu: Tensor, leaf: Any, fp32: Any, of: Any) -> Op:
    """A layer of width D, expanded twice, heads of 64 channels, 128 states, between its projections."""
    inner, states, heads = 2 * D, 128, 2 * D // 64
    channels = inner + 2 * states
    width, s = inner + channels + heads, DTYPE.itemsize
    zxbcdt = leaf(T, width)
    parameters = fp32(channels, 4), fp32(channels), fp32(heads), fp32(heads), fp32(heads), fp32(inner)
    return Op(
        (s * T * (width + inner), s * T * (2 * width + inner)),
        Pass(
            lambda i: hk.mamba2(zxbcdt, *parameters, cu),
            lambda i, out: of((out,), zxbcdt, *parameters),
        ),
    )


def written(op: Op, launches: list[Launch]) -> list[int]:
    """Bytes of each launch"""
    return [sum(x.sizes.values()) - round((1 - op.share_of_x) * x.sizes.get("x", 0)) for x in launches]


def usage(kernel: str, D: int) -> Usage:
    report = aot.compile_one(aot.Variant(kernel, "bf16", D, "planned", TARGET))
    _, options = aot.kernels()[kernel].plan(D, DTYPE, TARGET)
    return Usage(report.registers, options["num_warps"], report.resident)


def traced(shape: Shape) -> dict[tuple[str, str], tuple[int, list[int], list[Launch]]]:
    """By op and direction: minimal bytes, and bytes of each launch, and the launches. A loss's backward has none."""
    found = {}
    with recorded() as launches:
        for name, op in ops(shape).items():
            launches.clear()
            out = op.run.forward(0)
            forward = list(launches)
            launches.clear()
            op.run.backward(0, out)
            found[name, "forward"] = op.minimal[0], written(op, forward), forward
            if launches:
                found[name, "backward"] = op.minimal[1], written(op._replace(share_of_x=1.0), launches), list(launches)
    return found


def predict(shape: Shape = SHAPE) -> list[dict]:
    """A row for each op and direction."""
    found = traced(shape)
    planned = list(dict.fromkeys((x.kernel, x.D) for _, _, launches in found.values() for x in launches))
    with ProcessPoolExecutor() as processes:
        used = dict(zip(planned, processes.map(usage, *zip(*planned, strict=True)), strict=True))
    return [
        {
            "op": name, "direction": direction, "T": shape.T, "D": shape.D, "chunk": shape.chunk, "N": shape.N,
            "dtype": "bfloat16", "minimal_bytes": minimal, "bytes": sum(sizes),
            "launches": [
                {"kernel": x.kernel, "bytes": size, **used[x.kernel, x.D]._asdict()}
                for x, size in zip(launches, sizes, strict=True)
            ],
            "seconds": sum(max(size / (SHARE * BANDWIDTH), LEAST) for size in sizes),
        }
        for (name, direction), (minimal, sizes, launches) in found.items()
    ]  # fmt: skip


def main() -> None:
    about = {"triton": triton.__version__, "target": TARGET, "bandwidth": BANDWIDTH, "share": SHARE, "least": LEAST}
    path = harness.RESULTS / "predicted.json"
    path.write_text(json.dumps({"machine": about, "rows": predict()}, indent=1) + "\n")
    print(f"wrote {path}")
    table.main([])


if __name__ == "__main__":
    main()
