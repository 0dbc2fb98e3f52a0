"""Every wrong argument is one clear error from Python and never reaches a kernel."""

import pytest
import torch

import hnet_kernels as hk

from .cases import cu_of, rand, routing_with


@pytest.fixture(params=["reference", "cpu"])
def good(request):
    """On CPU tensors: the checks are the same for all backends, but values can only be read there without a wait."""
    r = routing_with("random", [10, 20])
    with hk.backend(request.param):
        yield r, rand(30, 8), rand(r.chunk_start.shape[0], 8)


def cu(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1, 30), "must start at 0, got 1"),
        ((0, 20, 10, 30), "must not decrease, got 20 before 10 at index 2"),
        ((0, 10), "must end at T = 30, the number of positions, got 10"),
        ((0, 31), "must end at T = 30, the number of positions, got 31"),
        ((0, -5, 30), "must not decrease, got 0 before -5"),
    ],
)
def test_cu_seqlens_values(good, values, message):
    _, x, _ = good
    with pytest.raises(ValueError, match=message):
        hk.route(x, x, cu(*values))
    with pytest.raises(ValueError, match=message):
        hk.ema(x, torch.rand(30), cu(*values))


def test_cu_seqlens_past_the_end_is_an_error_even_when_padded(good):
    _, x, _ = good
    with pytest.raises(ValueError, match="must end at T = 30"):
        hk.route(x, x, cu(0, 31), padded=True)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        ([0, 30], TypeError, "cu_seqlens must be a tensor, got list"),
        (cu(0, 30, dtype=torch.int64), TypeError, "cu_seqlens must be int32, got torch.int64"),
        (torch.zeros(2, 2, dtype=torch.int32), ValueError, r"cu_seqlens must have shape \(N\+1,\), got \(2, 2\)"),
        (torch.zeros(0, dtype=torch.int32), ValueError, r"got \(0,\)"),
        (
            torch.zeros(2, dtype=torch.int32, device="meta"),
            ValueError,
            "cu_seqlens must be on the device of q, cpu, got meta",
        ),
    ],
)
def test_cu_seqlens_form(good, cu_seqlens, error, message):
    _, x, _ = good
    with pytest.raises(error, match=message):
        hk.route(x, x, cu_seqlens)


def test_route_arguments(good):
    _, x, _ = good
    c = cu(0, 30)
    for kwargs, error, message in [
        (dict(q=x.long(), k=x), TypeError, "q must be floating point, got torch.int64"),
        (dict(q=x[0], k=x), ValueError, r"q must be packed rows \(T, D\), got shape \(8,\)"),
        (dict(q=x, k=x[:, :4]), ValueError, r"k must have the shape of q, \(30, 8\), got \(30, 4\)"),
        (dict(q=x, k=x.half()), TypeError, "k must have the dtype of q"),
        (dict(q=x, k=x.to("meta")), ValueError, "k must be on the device of q, cpu, got meta"),
        (dict(q=x, k=x, max_chunks=0), ValueError, "max_chunks must be an integer >= 1"),
        (dict(q=x, k=x, max_chunks=2.5), ValueError, "max_chunks must be an integer"),
        (
            dict(q=x, k=x, candidates=torch.ones(29, dtype=torch.bool)),
            ValueError,
            r"candidates must have shape \(30,\)",
        ),
        (dict(q=x, k=x, candidates=torch.ones(30)), TypeError, "candidates must be torch.bool"),
        (dict(q=x, k=x, logit_bias=torch.ones(2)), ValueError, "logit_bias must be a float or a 0-d float tensor"),
        (
            dict(q=x, k=x, backend="gpu"),
            ValueError,
            "backend must be one of reference, cpu, triton, cuda, auto, got 'gpu'",
        ),
    ]:
        with pytest.raises(error, match=message):
            hk.route(**kwargs, cu_seqlens=c)
    with pytest.raises(ValueError, match="max_chunks must be an integer >= 3"):
        hk.route(x, x, cu(0, 10, 20, 30), max_chunks=2)


def test_pool_and_dechunk_arguments(good):
    r, x, z = good
    M = z.shape[0]
    for call, error, message in [
        (lambda: hk.pool(x, r, "median"), ValueError, "mode must be one of boundary, mean, max, last, got 'median'"),
        (lambda: hk.pool(x[:20], r), ValueError, "x must have the 30 positions of r, got 20"),
        (lambda: hk.pool(x, tuple(r)), TypeError, "r must be the Routing"),
        (lambda: hk.pool(x.to("meta"), r), ValueError, "r must be on the device of x, meta, got cpu"),
        (lambda: hk.dechunk(z[:3], r), ValueError, f"z must have the {M} chunks of r, got 3"),
        (lambda: hk.dechunk(z, r, x[:, :4]), ValueError, r"residual must have shape \(30, 8\), got \(30, 4\)"),
        (lambda: hk.dechunk(z, r, x.long()), TypeError, "residual must be floating point"),
        (lambda: hk.dechunk(z.double(), r), TypeError, "r.boundary_prob must be torch.float64"),
        (lambda: hk.ema(x, torch.rand(29), cu(0, 30)), ValueError, r"p must have shape \(30,\), got \(29,\)"),
        (lambda: hk.ema(x, torch.rand(30).half(), cu(0, 30)), TypeError, "p must be torch.float32"),
        (
            lambda: hk.ema(x, torch.rand(30), cu(0, 30), torch.zeros(2, 8)),
            ValueError,
            r"initial_state must be .* \(1, 8\)",
        ),
        (lambda: hk.ratio_loss(r, 1.0), ValueError, "target_ratio must be above 1"),
        (lambda: hk.ratio_loss(r, float("nan")), ValueError, "target_ratio must be above 1"),
        (lambda: hk.ratio_loss(r, 3, reduction="sum"), ValueError, "reduction must be one of batch, sequence, global"),
        (lambda: hk.ratio_loss(r, 3, reduction="global"), RuntimeError, "process group"),
        (lambda: hk.dechunk_step(x, torch.rand(30), torch.ones(30), x), TypeError, "boundary_mask must be torch.bool"),
        (
            lambda: hk.dechunk_step(x, torch.rand(30), torch.rand(30) > 0.5, x[:2]),
            ValueError,
            "state must be torch.float32",
        ),
        (lambda: hk.route_step(x, x[:2]), ValueError, "k must have the shape of q_prev"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_a_forged_routing_cannot_make_a_kernel_read_outside():
    r, x = routing_with("random", [10, 20]), rand(30, 8)
    z = rand(r.chunk_start.shape[0], 8)
    forged = [
        r._replace(chunk_start=r.chunk_start + 1000),
        r._replace(chunk_start=-r.chunk_start),
        r._replace(cu_chunks=r.cu_chunks * 5),
        r._replace(cu_seqlens=cu_of([10, 2000])),
    ]
    for bad in forged:
        for call in (lambda b=bad: hk.pool(x, b, backend="cpu"), lambda b=bad: hk.dechunk(z, b, backend="cpu")):
            with pytest.raises(ValueError, match="routing is inconsistent|cu_seqlens"):
                call()
