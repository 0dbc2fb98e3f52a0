"""What Triton's just-in-time compiler would build, asked without a GPU: how many kernels a run of changing lengths
compiles, and in which order a kernel adds."""

import importlib
import random
import re

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
    op = {
        f: importlib.import_module(f"hnet_kernels.triton.{f}") for f in ("routing", "pool", "dechunk", "ema", "mamba2")
    }
    loss = importlib.import_module("hnet_kernels.triton.ratio_loss").ratio_loss
    x, z, cu = torch.empty(T, D), torch.empty(M, D), torch.zeros(N + 1, dtype=torch.int32)
    out = op["routing"].route(x, x, cu, None, None, budget, False)
    prob, mask, selected, index, _, cu_chunks, prob_sum, entropy_sum, _, norms = out
    start = torch.zeros(M, dtype=torch.int32)
    op["routing"].route_bwd(x, x, cu, None, mask, norms, prob, selected, prob_sum, entropy_sum, False)
    op["routing"].route_step(x[:B], x[:B], None, None, None)
    for mode in ("boundary", "mean", "max", "last"):
        op["pool"].pool(x, start, index, cu_chunks, cu, mode)
        op["pool"].pool_bwd(z, x, start, index, cu_chunks, cu, T, mode)
    _, y = op["dechunk"].dechunk(z, prob, selected, start, index, cu_chunks, cu, x, True)
    op["dechunk"].dechunk_bwd(x, y, prob, start, index, cu_chunks, cu, torch.float32)
    op["dechunk"].dechunk_step(x[:B], prob[:B], mask[:B], x[:B], x[:B])
    loss(prob_sum, cu, cu_chunks, 4.0, False, False)
    _, final = op["ema"].ema(x, prob, cu, None)
    op["ema"].ema_bwd(x, final, x, prob, cu, None)
    channels, H = D + 32, D // 16
    inner, weights = (
        torch.empty(T, D + channels + H),
        [torch.empty(*s) for s in ((channels, 4), (channels,), *3 * [(H,)])],
    )
    y, *kept = op["mamba2"].mamba2(inner, *weights, torch.empty(D), cu, 1e-5)
    op["mamba2"].mamba2_bwd(y, inner, *weights, torch.empty(D), *kept, 1e-5)


@pytest.mark.parametrize("budgeted", [False, True])
def test_lengths_that_change_compile_nothing_again(compiled, budgeted):
    """200 steps each of lengths as they come: one, multiples of 16 and anything else, for T, N, M, B and the budget."""
    draw = random.Random(0)

    def length(most):
        return draw.choice([1, 16 * draw.randint(1, most // 16), draw.randint(2, most)])

    for budget in (3, 7) if budgeted else (None,):  # one below the number of positions, one above
        run_everything(5, 1, 2, 1, 16, budget)
    first = set(compiled)
    for _ in range(200):
        T, M = length(2000), length(600)
        run_everything(T, length(64), M, min(T, length(32)), 16, length(2000) if budgeted else None)
    assert compiled == first
    names = {name for name, *_ in compiled}
    unused = 0 if budgeted else 2  # the two that look for what a budget drops
    assert (
        len(names)
        == len({k.fn for k in importlib.import_module("hnet_kernels.triton.aot").kernels().values()}) - unused
    )


def test_a_size_that_triton_specialises_would_be_seen(compiled, monkeypatch):
    from hnet_kernels.triton import ema

    param = next(p for p in ema.FWD.fn.params if p.name == "T")
    monkeypatch.setattr(param, "do_not_specialize", False)
    for T in (1, 15, 16):
        run_everything(T, 2, 3, 1, 16, None)
    kinds = [(name, fixed) for name, _, fixed in compiled]
    assert {name: kinds.count((name, f)) for name, f in kinds if kinds.count((name, f)) > 1} == {"_ema_fwd_kernel": 3}


def built(kernel, dtype, D, target="sm_90"):
    """The forms a kernel goes through on its way to machine code, by name."""
    import triton

    aot = importlib.import_module("hnet_kernels.triton.aot")
    constexprs, options = kernel.plan(D, aot.DTYPES[dtype], target)
    source = aot.source(kernel, f"*{dtype}", f"*{dtype}", constexprs, D % 16 == 0)
    return triton.compile(source, target=aot.TARGETS[target][0], options=options).asm


def reductions(kernel, dtype, D):
    """The layouts in which a kernel adds along rows, names resolved."""
    text = built(kernel, dtype, D)["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    found = re.findall(r"\}\) : \(tensor<(\d+x\d+)xf32, (#\w+)>\) -> tensor<\d+xf32", text)
    return [(shape, layouts[name]) for shape, name in found]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("D", [33, 64, 1024])
def test_a_decoding_step_adds_in_the_order_of_route(dtype, D):
    from hnet_kernels.triton import routing

    full, step = (reductions(k, dtype, D) for k in (routing.ROUTE_FWD, routing.ROUTE_STEP))
    assert len(full) == 3
    assert step == full


@pytest.mark.parametrize("name", ["route_fwd", "route_step"])
def test_norms_and_probabilities_are_rounded_as_ieee_has_it(name):
    """p must be exactly 1/2 for orthogonal rows and 1 for opposite ones, as on the CPU."""
    from hnet_kernels.triton import routing

    instructions = built(routing.KERNELS[name], "bf16", 64)["ptx"]
    assert "sqrt.rn.f32" in instructions
    assert "div.rn.f32" in instructions
    assert not re.search(r"(sqrt|rsqrt|div|rcp)\.(approx|full)", instructions)
