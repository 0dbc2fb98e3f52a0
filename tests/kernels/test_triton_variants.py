"""What Triton's just-in-time compiler would build, asked without a GPU: how many kernels a run of changing lengths
compiles."""

import importlib
import random

import pytest
import torch

from hnet_kernels.dispatch import triton_error

from .cases import INTERPRETED

pytestmark = pytest.mark.skipif(
    triton_error() is not None or INTERPRETED, reason=triton_error() or "interpreted kernels do not compile"
)


@pytest.fixture
def compiled(monkeypatch):
    """Keys under which kernels would be compiled for sm_90. Nothing is launched: outputs stay as allocated, except for
    the number of chunks, which is half the positions."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from hnet_kernels.triton.common import Kernel

    backend, binders, keys = make_backend(GPUTarget("cuda", 90, 32)), {}, set()

    def launch(kernel, grid, like, D, *args, **constexprs):
        fn = kernel.fn
        binder = binders.setdefault(fn, create_function_from_signature(fn.signature, fn.params, backend))
        planned, options = kernel.plan(D, like.dtype, "sm_90")
        flat = [a.view(torch.uint8) if isinstance(a, torch.Tensor) and a.dtype == torch.bool else a for a in args]
        bound, special, _ = binder(*flat, **{**planned, **constexprs}, **options)
        fixed = tuple(str(bound[p.name]) for p in fn.params if p.is_constexpr)
        keys.add((fn.__name__, str(special), fixed))
        if "cu_chunks" in bound:
            bound["cu_chunks"].fill_(like.shape[0] // 2)

    monkeypatch.setattr(Kernel, "launch", launch)
    return keys


def run_everything(T, N, M, B, D, budget):
    """Every op, forward and backward, in all that a stage of D columns calls."""
    op = {f: importlib.import_module(f"hnet_kernels.triton.{f}") for f in ("routing", "pool", "dechunk", "ema")}
    loss = importlib.import_module("hnet_kernels.triton.ratio_loss").ratio_loss
    x, z, cu = torch.empty(T, D), torch.empty(M, D), torch.zeros(N + 1, dtype=torch.int32)
    out = op["routing"].route(x, x, cu, None, None, budget, False)
    prob, mask, selected, index, _, cu_chunks, prob_sum, _, cos, inv_q, inv_k = out
    start = torch.zeros(M, dtype=torch.int32)
    op["routing"].route_bwd(x, x, cu, None, mask, cos, inv_q, inv_k, prob, selected, prob_sum, False)
    op["routing"].route_step(x[:B], x[:B], None, None, None)
    for mode in ("boundary", "mean", "max", "last"):
        op["pool"].pool(x, start, index, cu_chunks, cu, mode)
        op["pool"].pool_bwd(z, x, start, index, cu_chunks, cu, T, mode)
    op["dechunk"].dechunk(z, prob, selected, start, index, cu_chunks, cu, x)
    op["dechunk"].dechunk_bwd(x, z, prob, start, index, cu_chunks, cu, False)
    op["dechunk"].dechunk_step(x[:B], prob[:B], mask[:B], x[:B], x[:B])
    loss(prob_sum, cu, cu_chunks, 4.0, False, False)
    _, final = op["ema"].ema(x, prob, cu, None)
    op["ema"].ema_bwd(x, final, x, prob, cu, None)


@pytest.mark.parametrize("budgeted", [False, True])
def test_lengths_that_change_compile_nothing_again(compiled, budgeted):
    """200 steps each of lengths as they come: one, multiples of 16 and anything else, for T, N, M, B and the budget."""
    draw = random.Random(0)

    def length(most):
        return draw.choice([1, 16 * draw.randint(1, most // 16), draw.randint(2, most)])

    first = None
    for _ in range(200):
        T, M = length(2000), length(600)
        run_everything(T, length(64), M, min(T, length(32)), 16, length(900) if budgeted else None)
        first = first or set(compiled)
    assert compiled == first
    names = {name for name, *_ in compiled}
    assert len(names) == len({k.fn for k in importlib.import_module("hnet_kernels.triton.aot").kernels().values()}) - (
        0 if budgeted else 1  # the selection among boundaries over the budget
    )


def test_a_size_that_triton_specialises_would_be_seen(compiled, monkeypatch):
    from hnet_kernels.triton import ema

    param = next(p for p in ema.FWD.fn.params if p.name == "T")
    monkeypatch.setattr(param, "do_not_specialize", False)
    for T in (1, 15, 16):
        run_everything(T, 2, 3, 1, 16, None)
    kinds = [(name, fixed) for name, _, fixed in compiled]
    assert {name: kinds.count((name, f)) for name, f in kinds if kinds.count((name, f)) > 1} == {"_ema_fwd_kernel": 3}
