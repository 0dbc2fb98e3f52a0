"""CUDA graphs, and which kernels a piece of work launches.

A replay costs the host next to nothing; launching the kernels of small work one by one measures the host instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .harness import Pass


class Captured(torch.cuda.CUDAGraph):
    kept: Any  # the outputs, in the graph's memory


def captured(work: Callable[[], object], warmup: int = 3) -> Captured:
    """A graph of `work`, which must not look at the device. Its outputs live as long as the graph does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles kernels and settles the allocator outside the capture
        for _ in range(warmup):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = Captured()
    with torch.cuda.graph(graph):
        graph.kept = work()
    return graph


def replayed(run: Pass, warmup: int = 3) -> Pass:
    """`run` with its first inputs as two graphs, one of the forward and one of the backward."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            run.backward(0, run.forward(0))
    torch.cuda.current_stream().wait_stream(side)
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        out = run.forward(0)
    with torch.cuda.graph(backward, pool=forward.pool()):  # on the stream of the forward, where autograd runs it
        grads = run.backward(0, out)
    kept = (out, grads)  # in the graphs' memory
    return Pass(lambda i: (forward.replay(), kept), lambda i, _: backward.replay())


def kernels_of(work: Callable[[], object]) -> list[str]:
    """Names of the kernels that `work` runs on the device, copies and fills included, in order."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return kernel_names(profiler.events())


def kernel_names(events) -> list[str]:
    """The events that ran on the device, without the annotations of host ranges that also show up there."""
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    return [e.name for e in sorted(on_device, key=lambda e: e.time_range.start)]
