"""Empty sequences at the end of a pack, which a captured training step pads it with, change nothing."""

import pytest
import torch

import hnet_kernels as hk
from hnet import HNetConfig, HNetForCausalLM
from hnet.config.architecture import from_shorthand
from hnet.model.cost import stage_costs
from hnet.train.losses import losses

LENGTHS = [70, 1, 130, 55]
T = sum(LENGTHS)


def make(letter: str) -> HNetForCausalLM:
    torch.manual_seed(0)
    config = from_shorthand(f"{letter}1 {letter}1c1 {letter}1", [32, 64, 64], windows=[15, 15, -1])
    assert isinstance(config, HNetConfig)
    return HNetForCausalLM(config)


def step(model, empty: int, backend: str, reduction: str, budget: list[int]):
    """Everything that a training step takes from a pack, and every gradient."""
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist(), *[T] * empty], dtype=torch.int32)
    ids = torch.randint(0, 250, (T + 1,), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    with hk.backend(backend):
        out = model(ids[:-1], cu_seqlens=cu, max_seqlen=200, max_chunks=budget)
        found = losses(out.logits, ids[1:], out.routing, [3.0, 2.0], torch.tensor([0.3, 0.2]), reduction=reduction)
    found.loss.backward()
    stages = [value for s in found.stages for value in s]
    lengths = [cu.diff(), *(r.cu_chunks.diff() for r in out.routing)]
    flops = [cost.of(n) for cost, n in zip(stage_costs(model), lengths, strict=True)]
    per_position = [field for r in out.routing for field in (r.boundary_prob, r.boundary_mask, r.chunk_start)]
    grads = [p.grad.clone() for p in model.parameters()]
    return [found.loss, found.ce, *stages, *flops, *per_position, out.logits, *grads]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("letter", "tTmMcC")
def test_nothing_changes(letter, backend):
    model = make(letter)
    for budget, reduction in (([200, 150], "batch"), ([40, 33], "sequence")):  # with room to spare; dropping
        want = step(model, 0, backend, reduction, budget)
        for empty in (1, 28):
            got = step(model, empty, backend, reduction, budget)
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
