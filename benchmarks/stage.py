"""A whole stage of dynamic chunking, route -> pool -> dechunk + residual and the ratio loss: ours and in plain PyTorch.

Every form takes (q, k, x, residual, cu_seqlens) and returns (out, ratio loss). The inner network is left out: dechunk
gets the rows that pool gave.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import hnet_kernels as hk

from . import baselines
from .shapes import Shape, qk, ragged, rows

TARGET = 6.0


def ours(q: Tensor, k: Tensor, x: Tensor, residual: Tensor, cu: Tensor, max_chunks: int | None = None):
    r = hk.route(q, k, cu, max_chunks=max_chunks)
    return hk.dechunk(hk.pool(x, r), r, residual), hk.ratio_loss(r, TARGET)


def plain(route: Callable, dechunk: Callable, max_chunks: int | None = None) -> Callable:
    """A stage from a route and a dechunk of `baselines`. With max_chunks its shapes are static, as ours are then, and
    nothing waits for the device or splits the compiled graph."""

    def stage(q: Tensor, k: Tensor, x: Tensor, residual: Tensor, cu: Tensor):
        T = q.shape[0]
        p, mask, selected = route(q, k, cu)[:3]
        if max_chunks is None:
            start = mask.nonzero().flatten()
        else:  # rows past the last chunk repeat the last position; no position reads them
            start = torch.nonzero_static(mask, size=max_chunks, fill_value=T - 1).flatten()
        index = mask.cumsum(0) - 1
        begins = torch.zeros(T, dtype=torch.bool, device=q.device).index_fill(0, cu[:-1].long(), True)
        z = x.index_select(0, start)
        out = dechunk(z, p, selected, begins[start], start, index, residual)
        return out, ratio_loss(p, mask)

    return stage


def ratio_loss(p: Tensor, mask: Tensor) -> Tensor:
    F, G = mask.float().mean(), p.mean()
    return TARGET / (TARGET - 1) * ((TARGET - 1) * F * G + (1 - F) * (1 - G))


PLAIN = {
    f"{r}+{d}": (baselines.ROUTE[r], baselines.DECHUNK[d])
    for r, d in (("sums", "scan"), ("sums", "blocked"), ("normalize", "scan"))
}


def rounded_budget(num_chunks: int) -> int:
    """A tight budget: the chunks there are, rounded up to 64."""
    return -(-num_chunks // 64) * 64


def bytes_of(T: int, M: int, D: int, size: int, residual: int | None = None) -> dict[str, tuple[int, int]]:
    """(forward, backward) bytes of each op, every input read once and every output written once.

    `size` is that of an element of a row, `residual` of one of the residual (default: the same). pool reads only the
    rows it keeps; the residual's gradient is dout itself, unless it is of another dtype.
    """
    row, chunks, positions = size * D, 4 * M, T
    residual_row = (residual or size) * D
    dresidual = 0 if residual_row == row else T * residual_row
    ops = {
        # q, k -> prob, selected, mask, index, chunk_start; q, k, dprob, dselected -> dq, dk
        "route": (2 * T * row + 13 * positions + chunks, 4 * T * row + 8 * positions),
        # kept rows, chunk_start -> z; dz, chunk index -> dx
        "pool": (2 * M * row + chunks, (T + M) * row + 4 * positions),
        # z, residual, index, P -> out; dout, z, index, P -> dz, dprob, dselected
        "dechunk": (
            (T + M) * row + T * residual_row + 4 * positions + chunks,
            (T + 2 * M) * row + dresidual + 12 * positions + chunks,
        ),
    }
    ops["round trip"] = (sum(f for f, _ in ops.values()), sum(b for _, b in ops.values()))
    return ops


def main(device: str, shape: Shape) -> None:
    """One stage, forward and backward, for a profiler: `ncu ... python -m benchmarks.stage`."""
    T, D, chunk, N = shape
    cu = ragged(T, N).to(device)
    q, k = (x.requires_grad_() for x in qk(T, D, chunk, torch.bfloat16, 0, device))
    x = rows(T, D, torch.bfloat16, device, True)
    residual = rows(T, D, torch.float32, device, True)  # as the model's
    out, ratio = ours(q, k, x, residual, cu, max_chunks=T)
    (out.float().square().mean() + ratio).backward()
    print(f"ran on {device}, T = {T}, D = {D}")


if __name__ == "__main__":
    main("cuda", Shape(65536, 1024, 6))
