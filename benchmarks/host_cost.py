"""What a call costs the host: `python -m benchmarks.host_cost [--results NAME] [--rounds 40]`.

One stage of dynamic chunking (route, pool, dechunk, ratio loss; a budget, an fp32 residual), forward and backward, on
a GPU that is none (`fake_gpu`): everything that happens in Python and in PyTorch before a kernel is handed to the
driver. Not in it: the driver (some 4 us a launch), PyTorch's CUDA allocator (here its CPU one works).

    eager        as a training loop calls it
    no gradient  the forward alone under torch.no_grad
    dispatcher   through torch.ops and Triton's own launch, as where something is compiled, traced or profiled

Contenders take turns; a figure is the median of ROUNDS rounds of 50 calls. Results go to benchmarks/results/NAME.json
with machine, date and command.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch

import hnet_kernels as hk
from hnet_kernels import eager
from hnet_kernels.triton.common import Kernel

from .fake_gpu import fake_gpu
from .harness import RESULTS, machine

T, D, CALLS = 512, 64, 50


def stage() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The forward alone, and forward with backward."""
    q, k, x, residual = (torch.randn(T, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
    residual = residual.detach().float().requires_grad_()
    cu = torch.tensor([0, 100, T], dtype=torch.int32)
    dout, dloss = torch.randn(T, D, dtype=torch.bfloat16), torch.tensor(0.03)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        r = hk.route(q, k, cu, max_chunks=T // 4)
        return hk.dechunk(hk.pool(x, r), r, residual), hk.ratio_loss(r, 6.0)

    return forward, lambda: torch.autograd.grad(forward(), (q, k, x, residual), (dout, dloss))


def through_triton(kernel, grid, like, D, *args, **constexprs) -> None:
    if 0 not in grid:
        kernel._through_triton(grid, like, D, args, constexprs)


def measure(rounds: int) -> list[dict[str, Any]]:
    forward, both = stage()

    def never(args: Any) -> bool:
        return False

    def dispatched() -> float:
        with mock.patch.object(eager, "plain", never), mock.patch.object(Kernel, "launch", through_triton):
            return timed(both)

    def timed(work: Callable[[], Any], within: Any = nullcontext) -> float:
        with within():
            begin = time.perf_counter()
            for _ in range(CALLS):
                work()
            return (time.perf_counter() - begin) / CALLS

    contenders: dict[str, Callable[[], float]] = {
        "eager": lambda: timed(both),
        "no gradient": lambda: timed(forward, torch.no_grad),
        "dispatcher": dispatched,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    launches = {}
    with fake_gpu() as gpu, hk.backend("triton"):
        for name, run in contenders.items():
            run()  # compiles
            gpu.launches.clear()
            run()
            launches[name] = len(gpu.launches) / CALLS
        gc.disable()
        for _ in range(rounds):
            for name, run in contenders.items():
                gpu.launches.clear()
                seconds[name].append(run())
        gc.enable()
    return [
        {"name": name, "us": statistics.median(s) * 1e6, "least_us": min(s) * 1e6, "launches": launches[name]}
        for name, s in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_cost")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--results", default="host_cost", help="name of the file in benchmarks/results; '' writes none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.rounds)
    for row in rows:
        print(f"{row['name']:12} {row['us']:7.0f} us  (least {row['least_us']:.0f})  {row['launches']:.0f} launches")
    if args.results:
        about = machine() | {
            "command": f"python -m benchmarks.host_cost --rounds {args.rounds}",
            "memory": "the default",
        }
        (RESULTS / f"{args.results}.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
