import pytest
import torch

import hnet_kernels as hk

from . import oracle
from .cases import LONG, PACKS, ROUNDING, assert_close, leaf, rand, routing_with

MODES = ["boundary", "mean", "max", "last"]


def on_device(r, device):
    return hk.Routing(*(x.to(device) for x in r))


def compare(on, lengths, pattern, D, dtype, mode, max_chunks=None):
    backend, device = on
    r = routing_with(pattern, lengths, max_chunks)
    x = leaf(rand(sum(lengths), D, dtype=dtype))
    x64 = leaf(x.double())
    want = oracle.pool(x64, r, mode)
    weight = rand(*want.shape, dtype=dtype, seed=3)
    (dx_want,) = torch.autograd.grad((want * weight.double()).sum(), x64) if want.requires_grad else (x64 * 0,)
    xd = leaf(x.to(device))
    got = hk.pool(xd, on_device(r, device), mode, backend=backend)
    assert got.dtype == dtype
    assert_close(got.cpu(), want, 0 if mode != "mean" else ROUNDING[dtype], "z")
    (dx,) = torch.autograd.grad(got, xd, weight.to(device))
    assert_close(dx.cpu(), dx_want, ROUNDING[dtype], "dx")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("pattern", ["all", "none", "alternating", "random"])
@pytest.mark.parametrize("pack", PACKS)
def test_against_oracle(on, pack, pattern, dtype, mode):
    compare(on, PACKS[pack], pattern, 33, dtype, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("D", [1, 64, 1024])
def test_widths(on, D, mode):
    compare(on, LONG["ragged long"] if D == 64 else PACKS["ragged"], "random", D, torch.float32, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [7, 20, 200])
def test_budget_rows_are_zero(on, budget, mode):
    compare(on, PACKS["ragged"], "random", 33, torch.float32, mode, budget)


def test_max_takes_the_first_of_equals_and_keeps_nan(on):
    backend, device = on
    r = on_device(routing_with("none", [4]), device)
    x = leaf(torch.tensor([[1.0, 2.0], [3.0, float("nan")], [3.0, 9.0], [0.0, 1.0]]).to(device))
    z = hk.pool(x, r, "max", backend=backend)
    assert z[0, 0] == 3
    assert z[0, 1].isnan()
    z[0].sum().backward()
    assert x.grad.tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]


def test_non_contiguous(on):
    backend, device = on
    r = on_device(routing_with("random", PACKS["ragged"]), device)
    wide = rand(254, 100).to(device)
    for x in (wide[:, 10:43], wide[:, ::3], wide.T.contiguous().T):
        for mode in MODES:
            x = x.detach().requires_grad_()
            z = hk.pool(x, r, mode, backend=backend)
            assert torch.equal(z, hk.pool(x.contiguous(), r, mode, backend=backend))
            z.backward(torch.ones_like(z).T.contiguous().T)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_reference(mode):
    r = routing_with("random", [1, 6, 4])
    assert torch.autograd.gradcheck(
        lambda x: hk.pool(x, r, mode, backend="reference"), leaf(rand(11, 3, dtype=torch.float64))
    )
