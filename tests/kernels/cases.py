"""Packs, boundary patterns and comparisons shared by the op tests."""

import os

import torch
from torch import Tensor

import hnet_kernels as hk

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Half an ulp of the output, and what fp32 sums cost. The interpreter truncates when it stores bf16: a whole ulp.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 5e-4}

# Names say what each pack is there to break.
PACKS = {
    "one position": [1],
    "63": [63],
    "128": [128],
    "ragged": [1, 37, 0, 150, 2, 64, 0],
}
LONG = {"1000": [1000], "ragged long": [700, 1, 1500, 299]}


def cu_of(lengths: list[int], device="cpu") -> Tensor:
    return torch.tensor(
        [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32, device=device
    )


def rand(*shape, dtype=torch.float32, seed=0) -> Tensor:
    g = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def qk_with_rate(T: int, D: int, rate: float, dtype=torch.float32, seed=0) -> tuple[Tensor, Tensor]:
    """q and k whose boundaries come at about `rate`: cos is drawn, then k is turned that far away from q."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(T, D, generator=g, dtype=torch.float64)
    other = torch.randn(T, D, generator=g, dtype=torch.float64)
    u = torch.nn.functional.normalize(q, dim=1)
    v = torch.nn.functional.normalize(other - (other * u).sum(1, keepdim=True) * u, dim=1) if D > 1 else u
    cos = torch.where(torch.rand(T, generator=g) < rate, -1.0, 1.0) * (
        0.1 + 0.85 * torch.rand(T, generator=g, dtype=torch.float64)
    )
    k = cos[:, None] * u + (1 - cos[:, None] ** 2).sqrt() * v
    k = k * (0.5 + torch.rand(T, 1, generator=g, dtype=torch.float64)) * 3
    return q.to(dtype), torch.cat([k[:1], k[:-1]]).to(dtype)  # k_t answers q_{t-1}


def routing_with(pattern: str, lengths: list[int], max_chunks: int | None = None, seed=0) -> hk.Routing:
    """A Routing with all, no, alternating or random boundaries, laid out by the oracle."""
    from . import oracle

    T, cu = sum(lengths), cu_of(lengths)
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(T, generator=g, dtype=torch.float64)
    rate = {"all": 1.0, "none": 0.0, "random": 0.25}.get(pattern)
    b = torch.arange(T) % 2 == 0 if rate is None else torch.rand(T, generator=g) < rate
    p = torch.where(b, 0.5 + 0.5 * u.clamp(min=1e-3), 0.5 * u)
    for s, e in oracle.spans(cu):
        p[s:e][:1] = 1.0
    angle = torch.arccos(1 - 2 * p)  # rebuild q, k in two dimensions so that route gives exactly this layout
    turn = torch.cumsum(angle, 0)
    x = torch.stack([turn.cos(), turn.sin()], 1)
    r = oracle.route(x, x, cu, max_chunks=max_chunks)
    return r._replace(
        boundary_prob=r.boundary_prob.float(),
        selected_prob=r.selected_prob.float(),
        prob_sum=r.prob_sum.float(),
        entropy_sum=r.entropy_sum.float(),
    )


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def rel(a: Tensor, b: Tensor) -> float:
    """Largest error of a against b, relative to b's scale."""
    if b.numel() == 0:
        assert a.shape == b.shape
        return 0.0
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-6)).item()


def allowed(plain_error: float, factor: float, dtype: torch.dtype) -> float:
    """A low-precision kernel may err `factor` times as much as PyTorch does in the same dtype."""
    return factor * plain_error + (ROUNDING[dtype] if INTERPRETED else 1e-6)


def assert_close(a: Tensor, b: Tensor, tol: float, what: str = "") -> None:
    assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)} != {tuple(b.shape)}"
    assert not a.isnan().any(), f"{what}: NaN in the result"
    error = rel(a, b)
    assert error <= tol, f"{what}: error {error:.2e} > {tol:.2e}"
