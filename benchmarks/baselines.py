"""The fastest plain-PyTorch formulations of the ops that we could write: what the kernels are measured against.

Every one is vectorised and differentiable by autograd. Where several are close, the benchmark times all of them and
compares with the best. `chunk_start`, `chunk_index` and the like are given: layout is not part of the comparison
except in `route`.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU torch.compile races the form of each op that was fastest under it but for the EMA's, which takes longest to
# compile; with --full or --compile all every form (benchmarks/results/cpu.json is such a run)
COMPILED = ("sums", "index_select", "scan", "sums+scan")
HALO = 32  # P > 1/2: older chunks weigh less than 2^-32
BLOCK = 64


def compiled(config, forms: Iterable[str]) -> list[str]:
    """Which of the forms torch.compile races on a CPU, by the options --compile and --full."""
    which = "all" if config.getoption("--full") else config.getoption("--compile")
    return [form for form in forms if which == "all" or (which == "some" and form in COMPILED)]


# --- route: probability, mask, selected probability, chunk layout -------------------------------------------------


def _layout(p: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    mask = p > 0.5
    count = mask.cumsum(0)
    cu_chunks = F.pad(count, (1, 0))[cu_seqlens.long()]
    return p, mask, torch.where(mask, p, 1 - p), count - 1, mask.nonzero().flatten(), cu_chunks


def route_normalize(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    """As the published code writes it: two normalised copies and their product."""
    cos = (F.normalize(q[:-1].float(), dim=-1) * F.normalize(k[1:].float(), dim=-1)).sum(-1)
    p = F.pad(((1 - cos) / 2).clamp(0, 1), (1, 0)).index_fill(0, cu_seqlens[:-1].long(), 1.0)
    return _layout(p, cu_seqlens)


def route_sums(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    """Three row sums and no normalised copy; q is not shifted, the row of k is."""
    a, b = q[:-1], k[1:]
    qq, kk, qk = (torch.linalg.vecdot(x, y).float() for x, y in ((a, a), (b, b), (a, b)))
    p = 0.5 - 0.5 * qk * torch.rsqrt((qq * kk).clamp(min=1e-24))
    p = F.pad(p.clamp(0, 1), (1, 0)).index_fill(0, cu_seqlens[:-1].long(), 1.0)
    return _layout(p, cu_seqlens)


def route_similarity(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    cos = F.cosine_similarity(q[:-1].float(), k[1:].float(), dim=-1, eps=1e-12)
    p = F.pad(((1 - cos) / 2).clamp(0, 1), (1, 0)).index_fill(0, cu_seqlens[:-1].long(), 1.0)
    return _layout(p, cu_seqlens)


ROUTE = {"normalize": route_normalize, "sums": route_sums, "cosine_similarity": route_similarity}


# --- pool ---------------------------------------------------------------------------------------------------------


def pool_index(x: Tensor, chunk_start: Tensor) -> Tensor:
    return x[chunk_start]


def pool_index_select(x: Tensor, chunk_start: Tensor) -> Tensor:
    return x.index_select(0, chunk_start)


POOL = {"index": pool_index, "index_select": pool_index_select}


# --- dechunk ------------------------------------------------------------------------------------------------------


def _decay_matrix(p: Tensor, first: Tensor, rows: int) -> tuple[Tensor, int]:
    """(blocks, rows, HALO + rows): weight of z_{j} in y_{i}, exact because nothing older than HALO matters."""
    M = p.shape[0]
    blocks = -(-M // rows)
    pad = blocks * rows - M
    log_keep = torch.where(first, -200.0, torch.log1p(-p))
    p, log_keep = (F.pad(x, (HALO, pad)).unfold(0, HALO + rows, rows) for x in (p, log_keep))
    total = log_keep.cumsum(1)
    span = total[:, HALO:, None] - total[:, None, :]
    weight = torch.exp(span.masked_fill(~torch.ones_like(span[0], dtype=torch.bool).tril(HALO), -torch.inf))
    return weight * p[:, None, :], blocks


def dechunk_blocked(
    z: Tensor, prob: Tensor, selected: Tensor, first: Tensor, chunk_start: Tensor, chunk_index: Tensor, residual: Tensor
) -> Tensor:
    """EMA as one batched matrix product of blocks with a halo, then a gather."""
    p = prob[chunk_start].clamp(1e-4, 1 - 1e-4)
    weight, blocks = _decay_matrix(p, first, BLOCK)
    M, D = z.shape
    zs = F.pad(z, (0, 0, HALO, blocks * BLOCK - M)).unfold(0, HALO + BLOCK, BLOCK)  # (blocks, D, HALO + BLOCK)
    y = torch.bmm(weight.to(z.dtype), zs.transpose(1, 2)).reshape(-1, D)
    ste = 1 + (selected - selected.detach())
    return (y[chunk_index].float() * ste[:, None] + residual).to(z.dtype)


def dechunk_scan(
    z: Tensor, prob: Tensor, selected: Tensor, first: Tensor, chunk_start: Tensor, chunk_index: Tensor, residual: Tensor
) -> Tensor:
    """EMA by doubling (5 steps reach 32 chunks), then a gather."""
    p = prob[chunk_start].clamp(1e-4, 1 - 1e-4)
    a, y = torch.where(first, 0, 1 - p), z.float() * p[:, None]
    for shift in (1, 2, 4, 8, 16):
        y = torch.cat([y[:shift], torch.addcmul(y[shift:], a[shift:, None], y[:-shift])])
        a = torch.cat([torch.zeros_like(a[:shift]), a[shift:] * a[:-shift]])
    ste = 1 + (selected - selected.detach())
    return (y.index_select(0, chunk_index) * ste[:, None] + residual).to(z.dtype)


def ema_scan(z: Tensor, p: Tensor, first: Tensor) -> Tensor:
    """Any weights: doubling all the way."""
    a, y = torch.where(first, 0, 1 - p), z.float() * p[:, None]
    shift = 1
    while shift < z.shape[0]:
        y = torch.cat([y[:shift], torch.addcmul(y[shift:], a[shift:, None], y[:-shift])])
        a = torch.cat([torch.zeros_like(a[:shift]), a[shift:] * a[:-shift]])
        shift *= 2
    return y.to(z.dtype)


def ema_blocked(z: Tensor, p: Tensor, first: Tensor) -> Tensor:
    """Any weights: a matrix product in each block of 64, and a carry from block to block."""
    T, D = z.shape
    n = T // BLOCK
    keep = torch.where(first, 0, 1 - p).view(n, BLOCK)
    steps = keep[:, :, None].expand(n, BLOCK, BLOCK)
    below = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=z.device).tril(-1)
    weight = torch.where(below, steps, 1).cumprod(1) * torch.ones(BLOCK, BLOCK, device=z.device).tril()
    y = torch.bmm(weight, z.float().view(n, BLOCK, D) * p.view(n, BLOCK, 1))
    carry_weight, carry, out = keep.cumprod(1)[..., None], torch.zeros(D, device=z.device), []
    for block, w in zip(y, carry_weight, strict=True):
        block = torch.addcmul(block, w, carry)
        carry = block[-1]
        out.append(block)
    return torch.cat(out).to(z.dtype)


EMA = {"scan": ema_scan, "blocked": ema_blocked}
DECHUNK = {"blocked": dechunk_blocked, "scan": dechunk_scan}
