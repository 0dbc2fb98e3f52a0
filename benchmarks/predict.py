"""What every op should cost on an H200, before anyone has measured it: `python -m benchmarks.predict` writes
results/predicted.json and the table in docs/kernels.md. No GPU needed; half a minute of compiling.

The launches are those of the code itself, written down instead of made. Bytes as written: every tensor a launch is
given counts once, whether it is read or written; what neighbouring programs read again is taken to come from the L2.
Registers and warps are those of the compile gate, for sm_90. Time: these bytes at SHARE of BANDWIDTH, and at least
LEAST a launch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from hnet_kernels.triton import aot, common, dechunk, ema, pool, ratio_loss, routing

from . import harness, stage, table
from .shapes import Shape

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
    """Kernels are planned for TARGET and written down; nothing runs, so tensors may be of any size."""
    names = {id(kernel): name for name, kernel in aot.kernels().items()}
    found: list[Launch] = []

    def record(kernel: common.Kernel, grid: tuple[int, ...], like: Tensor, D: int, *args: Any, **_: Any) -> None:
        given = dict(zip(kernel.args, args, strict=True))
        found.append(Launch(names[id(kernel)], D, {n: x.nbytes for n, x in given.items() if isinstance(x, Tensor)}))

    patch = mock.patch.object
    with patch(common.Kernel, "launch", record), patch(common, "target", return_value=TARGET):
        yield found


class Op(NamedTuple):
    minimal: int  # bytes: every input read once, every output written once
    run: Callable[[], object]
    share_of_x: float = 1.0  # of the rows of x, what is read


def ops(shape: Shape) -> dict[tuple[str, str], Op]:
    """By name and direction."""
    T, D, chunk, N = shape
    M, s = T // chunk, DTYPE.itemsize

    def i32(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32)

    def fp32(*size: int) -> Tensor:
        return torch.empty(size)

    def rows(n: int) -> Tensor:
        return torch.empty(n, D, dtype=DTYPE)

    # chunk_start, chunk_index, cu_chunks, cu_seqlens
    layout = i32(M), i32(T), i32(N + 1), i32(N + 1)
    count, wide = stage.bytes_of(T, M, D, s), stage.bytes_of(T, M, D, s, residual=4)
    mask = torch.empty(T, dtype=torch.bool)

    def route(budget: int) -> Callable[[], object]:
        return lambda: routing.route(rows(T), rows(T), layout[3], None, None, budget, False)

    def route_bwd() -> object:
        found = fp32(3, T), fp32(T), fp32(T), fp32(N)
        return routing.route_bwd(rows(T), rows(T), layout[3], None, mask, *found, False)

    def dechunk_fwd(residual: torch.dtype) -> Callable[[], object]:
        res = torch.empty(T, D, dtype=residual)
        return lambda: dechunk.dechunk(rows(M), fp32(T), fp32(T), *layout, res, True)

    def dechunk_bwd(residual: torch.dtype) -> Callable[[], object]:
        return lambda: dechunk.dechunk_bwd(rows(T), fp32(M, D), fp32(T), *layout, residual)

    return {
        ("route", "forward"): Op(count["route"][0], route(T)),
        ("route, dropping half", "forward"): Op(count["route"][0] - 2 * M, route(M // 2)),
        ("route", "backward"): Op(count["route"][1], route_bwd),
        ("pool", "forward"): Op(count["pool"][0], lambda: pool.pool(rows(T), *layout, "boundary"), M / T),
        ("pool", "backward"): Op(count["pool"][1], lambda: pool.pool_bwd(rows(M), None, *layout, T, "boundary")),
        ("dechunk", "forward"): Op(count["dechunk"][0], dechunk_fwd(DTYPE)),
        ("dechunk", "backward"): Op(count["dechunk"][1], dechunk_bwd(DTYPE)),
        ("dechunk, fp32 residual", "forward"): Op(wide["dechunk"][0], dechunk_fwd(torch.float32)),
        ("dechunk, fp32 residual", "backward"): Op(wide["dechunk"][1], dechunk_bwd(torch.float32)),
        ("ema", "forward"): Op(2 * T * D * s + 4 * T, lambda: ema.ema(rows(T), fp32(T), layout[3], None)),
        ("ema", "backward"): Op(
            3 * T * D * s + 8 * T, lambda: ema.ema_bwd(rows(T), None, rows(T), fp32(T), layout[3], None)
        ),
        ("ratio_loss", "forward"): Op(
            12 * N, lambda: ratio_loss.ratio_loss(fp32(N), layout[3], layout[2], 6.0, False, False)
        ),
    }


def written(op: Op, launches: list[Launch]) -> list[int]:
    """Bytes of each launch"""
    return [sum(x.sizes.values()) - round((1 - op.share_of_x) * x.sizes.get("x", 0)) for x in launches]


def usage(kernel: str, D: int) -> Usage:
    report = aot.compile_one(aot.Variant(kernel, "bf16", D, "planned", TARGET))
    _, options = aot.kernels()[kernel].plan(D, DTYPE, TARGET)
    return Usage(report.registers, options["num_warps"], report.resident)


def traced(shape: Shape) -> dict[tuple[str, str], tuple[Op, list[Launch]]]:
    found = {}
    for name, op in ops(shape).items():
        with recorded() as launches:
            op.run()
        found[name] = op, launches
    return found


def predict(shape: Shape = SHAPE) -> list[dict]:
    """A row for each op and direction."""
    found = traced(shape)
    planned = list(dict.fromkeys((launch.kernel, launch.D) for _, launches in found.values() for launch in launches))
    with ProcessPoolExecutor() as processes:
        used = dict(zip(planned, processes.map(usage, *zip(*planned, strict=True)), strict=True))
    rows = []
    for (name, direction), (op, launches) in found.items():
        sizes = written(op, launches)
        rows.append(
            {
                "op": name, "direction": direction, "T": shape.T, "D": shape.D, "chunk": shape.chunk, "N": shape.N,
                "dtype": "bfloat16", "minimal_bytes": op.minimal, "bytes": sum(sizes),
                "launches": [
                    {"kernel": launch.kernel, "bytes": size, **used[launch.kernel, launch.D]._asdict()}
                    for launch, size in zip(launches, sizes, strict=True)
                ],
                "seconds": sum(max(size / (SHARE * BANDWIDTH), LEAST) for size in sizes),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    about = {"triton": triton.__version__, "target": TARGET, "bandwidth": BANDWIDTH, "share": SHARE, "least": LEAST}
    path = harness.RESULTS / "predicted.json"
    path.write_text(json.dumps({"machine": about, "rows": predict()}, indent=1) + "\n")
    print(f"wrote {path}")
    table.main([])


if __name__ == "__main__":
    main()
