"""More than 2^31 elements, in positions and in chunks: every offset must be 64-bit. Spot checks against fp64."""

import pytest
import torch

import hnet_kernels as hk
from hnet_kernels import reference

from .windows import windows

pytestmark = pytest.mark.gpu  # one at a time, as a file is with --dist loadfile: each needs tens of GiB

T, D = 2_300_000, 1024
PLACES = [0.0, 0.37, 0.8, 0.95, 1.0]  # element 2^31 is at 0.91 of the positions
GIB = 2**30


def large_routing(T: int, D: int, cu: torch.Tensor, dtype=torch.bfloat16, seed=0):
    """q, k and their Routing; 96 % of the positions are boundaries, so there are more than 2^31 / D chunks too."""
    device = cu.device
    g = torch.Generator(device).manual_seed(seed)
    q = torch.randn(T, D, generator=g, device=device, dtype=dtype)
    k = torch.randn(T, D, generator=g, device=device, dtype=dtype)
    sign = torch.where(torch.rand(T - 1, 1, generator=g, device=device) < 0.96, -0.5, 0.5).to(dtype)
    k[1:].addcmul_(q[:-1], sign)
    q, k = q.requires_grad_(), k.requires_grad_()
    return q, k, hk.route(q, k, cu)


def close(got, want, tol=4e-3):
    scale = want.abs().max().clamp(min=1e-6)
    error = ((got.detach().cpu().double() - want.detach()).abs().max() / scale).item()
    assert error <= tol, f"error {error:.2e} > {tol:.0e}"


def pair_windows(T: int, size: int = 100):
    for place in PLACES:
        begin = round(place * (T - 1 - size)) + 1
        yield slice(begin, begin + size)


def without_graph(r: hk.Routing) -> hk.Routing:
    """Lets q and k go."""
    return hk.Routing(*(t.detach() for t in r))


def check_route(q, k, r, cu):
    """Layout everywhere; probabilities and gradients on spots."""
    T = q.shape[0]
    firsts = set(cu[:-1].tolist())
    mask = r.boundary_mask
    assert torch.equal(r.chunk_index.long(), mask.cumsum(0) - 1)
    assert torch.equal(r.chunk_start.long(), mask.nonzero().flatten())
    before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    assert torch.equal(r.cu_chunks.long(), before[cu.long()])
    close(r.prob_sum.double().sum(), r.boundary_prob.double().sum().cpu(), 1e-6)
    close(r.entropy_sum.double().sum(), reference.entropy(r.boundary_prob.double()).sum().cpu(), 1e-6)
    g = torch.Generator(q.device).manual_seed(1)
    dprob, dselected = (torch.rand(T, generator=g, device=q.device) - 0.5 for _ in range(2))
    dq, dk = torch.autograd.grad((r.boundary_prob, r.selected_prob), (q, k), (dprob, dselected))
    for rows in pair_windows(T):
        before = slice(rows.start - 1, rows.stop - 1)
        a, b = (x.detach()[at].cpu().double().requires_grad_() for x, at in ((q, before), (k, rows)))
        p = reference.boundary_probability(a, b, 0.0)
        forced = torch.tensor([t in firsts for t in range(rows.start, rows.stop)])
        p = torch.where(forced, 1.0, p)
        close(r.boundary_prob[rows], p, 1e-5)
        b_t = mask[rows].cpu()
        assert not ((b_t != (p > 0.5)) & ((p - 0.5).abs() > 1e-6)).any()
        c = torch.where(b_t, p, 1 - p)
        da, db = torch.autograd.grad((p, c), (a, b), (dprob[rows].cpu().double(), dselected[rows].cpu().double()))
        close(dq[before], da)
        close(dk[rows], db)
    assert not dq[-1].any()  # no pair follows the last position


def check_pool(x, dz, r, mode):
    z = hk.pool(x, r, mode)
    (dx,) = torch.autograd.grad(z, x, dz)
    for w in windows(r, PLACES):
        xs = w.cut(x)
        want = reference.pool(xs, w.r, mode)
        close(z[w.chunks][w.inner_chunks], want[w.inner_chunks])
        (dwant,) = torch.autograd.grad(want, xs, dz[w.chunks].cpu().double())
        close(dx[w.positions][w.inner_positions], dwant[w.inner_positions])


def check_dechunk(z, residual, dout, r):
    p, c = (t.detach().clone().requires_grad_() for t in (r.boundary_prob, r.selected_prob))
    r = r._replace(boundary_prob=p, selected_prob=c)
    out = hk.dechunk(z, r, residual)
    got = torch.autograd.grad(out, (z, p, c), dout)
    for w in windows(r, PLACES):
        zs, rs = w.cut(z, "chunks"), w.cut(residual)
        want = reference.dechunk(zs, w.r, rs)
        close(out[w.positions][w.inner_positions], want[w.inner_positions])
        leaves = (zs, w.r.boundary_prob, w.r.selected_prob)
        dz, dp, dc = torch.autograd.grad(want, leaves, dout[w.positions].cpu().double())
        close(got[0][w.chunks][w.inner_chunks], dz[w.inner_chunks])
        close(got[1][w.positions][w.inner_positions], dp[w.inner_positions])
        close(got[2][w.positions][w.inner_positions], dc[w.inner_positions])


def check_ema(z, p, dy, cu):
    """p above one half, so that the past fades as chunks do."""
    y = hk.ema(z, p, cu)
    dz, dp = torch.autograd.grad(y, (z, p), dy)
    every = torch.ones_like(p, dtype=torch.bool)
    positions = torch.arange(len(p), dtype=torch.int32, device=p.device)
    r = hk.Routing(p.detach(), every, p.detach(), positions, positions, cu, cu, p.detach()[:1], p.detach()[:1], cu[0])
    for w in windows(r, PLACES):
        zs, ps = w.cut(z), w.cut(p)
        want, _ = reference.ema(zs, ps, w.r.cu_seqlens)
        close(y[w.positions][w.inner_positions], want[w.inner_positions])
        dzs, dps = torch.autograd.grad(want, (zs, ps), dy[w.positions].cpu().double())
        close(dz[w.positions][w.inner_positions], dzs[w.inner_positions])
        close(dp[w.positions][w.inner_positions], dps[w.inner_positions])


def long_pack() -> torch.Tensor:
    return torch.tensor([0, 900_000, 900_001, 2_290_000, T], dtype=torch.int32, device="cuda")


def randn(rows: int, seed: int) -> torch.Tensor:
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(rows, D, generator=g, device="cuda", dtype=torch.bfloat16).requires_grad_()


def test_route(need_memory):
    need_memory(36 * GIB)
    cu = long_pack()
    q, k, r = large_routing(T, D, cu)
    assert q.numel() > 2**31
    check_route(q, k, r, cu)


@pytest.mark.parametrize("mode", ["boundary", "mean", "max", "last"])
def test_pool(need_memory, mode):
    need_memory(44 * GIB)
    r = without_graph(large_routing(T, D, long_pack())[2])
    M = r.chunk_start.shape[0]
    assert M * D > 2**31
    check_pool(randn(T, 1), randn(M, 2).detach(), r, mode)


def test_dechunk(need_memory):
    need_memory(52 * GIB)
    r = without_graph(large_routing(T, D, long_pack())[2])
    M = r.chunk_start.shape[0]
    assert M * D > 2**31
    check_dechunk(randn(M, 1), randn(T, 2), randn(T, 3).detach(), r)


def test_ema(need_memory):
    need_memory(40 * GIB)
    p = (0.5 + 0.49 * torch.rand(T, device="cuda")).requires_grad_()
    check_ema(randn(T, 1), p, randn(T, 2).detach(), long_pack())
