"""What a stage launches and whether it waits, counted in the interpreter on the code a GPU would run. The kernels of
PyTorch itself are counted as one for each op that computes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import hnet_kernels as hk

from .cases import INTERPRETED, PACKS, cu_of, leaf, qk_with_rate, rand

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 (test_triton_interpreted.py sets it)")

FILES = {"route": "routing", "route_bwd": "routing", "pool_bwd": "pool", "dechunk_bwd": "dechunk"}
# nothing computed
FREE = {"empty", "new_empty", "empty_like", "view", "detach", "select", "slice", "unbind", "expand", "alias"}
WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}
KERNELS = {
    *("_route_fwd_kernel", "_upper_digits_kernel", "_lower_digits_kernel", "_compact_kernel", "_route_bwd_kernel"),
    *("_pool_copy_kernel", "_pool_bwd_kernel", "_ratio_loss_kernel"),
    *("_dechunk_fwd_kernel", "_dechunk_bwd_rows_kernel", "_dechunk_bwd_chunks_kernel"),
}


class Counter(TorchDispatchMode):
    """Names of all that is launched. Looks inside our ops, but not inside the interpreter."""

    def __init__(self, monkeypatch):
        super().__init__()
        from hnet_kernels.triton.common import Kernel

        self.launched: list[str] = []
        launch = Kernel.launch

        def counted(kernel, grid, *args, **constexprs):
            self.launched.append(kernel.fn.__name__)
            with _disable_current_modes():
                launch(kernel, grid, *args, **constexprs)

        monkeypatch.setattr(Kernel, "launch", counted)
        monkeypatch.setattr("hnet_kernels.validation.readable", lambda x: False)  # as for a tensor on a GPU

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "hnet_kernels":
            from hnet_kernels.library import kernels

            with self:
                return getattr(kernels("triton", FILES.get(name, name)), name)(*args[:-1])
        assert name not in WAITING, f"{name} waits for the device"
        if name == "index":
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a boolean index waits for the device"
        if name not in FREE:
            self.launched.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 12),
        ({"reduction": "sequence"}, 12),
        ({"residual_dtype": torch.float32}, 12),
        ({"residual_dtype": torch.float32, "logit_bias": "learned"}, 13),
        ({"logit_bias": "learned"}, 13),
        ({"logit_bias": 0.1}, 13),
    ],
    ids=["plain", "loss by sequence", "fp32 residual", "both", "learned bias", "float bias"],
)
def test_round_trip_of_a_stage(options, most, monkeypatch):
    """route + pool + dechunk + ratio loss, forward and backward, with max_chunks: at most 13 launches and no wait."""
    q, k = (leaf(a) for a in qk_with_rate(254, 32, 0.3, torch.bfloat16))
    x, dout = leaf(rand(254, 32, dtype=torch.bfloat16)), rand(254, 32, dtype=torch.bfloat16, seed=2)
    residual = leaf(rand(254, 32, dtype=options.get("residual_dtype", torch.bfloat16), seed=1))
    bias = options.get("logit_bias")
    leaves = [q, k, x, residual]
    if bias == "learned":
        bias = leaf(torch.tensor(0.1))
        leaves.append(bias)
    cu, dloss = cu_of(PACKS["ragged"]), torch.tensor(0.03)
    with Counter(monkeypatch) as counter, hk.backend("triton"):
        r = hk.route(q, k, cu, logit_bias=bias, max_chunks=60)
        out = hk.dechunk(hk.pool(x, r), r, residual)
        loss = hk.ratio_loss(r, 4.0, reduction=options.get("reduction", "batch"))
        grads = torch.autograd.grad((out, loss), leaves, (dout, dloss))
    assert all(g.isfinite().all() for g in grads)
    assert {name for name in counter.launched if name.endswith("_kernel")} == KERNELS
    assert len(counter.launched) <= most, " ".join(counter.launched)


def test_a_budget_of_all_positions_looks_for_nothing_to_drop(monkeypatch):
    q, k = qk_with_rate(254, 32, 0.3)
    with Counter(monkeypatch) as counter, hk.backend("triton"):
        r = hk.route(q, k, cu_of(PACKS["ragged"]), max_chunks=254)
    assert [name for name in counter.launched if name.endswith("_kernel")] == ["_route_fwd_kernel", "_compact_kernel"]
    assert r.num_dropped.item() == 0


@pytest.mark.parametrize("budget", [6, 7, 60, 300])
@pytest.mark.parametrize("ties", [False, True])
def test_a_budget_over_many_blocks(ties, budget, monkeypatch):
    """As a long pack has them: here in blocks of 64 positions and histograms of 128, with sequences that end at a
    block's edge, and with p = 1 for half of the boundaries."""
    from hnet_kernels.triton import compaction

    from . import oracle
    from .test_route import check

    monkeypatch.setattr(compaction, "COMPACT_BLOCK", 64)
    monkeypatch.setattr(compaction, "SELECT_BLOCK", 128)
    lengths = [64, *([0] if budget > 6 else []), 100, 28, 130, 1, 253]  # 6: room for the first positions only
    q, k = qk_with_rate(576, 4, 0.6)
    if ties:
        q[:] = torch.tensor([1.0, 0.0, 0.0, 0.0])
        k[::2] = -q[::2]
    cu = cu_of(lengths)
    check(hk.route(q, k, cu, max_chunks=budget, backend="triton"), oracle.route(q, k, cu, max_chunks=budget))


def test_the_count_sees_a_wait(monkeypatch):
    q, k = qk_with_rate(254, 32, 0.3)
    with Counter(monkeypatch), hk.backend("triton"), pytest.raises(AssertionError, match="waits for the device"):
        hk.route(q, k, cu_of(PACKS["ragged"]))  # without a budget the number of chunks must be known
