"""Slots that are moved and cleared."""

import pytest
import torch

from hnet import HNetConfig
from hnet.model.cache import AttentionCache

from .test_causal_lm import TWO_STAGES, cu
from .test_decode_graphs import decided

LENGTHS = (40, 3, 25)
LAYOUTS = {
    "attention": {"arch_layout": ["t2", ["T2"], "t1"]},
    "all": {"arch_layout": ["m1t1", ["T1"], "c1m1"]},
}


@pytest.fixture(params=["tiny", "two", *LAYOUTS])
def model(request):
    config = HNetConfig.preset("tiny").to_dict()
    if request.param == "two":
        config = TWO_STAGES
    elif request.param in LAYOUTS:
        config |= LAYOUTS[request.param]
    return decided(HNetConfig.from_dict(config))


def filled(model):
    cache = model.allocate_cache(3, 80)
    torch.manual_seed(1)
    model.prefill(torch.randint(0, 254, (sum(LENGTHS),)), cu(*LENGTHS), cache)
    return cache


def test_a_moved_slot_goes_on_as_it_was(model):
    torch.manual_seed(2)
    ids = torch.randint(0, 254, (12, 1))
    for source, to in ((2, 0), (0, 1)):  # over a longer one, over a shorter one
        plain, moved = filled(model), filled(model)
        moved.move(source, to)
        assert moved.length.tolist()[to] == LENGTHS[source]
        for byte in ids:
            expected, got = model.step(byte, plain, [source])[0], model.step(byte, moved, [to])[0]
            assert torch.allclose(got, expected, atol=1e-5)
    with pytest.raises(ValueError, match="slots must be distinct and from 0 to 2"):
        moved.move(1, 1)


def attention_caches(cache):
    return [layer for stage in cache.root.stages() for layer in stage.attention()]


def test_a_cleared_slot_hands_on_no_nan(model):
    plain, cache = filled(model), filled(model)
    assert all(isinstance(layer, AttentionCache) for layer in attention_caches(cache))
    for layer in attention_caches(cache):
        layer.k[1], layer.v[1] = float("nan"), float("nan")
    cache.clear(1)
    prompt = torch.randint(0, 254, (5,))
    for c in (plain, cache):
        model.prefill(prompt, cu(5), c, [1])
    for byte in prompt[:, None]:
        assert torch.equal(model.step(byte, cache, [1])[0], model.step(byte, plain, [1])[0])
