"""On a CPU the innermost network gets a round number of rows; the padding is nobody's."""

import pytest
import torch

from hnet import HNetForCausalLM
from hnet.train.config import TrainConfig


@pytest.mark.parametrize("arch", ["c1 T1", "c1 c1 m1T1"])
def test_padding_changes_nothing(arch, monkeypatch):
    torch.manual_seed(0)
    model = HNetForCausalLM(TrainConfig(arch=arch, d_model=[64] * len(arch.split())).model())
    innermost = list(model.stages())[-1]
    seen = []
    innermost.main_network.register_forward_pre_hook(lambda m, given: seen.append((given[0], given[1])))
    ids, cu = torch.randint(256, (150,)), torch.tensor([0, 40, 41, 150], dtype=torch.int32)
    found = []
    for multiple in (1, 32):
        monkeypatch.setattr("hnet.model.hnet.ROUND", multiple)
        model.zero_grad()
        out = model(ids, cu_seqlens=cu)
        (out.logits.square().mean() + sum(r.prob_sum.sum() for r in out.routing)).backward()
        found.append((out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (plain, exact), (padded, gradients) = found
    chunks = plain.routing[-1].num_chunks.item()
    assert [len(z) for z, _ in seen] == [chunks, -(-chunks // 32) * 32]
    assert chunks % 32, "no padding to speak of"
    assert not seen[1][0][chunks:].any()
    assert seen[1][1].cu_seqlens[-1] == chunks
    assert [r.boundary_prob.shape for r in padded.routing] == [r.boundary_prob.shape for r in plain.routing]
    assert torch.allclose(padded.logits, plain.logits, atol=1e-5)
    assert gradients.keys() == exact.keys()
    for name, g in gradients.items():
        assert torch.allclose(g, exact[name], atol=1e-6, rtol=1e-4), name
