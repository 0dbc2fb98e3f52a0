"""residual, q, k and the pool of one x: the gradients autograd gives them apart, in fewer kernels."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hnet_kernels as hk
from hnet.model import fork as fork_module
from hnet.model.fork import fork

T, D = 40, 12
CU = torch.tensor([0, 15, 15, 40], dtype=torch.int32)


def modules(dtype=torch.float64, residual_dtype=None):
    torch.manual_seed(0)
    linears = [nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)]
    return [m.to(residual_dtype or dtype if i == 0 else dtype) for i, m in enumerate(linears)]


def apart(x, residual_proj, q_proj, k_proj):
    """As four modules."""
    with torch.autocast("cpu", enabled=False):
        residual = residual_proj(x.to(residual_proj.weight.dtype))
    return residual, q_proj(x), k_proj(x), x


def results(form, x, linears, budget=None):
    x = x.detach().clone().requires_grad_()
    residual, q, k, pooled = form(x, *linears)
    r = hk.route(q, k, CU, max_chunks=budget)
    z = hk.pool(pooled, r)
    out = hk.dechunk(z.sin(), r, residual)
    loss = (out.double() * torch.linspace(-1, 1, T)[:, None]).sum() + hk.ratio_loss(r, 3.0).double()
    grads = torch.autograd.grad(loss, [x, *(p for m in linears for p in m.parameters())])
    return [out, *grads]


@pytest.mark.parametrize("budget", [None, 30, 9])
def test_exact_in_fp64(budget):
    x, linears = torch.randn(T, D, dtype=torch.float64), modules()
    with hk.backend("reference"):
        got, want = (results(form, x, linears, budget) for form in (fork, apart))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-13)


def test_gradcheck():
    """Against differences, without a pool, whose choice of rows has none."""
    torch.manual_seed(1)
    x, linears = torch.randn(5, D, dtype=torch.float64, requires_grad=True), modules()
    parameters = [p for m in linears for p in m.parameters()]
    assert torch.autograd.gradcheck(lambda x, *_: tuple(y.sin() for y in fork(x, *linears)), (x, *parameters))


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16])
def test_under_autocast(rows):
    """No further from fp64 than autograd's four gradients are."""
    x, linears = torch.randn(T, D).to(rows), modules(torch.float32)
    exact = modules()
    with hk.backend("reference"):
        want = results(apart, x.double(), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, plain = (results(form, x, linears) for form in (fork, apart))
    assert [g.dtype for g in got] == [p.dtype for p in plain]
    for g, p, w in zip(got, plain, want, strict=True):
        assert (g.double() - w).norm() <= 1.2 * (p.double() - w).norm() + 1e-6 * w.norm()


def test_a_bf16_model_and_frozen_weights():
    x, linears = torch.randn(T, D, dtype=torch.bfloat16), modules(torch.bfloat16, torch.float32)
    residual, q, _, _ = fork(x, *linears)
    assert (residual.dtype, q.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(q, linears[1](x))
    linears[1].requires_grad_(False)
    x = x.requires_grad_()
    residual, q, k, pooled = fork(x, *linears)
    (residual.sum() + q.sum() + k.sum() + pooled.sum()).backward()
    assert linears[1].weight.grad is None
    assert linears[2].weight.grad.isfinite().all()
    want = sum(m.weight.double().sum(0) for m in linears) + 1
    torch.testing.assert_close(x.grad[0].double(), want, rtol=0.02, atol=0.02)


class Kernels(TorchDispatchMode):
    """What computes: one kernel on a GPU each."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in (
            "view",
            "t",
            "transpose",
            "permute",
            "detach",
            "alias",
            "empty",
            "empty_like",
            "expand",
            "_unsafe_view",
        ):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(fork_module._ONEDNN is None, reason="PyTorch without oneDNN")
def test_onednn_computes_the_residual_in_fp32():
    """Among bf16 on a CPU: no further from fp64 than the product of PyTorch's own choice, and not the same call."""
    x, linears = torch.randn(T, D).bfloat16(), modules(torch.float32)
    x, seen = x.requires_grad_(), Kernels()
    with torch.autocast("cpu", dtype=torch.bfloat16), seen:
        residual = fork(x, *linears)[0]
    (dx,) = torch.autograd.grad(residual.sum(), x)
    assert "_linear_pointwise" in seen.names
    want = x.double() @ linears[0].weight.double().T + linears[0].bias.double()
    torch.testing.assert_close(residual.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx[0].double(), linears[0].weight.double().sum(0), rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        none = fork(x[:0], *linears)[0]
    assert none.shape == (0, D)


def test_kernels_of_the_backward(monkeypatch):
    """bf16 with an fp32 residual, as trained on a GPU; weights need their gradients in both forms."""
    monkeypatch.setattr(fork_module, "_ONEDNN", None)
    counts = {}
    for name, form in (("fork", fork), ("apart", apart)):
        x, linears = torch.randn(T, D, dtype=torch.bfloat16).requires_grad_(), modules(torch.bfloat16, torch.float32)
        outs = form(x, *linears)
        outs = (*outs[:3], outs[3].clone())  # a pool stands here
        grads = [torch.randn_like(o) for o in outs]
        with Kernels() as kernels:
            torch.autograd.grad(outs, [x, *(p for m in linears for p in m.parameters())], grads)
        counts[name] = kernels.names
    assert sorted(counts["fork"]) == ["_to_copy", "add_", "addmm", "addmm", "mm", "mm", "mm", "mm", "sum"]
    assert sorted(counts["apart"]) == ["_to_copy", *["add"] * 3, *["mm"] * 6, "sum"]
