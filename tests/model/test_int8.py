"""Projections rounded to int8."""

import pytest
import torch

from hnet.generate import generate, quantize
from hnet.model.int8 import Int8Linear

from .test_causal_lm import cu
from .test_native_step import made, was_native


def test_rounding_is_to_the_nearest_of_255_steps_a_row():
    linear = torch.nn.Linear(50, 7)
    with torch.no_grad():
        linear.weight[3] = 0
    rounded = Int8Linear(linear)
    weight, step = linear.weight.detach(), linear.weight.detach().abs().amax(1, keepdim=True) / 127
    assert ((rounded.weight - weight).abs() <= step / 2 * (1 + 1e-5)).all()
    assert rounded.int8.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127, 127]
    x = torch.randn(4, 50)
    assert torch.allclose(rounded(x), x @ rounded.weight.T + linear.bias, atol=1e-5)
    rounded.to(torch.bfloat16)
    assert (rounded.scale.dtype, rounded.weight.dtype, rounded.int8.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.int8,
    )
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weights must be finite"):
        Int8Linear(linear)


@pytest.mark.parametrize("name", ["two", "all"])
def test_a_step_equals_the_forward_of_the_rounded_weights(name):
    model = quantize(made(name))
    kept = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    assert all("routing_module" in n or n.endswith(("residual_proj", "lm_head")) for n in kept)
    text = torch.randint(0, 254, (40,))
    want = model(text, cu_seqlens=cu(40)).logits
    exact = made(name)  # the same weights as ordinary ones
    exact.load_state_dict({n: model.get_submodule(n.rpartition(".")[0]).weight if n.endswith("weight") else p
                           for n, p in exact.state_dict().items()})  # fmt: skip
    assert torch.allclose(exact(text, cu_seqlens=cu(40)).logits, want, atol=1e-4)
    cache = model.allocate_cache(1, 50)
    model.prefill(text[:10], cu(10), cache)
    logits = torch.cat([model.step(text[t : t + 1], cache)[0] for t in range(10, 40)])
    assert was_native(cache)
    assert torch.allclose(logits, want[10:], atol=2e-4)
    cache.fused = False
    assert generate(model, "abc", max_new_bytes=3, seed=0, stop_at_eos=False)[0]
