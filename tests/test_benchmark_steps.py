"""What the benchmark of training steps sets up: a model at its target, and a Transformer as costly."""

import pytest
import torch

from benchmarks import steps
from hnet import HNetConfig, HNetForCausalLM
from hnet.config.architecture import from_shorthand


@pytest.mark.parametrize(
    ("preset", "compression", "length", "off"),
    [  # of a small model 128 channels of a SwiGLU are much
        ("tiny", [3.0], 128, 0.05),
        ("laptop", [4.0], 1024, 0.035),
        ("small", [4.0], 2048, 0.01),
        ("hnet_1stage_L", [6.0], 8192, 0.005),
    ],
)
def test_the_transformer_costs_as_much(preset, compression, length, off):
    config = HNetConfig.preset(preset)
    other = steps.isotropic_like(config, compression, length)
    assert other.num_stages == 1
    assert steps.flops(other, [], length) == pytest.approx(steps.flops(config, compression, length), rel=off)


@pytest.mark.parametrize(("arch", "compression"), [("c1 T1", [3.0]), ("c1 c1 T1", [3.0, 2.0])])
def test_a_new_model_is_at_its_target(arch, compression):
    config = steps.at_target(from_shorthand(arch, [64] * (len(compression) + 1)), compression, "cpu", 128)
    torch.manual_seed(0)
    ids = torch.tensor(list(steps.random_bytes(4096))).view(-1, 128)
    routing = HNetForCausalLM(config)(ids).routing
    for s, (r, target) in enumerate(zip(routing, compression, strict=True)):
        assert r.boundary_prob.shape[0] / r.num_chunks.item() == pytest.approx(target, rel=0.1), s


def test_budgets_are_shares_of_the_bytes(tmp_path):
    configs = steps.prepare(tmp_path, steps.Case("tiny", 512, 128, [3.0]), "cpu")
    assert steps.with_budget(configs["hnet"]).validate().max_chunks == [pytest.approx(1.25 / 3)]


def test_steps_are_measured(tmp_path):
    configs = steps.prepare(tmp_path, steps.Case("tiny", 512, 128, [3.0]), "cpu")
    found = steps.measure(configs["hnet"], 1, 2)
    assert 0 < found.seconds < 60
    assert 2 < found.bytes_per_chunk < 4.5
    assert (found.mfu, found.peak_bytes) == (None, None)
    other = steps.measure(configs["isotropic"], 1, 1)
    assert other.bytes_per_chunk is None
    assert other.flops_per_byte == pytest.approx(found.flops_per_byte, rel=0.1)
