"""Decoding as CUDA graphs on the card: the bytes of the eager steps, and how often the host waits."""

import warnings

import pytest
import torch

from hnet import HNetConfig, HNetForCausalLM

from ..kernels.cases import cu_of
from ..model.test_causal_lm import TWO_STAGES

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["small", "two"])
def model(request):
    torch.manual_seed(0)
    config = HNetConfig.preset("small") if request.param == "small" else HNetConfig.from_dict(TWO_STAGES)
    m = HNetForCausalLM(config, device="cuda")
    with torch.no_grad():
        for stage in m.stages():
            if not stage.innermost:
                w = stage.routing_module.q_proj_layer.weight
                w.add_(torch.randn(w.shape, device="cuda") * 0.1)
    return m.eval()


def caches(model, prompts):
    ids = torch.randint(0, 256, (sum(prompts),), device="cuda")
    both = [model.allocate_cache(len(prompts), max(prompts) + 80, graphs=g) for g in (False, True)]
    for cache in both:
        model.prefill(ids, cu_of(prompts, "cuda"), cache)
    return both


@pytest.mark.parametrize("prompts", [[9], [3, 240, 17], list(range(1, 13))], ids=len)
def test_captured_steps_are_the_steps(model, prompts):
    """240 grows past the first 256 rows of keys; of 12, five at a time change places."""
    plain, captured = caches(model, prompts)
    for i in range(40):
        slots = list(range(len(prompts))) if i % 3 else torch.randperm(len(prompts))[:5].tolist()
        ids = torch.randint(0, 256, (len(slots),), device="cuda")
        (want, masks), (got, same) = (model.step(ids, c, slots) for c in (plain, captured))
        assert torch.allclose(got, want, atol=1e-4)
        assert [m.tolist() for m in masks] == [m.tolist() for m in same]
    assert captured.run.why_not == ""
    assert any(found.replay for found in captured.run.recorded.values())


@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_waits_once_for_each_stage_that_decides(model, graphs):
    cache = caches(model, [3, 11, 7])[graphs]
    ids = torch.randint(0, 256, (3,), device="cuda")
    for _ in range(20):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                masks = model.step(ids, cache)[1]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) == len(masks)
