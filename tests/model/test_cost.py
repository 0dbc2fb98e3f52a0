import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hnet import HNetConfig, HNetForCausalLM
from hnet.model.cost import peak_flops, plan, positions_per_byte, stage_costs


@pytest.mark.parametrize("preset", ["laptop", "small_2stage"])
def test_flops_agree_with_pytorchs_counter(preset):
    torch.manual_seed(0)
    model = HNetForCausalLM(HNetConfig.preset(preset))
    L = 256
    ids = torch.randint(0, 250, (4, L))
    with FlopCounterMode(display=False) as counter:
        out = model(ids)
        out.logits.sum().backward()
    positions = [ids.numel(), *(int(r.num_chunks) for r in out.routing)]
    costs = stage_costs(model, L)
    estimate = sum(c.flops * n for c, n in zip(costs, positions, strict=True))
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.25)
    assert sum(c.parameters for c in costs) == sum(p.numel() for p in model.parameters())


def test_plan_of_a_published_model():
    p = plan(HNetConfig.preset("hnet_2stage_XL"), [3, 3], 8192, 65536, muon=False, bf16=True)
    assert 1.5e9 < sum(s.parameters for s in p.stages) < 1.7e9
    assert p.state_bytes == sum(s.parameters for s in p.stages) * 16
    assert positions_per_byte([3, 3]) == pytest.approx([1, 1 / 3, 1 / 9])


def test_mfu_is_never_a_guess():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("Some other card") is None
