import pytest
import torch

import hnet_kernels as hk

from . import oracle
from .cases import LONG, PACKS, allowed, assert_close, leaf, rand, rel, routing_with
from .test_pool import on_device

PATTERNS = ["all", "none", "alternating", "random"]


def inputs(r, D, dtype, residual_dtype=None):
    T, M = r.chunk_index.shape[0], r.chunk_start.shape[0]
    z, dout = rand(M, D, dtype=dtype, seed=1), rand(T, D, dtype=dtype, seed=2)
    residual = rand(T, D, dtype=residual_dtype or dtype, seed=3)
    return z, residual, dout


def gradients(f, r, z, residual, dout):
    """out, dz, dresidual, d boundary_prob, d selected_prob"""
    z, residual, p, c = leaf(z), leaf(residual), leaf(r.boundary_prob), leaf(r.selected_prob)
    out = f(z, r._replace(boundary_prob=p, selected_prob=c), residual)
    return out, *torch.autograd.grad(out, (z, residual, p, c), dout.to(out.dtype))


def compare(on, lengths, pattern, D, dtype, max_chunks=None, residual_dtype=None):
    """Errors against fp64, judged by those of PyTorch on the same dtype."""
    backend, device = on
    r = routing_with(pattern, lengths, max_chunks)
    z, residual, dout = inputs(r, D, dtype, residual_dtype)
    r64 = r._replace(boundary_prob=r.boundary_prob.double(), selected_prob=r.selected_prob.double())
    want = gradients(oracle.dechunk, r64, z.double(), residual.double(), dout)
    plain = gradients(lambda *a: hk.dechunk(*a, backend="reference"), r, z, residual, dout)
    got = gradients(
        lambda *a: hk.dechunk(*a, backend=backend),
        on_device(r, device),
        z.to(device),
        residual.to(device),
        dout.to(device),
    )
    longest = max(lengths)
    names = ("out", "dz", "dresidual", "dboundary_prob", "dselected_prob")
    for name, g, p, w in zip(names, got, plain, want, strict=True):
        assert not g.isnan().any(), name
        terms = {"out": 1, "dz": longest, "dresidual": 1}.get(name, D * longest)
        if dtype == torch.float32 or name.endswith("prob"):
            assert_close(g.cpu(), w, 1e-5 * terms**0.5, name)
        else:
            assert rel(g.cpu(), w) <= allowed(rel(p, w), 2 if name == "out" else 3, dtype), name
    assert got[0].dtype == dtype
    assert got[2].dtype == (residual_dtype or dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pack", PACKS)
def test_against_oracle(on, pack, pattern, dtype):
    compare(on, PACKS[pack], pattern, 33, dtype)


@pytest.mark.parametrize("D", [1, 64, 1024])
def test_widths(on, D):
    compare(on, PACKS["ragged"], "random", D, torch.float32)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pack", LONG)
def test_across_tiles(on, pack, pattern):
    compare(on, LONG[pack], pattern, 48, torch.float32)


def test_more_than_one_tile_of_every_kind(on):
    compare(on, [5000], "random", 8, torch.float32)
    compare(on, [2500], "none", 8, torch.float32)


@pytest.mark.parametrize("lengths", [[3, 700], [128, 64, 1], [63, 130, 600]], ids=str)
def test_chunks_over_many_blocks(on, lengths):
    """Chunks longer than a block of the Triton kernels, which hand such blocks to programs of their own."""
    compare(on, lengths, "none", 8, torch.float32)
    compare(on, lengths, "none", 8, torch.bfloat16, sum(lengths), torch.float32)


def test_what_is_not_finite_stays_in_its_sequence(native):
    """NaN and infinite rows in the sequence of positions 38 to 187: the others get the same bits as without."""
    backend, device = native
    r = on_device(routing_with("random", PACKS["ragged"]), device)
    z, residual, dout = (x.to(device) for x in inputs(r, 33, torch.float32))
    clean = gradients(lambda *a: hk.dechunk(*a, backend=backend), r, z, residual, dout)
    m0, m1 = r.cu_chunks[3:5].tolist()
    z[m0], z[m0 + 5, 3], z[m1 - 1, 7] = float("nan"), float("inf"), float("-inf")
    dout[38], dout[100, 5], dout[187, 1] = float("-inf"), float("nan"), float("inf")
    dirty = gradients(lambda *a: hk.dechunk(*a, backend=backend), r, z, residual, dout)
    for i, (a, b) in enumerate(zip(clean, dirty, strict=True)):
        begin, end = (m0, m1) if i == 1 else (38, 188)
        assert torch.equal(a[:begin], b[:begin])
        assert torch.equal(a[end:], b[end:])
        assert not b[begin:end].isfinite().all()


@pytest.mark.parametrize("budget", [7, 20, 200])
def test_budget(on, budget):
    compare(on, PACKS["ragged"], "random", 33, torch.float32, budget)


def test_fp32_residual_next_to_bf16(on):
    compare(on, PACKS["ragged"], "random", 64, torch.bfloat16, residual_dtype=torch.float32)


def test_padding_is_never_read(on):
    backend, device = on
    r = on_device(routing_with("random", PACKS["ragged"], 120), device)
    n = int(r.num_chunks)
    z, residual, dout = (x.to(device) for x in inputs(r, 33, torch.float32))
    clean = gradients(lambda *a: hk.dechunk(*a, backend=backend), r, z, residual, dout)
    z[n:] = float("nan")
    dirty = gradients(lambda *a: hk.dechunk(*a, backend=backend), r, z, residual, dout)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    assert (clean[1][n:] == 0).all()


def padded(r, rows):
    """`r` with `rows` positions after its last sequence"""
    return hk.Routing(
        torch.nn.functional.pad(r.boundary_prob, (0, rows)),
        torch.nn.functional.pad(r.boundary_mask, (0, rows)),
        torch.nn.functional.pad(r.selected_prob, (0, rows), value=1.0),
        torch.nn.functional.pad(r.chunk_index, (0, rows), value=int(r.chunk_index[-1])),
        *r[4:],
    )


@pytest.mark.parametrize("rows", [3, 300])
def test_gradient_of_an_fp32_residual_next_to_bf16_with_padding(on, rows):
    backend, device = on
    r = on_device(padded(routing_with("random", PACKS["ragged"]), rows), device)
    z = rand(r.chunk_start.shape[0], 33, dtype=torch.bfloat16).to(device)
    residual, dout = leaf(rand(254 + rows, 33).to(device)), rand(254 + rows, 33, dtype=torch.bfloat16).to(device)
    dout[254:] = float("nan")
    hk.dechunk(z, r, residual, backend=backend).backward(dout)
    assert torch.equal(residual.grad[:254], dout[:254].float())
    assert (residual.grad[254:] == 0).all()


def test_rows_past_the_last_sequence_are_zero(on):
    backend, device = on
    r = routing_with("random", [40])
    T = 50
    pad = on_device(padded(r, 10), device)
    z = leaf(rand(r.chunk_start.shape[0], 9).to(device))
    residual = torch.full((T, 9), float("nan"), device=device)
    residual[:40] = 1.0
    residual.requires_grad_()
    out = hk.dechunk(z, pad, residual, backend=backend)
    assert (out[40:] == 0).all()
    dout = torch.ones(T, 9, device=device)
    dout[40:] = float("nan")
    out.backward(dout)
    assert not z.grad.isnan().any()
    assert (residual.grad[:40] == 1).all()
    assert (residual.grad[40:] == 0).all()


def test_without_residual_and_without_gradient(on):
    backend, device = on
    r = on_device(routing_with("random", PACKS["ragged"]), device)
    z = rand(r.chunk_start.shape[0], 33).to(device)
    out = hk.dechunk(z, r, backend=backend)
    assert_close(out.cpu(), oracle.dechunk(z.cpu(), on_device(r, "cpu")), 1e-6)


def test_non_contiguous(on):
    backend, device = on
    r = on_device(routing_with("random", PACKS["ragged"]), device)
    M = r.chunk_start.shape[0]
    wide_z, wide_r = rand(M, 99).to(device), rand(254, 99).to(device)
    for cut in (lambda x: x[:, 5:38], lambda x: x[:, ::3], lambda x: x[:, :33].T.contiguous().T):
        z, residual = leaf(cut(wide_z)), leaf(cut(wide_r))
        out = hk.dechunk(cut(wide_z), r, cut(wide_r), backend=backend)
        assert torch.equal(out, hk.dechunk(z.contiguous(), r, residual.contiguous(), backend=backend))
        view = cut(wide_z).detach().requires_grad_()
        hk.dechunk(view, r, backend=backend).backward(cut(wide_r))
        hk.dechunk(z, r, backend=backend).backward(cut(wide_r).contiguous())
        assert torch.equal(view.grad, z.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_equals_full(on, dtype):
    backend, device = on
    r = on_device(routing_with("random", [60]), device)
    z, residual, _ = (x.to(device) for x in inputs(r, 33, dtype))
    full = hk.dechunk(z, r, residual, backend=backend)
    state = torch.zeros(1, 33, device=device)
    for t in range(60):
        row = z[r.chunk_index[t].long()][None]
        out, state = hk.dechunk_step(
            row, r.boundary_prob[t : t + 1], r.boundary_mask[t : t + 1], state, residual[t : t + 1], backend=backend
        )
        assert_close(out[0], full[t], 1e-6 if dtype == torch.float32 else 8e-3, f"position {t}")


def test_split_equals_whole(on):
    """A sequence gets the same values whatever else is in the pack; on the CPU the same bits."""
    backend, device = on
    lengths = [1500, 333]
    r = on_device(routing_with("random", lengths), device)
    z, residual, dout = (x.to(device) for x in inputs(r, 40, torch.float32))
    whole = gradients(lambda *a: hk.dechunk(*a, backend=backend), r, z, residual, dout)
    t0 = m0 = 0
    for n, length in enumerate(lengths):
        m1 = int(r.cu_chunks[n + 1])
        part = hk.Routing(
            *(x[t0 : t0 + length] for x in r[:3]),
            r.chunk_index[t0 : t0 + length] - m0,
            r.chunk_start[m0:m1] - t0,
            torch.tensor([0, m1 - m0], dtype=torch.int32, device=device),
            torch.tensor([0, length], dtype=torch.int32, device=device),
            r.prob_sum[n : n + 1],
            r.entropy_sum[n : n + 1],
            r.num_dropped,
        )
        rows, chunks = slice(t0, t0 + length), slice(m0, m1)
        alone = gradients(lambda *a: hk.dechunk(*a, backend=backend), part, z[chunks], residual[rows], dout[rows])
        for i, (a, b) in enumerate(zip(alone, whole, strict=True)):
            b = b[chunks] if i == 1 else b[rows]
            assert torch.equal(a, b) if backend == "cpu" else rel(a, b) < 1e-6
        t0, m0 = t0 + length, m1


def test_gradcheck_reference():
    r = routing_with("random", [1, 6, 4])
    M = r.chunk_start.shape[0]

    def f(z, p, c, residual):
        return hk.dechunk(z, r._replace(boundary_prob=p, selected_prob=c), residual, backend="reference")

    # c passes straight through, so its numeric derivative is zero: it is compared with the oracle above instead
    args = (
        rand(M, 3, dtype=torch.float64),
        r.boundary_prob.double().clamp(0.01, 0.99),
        rand(11, 3, dtype=torch.float64),
    )
    z, p, residual = map(leaf, args)
    assert torch.autograd.gradcheck(lambda z, p, x: f(z, p, r.selected_prob.double(), x), (z, p, residual))
