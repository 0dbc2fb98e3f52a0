"""Every tensor argument of every op, laid out in every way a view can be: the bits are those of a dense copy.

Only PyTorch, the reference, adds up a strided row in another order. Gradients come in as views too.
"""

import pytest
import torch

import hnet_kernels as hk
from hnet_kernels.dispatch import CUDA_OPS, GPU_OPS

from .cases import INTERPRETED, cu_of, qk_with_rate, rand, routing_with
from .test_pool import on_device

LENGTHS, D = [1, 0, 12, 9], 5
T, N = sum(LENGTHS), len(LENGTHS)


def stepped(x):
    """Every other element of every other row of something larger, filled with what must not be read"""
    wide = x.new_full([2 * n + 3 for n in x.shape], 7 if x.dtype != torch.bool else True)
    view = wide[tuple(slice(3, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def turned(x):
    """Columns dense, rows not"""
    return x.T.contiguous().T if x.dim() == 2 else stepped(x)


def odd(x):
    """Rows dense, at an odd place and an odd distance"""
    wide = x.new_full([*x.shape[:-1], x.shape[-1] + 4], 7 if x.dtype != torch.bool else True)
    wide[..., 3:-1] = x
    return wide[..., 3:-1]


def same_everywhere(x):
    """One row, or one number, in the place of all: no memory behind the others"""
    return x[:1].expand(x.shape)


VIEWS = [stepped, turned, odd, same_everywhere]


def results(call, args, grads):
    """The outputs, then the gradient of every floating-point argument; `grads` is laid out like the outputs"""
    leaves = {k: a.detach().requires_grad_() for k, a in args.items() if torch.is_tensor(a) and a.is_floating_point()}
    for name, x in leaves.items():
        assert x.stride() == args[name].stride()
    out = call(**{**args, **leaves})
    carry = [(o, g) for o, g in zip(out, grads, strict=True) if g is not None and o.requires_grad]
    if not carry:
        return out
    d = torch.autograd.grad([o for o, _ in carry], list(leaves.values()), [g for _, g in carry], allow_unused=True)
    return [*out, *d]


def routing_fields(r):
    names = ("boundary_prob", "selected_prob", "chunk_index", "chunk_start", "cu_chunks", "cu_seqlens")
    return {f"r.{n}": getattr(r, n) for n in names}


def with_fields(r, fields):
    return r._replace(**{n.removeprefix("r."): x for n, x in fields.items()})


def route_case(device, backend, **options):
    q, k = (x.to(device) for x in qk_with_rate(T, D, 0.4))
    args = {
        "q": q, "k": k, "cu_seqlens": cu_of(LENGTHS, device), "logit_bias": torch.tensor(0.1, device=device),
        "candidates": torch.arange(T, device=device) % 4 > 0,
    }  # fmt: skip

    def call(q, k, cu_seqlens, **more):
        r = hk.route(q, k, cu_seqlens, **more, **options, backend=backend)
        return [
            r.boundary_prob,
            r.selected_prob,
            r.prob_sum,
            r.entropy_sum,
            r.boundary_mask,
            r.chunk_index,
            r.chunk_start,
            r.cu_chunks,
        ]

    return call, args, [rand(T, seed=1), rand(T, seed=2), rand(N, seed=3), rand(N, seed=4), None, None, None, None]


def pool_case(device, backend, mode):
    r = on_device(routing_with("random", LENGTHS), device)
    fields = {n: x for n, x in routing_fields(r).items() if n not in ("r.boundary_prob", "r.selected_prob")}

    def call(x, **fields):
        return [hk.pool(x, with_fields(r, fields), mode, backend=backend)]

    return call, {"x": rand(T, D).to(device), **fields}, [rand(r.chunk_start.shape[0], D, seed=1)]


def dechunk_case(device, backend, dtype=torch.float32):
    r = on_device(routing_with("random", LENGTHS), device)
    z, residual = rand(r.chunk_start.shape[0], D, dtype=dtype).to(device), rand(T, D, seed=1).to(device)

    def call(z, residual, **fields):
        return [hk.dechunk(z, with_fields(r, fields), residual, backend=backend)]

    return call, {"z": z, "residual": residual, **routing_fields(r)}, [rand(T, D, dtype=dtype, seed=2)]


def ema_case(device, backend):
    args = {
        "z": rand(T, D).to(device), "p": rand(T, seed=1).sigmoid().to(device), "cu_seqlens": cu_of(LENGTHS, device),
        "initial_state": rand(N, D, seed=2).to(device),
    }  # fmt: skip

    def call(**args):
        return list(hk.ema(**args, return_final_state=True, backend=backend))

    return call, args, [rand(T, D, seed=3), rand(N, D, seed=4)]


def ratio_loss_case(device, backend, reduction):
    r = on_device(routing_with("random", LENGTHS), device)
    fields = {f"r.{n}": getattr(r, n) for n in ("prob_sum", "cu_chunks", "cu_seqlens")}

    def call(**fields):
        with hk.backend(backend):
            return [hk.ratio_loss(with_fields(r, fields), 3.0, reduction=reduction)]

    return call, fields, [torch.tensor(2.0)]


def mamba2_case(device, backend):
    args = {
        "zxbcdt": rand(T, 138), "conv_weight": rand(72, 4), "conv_bias": rand(72), "dt_bias": rand(2), "A_log": rand(2),
        "D": rand(2), "norm_weight": rand(64), "cu_seqlens": cu_of(LENGTHS),
    }  # fmt: skip

    def call(**args):
        return [hk.mamba2(**args, backend=backend)]

    return call, {n: x.to(device) for n, x in args.items()}, [rand(T, 64, seed=1)]


def route_step_case(device, backend):
    q, k = (x.to(device) for x in qk_with_rate(6, D, 0.5))
    flags = torch.arange(6, device=device)
    bias = torch.tensor(0.1, device=device)
    args = {"q_prev": q, "k": k, "is_first": flags % 3 == 0, "logit_bias": bias, "candidates": flags % 4 > 0}

    def call(**args):
        with torch.no_grad():
            return hk.route_step(**args, backend=backend)

    return call, args, [None] * 3


def dechunk_step_case(device, backend):
    args = {
        "z": rand(6, D).to(device), "boundary_prob": rand(6, seed=1).sigmoid().to(device),
        "boundary_mask": (torch.arange(6) % 3 > 0).to(device), "state": rand(6, D, seed=2).to(device),
        "residual": rand(6, D, seed=3).to(device),
    }  # fmt: skip

    def call(**args):
        with torch.no_grad():
            return hk.dechunk_step(**args, backend=backend)

    return call, args, [None] * 2


CASES = {
    "route": route_case,
    "route, budget": lambda *place: route_case(*place, max_chunks=7),
    **{f"pool, {mode}": lambda *place, m=mode: pool_case(*place, m) for mode in ("boundary", "mean", "max", "last")},
    "dechunk": dechunk_case,
    "dechunk, bf16": lambda *place: dechunk_case(*place, torch.bfloat16),
    "ema": ema_case,
    **{f"ratio_loss, {by}": lambda *place, b=by: ratio_loss_case(*place, b) for by in ("batch", "sequence")},
    "mamba2": mamba2_case,
    "route_step": route_step_case,
    "dechunk_step": dechunk_step_case,
}


def where(x):
    return x.stride(), x.storage_offset()


def same(a, b, backend):
    if a is None or b is None:  # an argument that has no gradient
        return a is b
    assert a.dtype == b.dtype
    return torch.equal(a, b) if backend != "reference" else torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def places():
    """(backend, device, case)"""
    on_a_cpu = ["triton"] if INTERPRETED else ["reference", "cpu", "emulated"]
    on_a_gpu = ["reference", "triton", "cuda"]
    for case in CASES:
        for backend in [*on_a_cpu, *(f"{b}-gpu" for b in on_a_gpu)]:
            name, _, gpu = backend.replace("emulated", "cuda").partition("-")
            if (name != "cuda" or case.split(",")[0] in CUDA_OPS) and (name != "cpu" or case not in GPU_OPS):
                marks = pytest.mark.gpu if gpu else ()
                yield pytest.param(name, "cuda" if gpu else "cpu", case, id=f"{backend}-{case}", marks=marks)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("backend", "device", "case"), list(places()))
def test_any_layout_gives_the_bits_of_a_dense_copy(backend, device, case, view, request):
    if (backend, device) == ("cuda", "cpu"):
        request.getfixturevalue("on_emulator")
    call, dense, grads = CASES[case](device, backend)
    grads = [None if g is None else g.to(device) for g in grads]
    names = [n for n, x in dense.items() if x.dim() and (view is not same_everywhere or x.dtype != torch.int32)]
    alone = [[n] for n in names] if view is stepped or not INTERPRETED else []
    for changed in (*alone, ["gradients"], [*names, "gradients"]):
        args = {name: view(x) if name in changed else x for name, x in dense.items()}
        given = [g if g is None or not g.dim() or "gradients" not in changed else view(g) for g in grads]
        assert all(where(x) != where(args[n]) for n, x in dense.items() if n in changed)
        want = results(
            call,
            {n: x.clone(memory_format=torch.contiguous_format) for n, x in args.items()},
            [None if g is None else g.clone(memory_format=torch.contiguous_format) for g in given],
        )
        got = results(call, args, given)
        assert all(same(a, b, backend) for a, b in zip(got, want, strict=True)), changed
