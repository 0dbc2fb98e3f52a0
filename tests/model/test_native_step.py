"""A decoding step in one call of the extension, against the step layer by layer and the full forward in fp64."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

import hnet_kernels as hk
from hnet import HNetConfig
from hnet.model import native_step

from .test_causal_lm import TWO_STAGES, cu
from .test_decode_graphs import decided

TINY = HNetConfig.preset("tiny").to_dict()
MLPS = TINY | {"d_intermediate": [96, 96]}
CONFIGS = {
    "tiny": TINY,
    "two": TWO_STAGES,
    "attention": MLPS | {"arch_layout": ["t2", ["T2"], "T1"]},
    "all": MLPS | {"arch_layout": ["m1t1C1", ["T1"], "c1M1"]},
    "ngrams": MLPS | {"arch_layout": ["c1", ["T1"], "c1"], "ngram_cfg": {"sizes": [2, 4], "rows": 50}},
    "char-end": TINY | {"routing_cfg": {"boundaries": "char-end", "logit_bias": [0.3]}},
    "char-start": TINY | {"routing_cfg": {"boundaries": "char-start"}},
    "flat": TINY
    | {"arch_layout": ["T2"], "d_model": [64], "d_intermediate": [96]}
    | {"attn_cfg": {"num_heads": [4], "rotary_emb_dim": [0], "window_size": [5]}},
}
PROMPTS = (3, 11, 7)
ORDERS = [[0, 1, 2], [2, 0, 1], [1], [2, 0]]


def made(name: str, dtype=torch.float32):
    model = decided(HNetConfig.from_dict(CONFIGS[name]))
    if model.ngrams is not None:
        torch.nn.init.normal_(model.ngrams.weight)
    return model.cast(dtype)


def filled(model, fused: bool, length: int = 60, slots: int = 3):
    cache = model.allocate_cache(slots, length)
    assert cache.fused
    cache.fused = fused
    torch.manual_seed(1)
    model.prefill(torch.randint(0, 254, (sum(PROMPTS),)), cu(*PROMPTS), cache, range(3))
    return cache


def states(cache):
    """Every tensor a cache has, in an order."""
    for stage in cache.root.stages():
        yield stage.length
        for kept in [*stage.layers, *stage.decoder, stage.route]:
            yield from (x for x in vars(kept or object).values() if isinstance(x, torch.Tensor))
    if cache.recent is not None:
        yield cache.recent


def was_native(cache) -> bool:
    return cache.native is not None and cache.native.described is not None and not cache.native.refused


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_step_layer_by_layer(name):
    model = made(name)
    plain, native = filled(model, False), filled(model, True)
    for t in range(30):
        order = ORDERS[t % len(ORDERS)]
        ids = torch.randint(0, 254, (len(order),))
        (want, masks), (got, same) = (model.step(ids, c, order) for c in (plain, native))
        assert torch.allclose(got, want, atol=2e-5 * want.abs().max())
        assert [m.tolist() for m in same] == [m.tolist() for m in masks]
    assert was_native(native)
    assert not was_native(plain)
    for a, b in zip(plain.root.stages(), native.root.stages(), strict=True):
        assert a.seen == b.seen == b.length.tolist()
    for a, b in zip(states(plain), states(native), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-4)


@pytest.mark.parametrize("name", ["tiny", "two", "all"])
def test_equals_the_full_forward_in_fp64(name):
    """With rings that go round and caches that grow; fp32 to 1e-5, bf16 weights as well as layer by layer."""
    model = made(name)
    text = torch.randint(0, 254, (290,))
    for dtype in (torch.float32, torch.bfloat16):
        model.cast(dtype)
        errors = []
        exact = made(name)
        exact.load_state_dict(model.state_dict())
        exact = exact.double()
        with hk.backend("reference"):
            want = exact(text, cu_seqlens=cu(290))
        for fused in (True, False) if dtype == torch.bfloat16 else (True,):
            cache = model.allocate_cache(2, 300)
            cache.fused = fused
            model.prefill(text[:230], cu(230), cache, [1])
            logits = torch.cat([model.step(text[t : t + 1], cache, [1])[0] for t in range(230, 290)])
            assert was_native(cache) == fused
            errors.append(((logits.double() - want.logits[230:]).norm() / want.logits[230:].norm()).item())
        if dtype == torch.float32:
            assert errors[0] < 1e-5
        else:
            assert errors[0] < max(0.02, 1.2 * errors[1])


@pytest.mark.parametrize("name", ["two", "all", "ngrams"])
def test_neighbours_slots_and_threads_change_no_bit(name):
    model = made(name)
    together, alone = filled(model, True), filled(model, True)
    before = torch.get_num_threads()
    for t in range(20):
        order = ORDERS[t % len(ORDERS)]
        ids = torch.randint(0, 254, (len(order),))
        try:
            torch.set_num_threads(2)
            got = model.step(ids, together, order)[0]
        finally:
            torch.set_num_threads(before)
        for row, slot in enumerate(order):
            assert torch.equal(model.step(ids[row : row + 1], alone, [slot])[0][0], got[row])


def test_weights_that_change_are_seen():
    """In place, by loading, as other tensors, and a logit bias that comes, changes and goes."""
    model, other = made("tiny"), made("tiny")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * 0.05)

    def halved():
        with torch.no_grad():
            model.lm_head.weight.mul_(0.5)

    def bias(value):
        model.backbone.logit_bias = None if value is None else torch.tensor(value)

    changes = [
        halved, lambda: model.load_state_dict(other.state_dict(), assign=True), lambda: bias(1.5), lambda: bias(-60.0),
        lambda: bias(None), lambda: setattr(model.lm_head, "weight", torch.nn.Parameter(torch.randn(256, 64))),
    ]  # fmt: skip
    cache = filled(model, True)
    for change in changes:
        model.step(torch.tensor([65]), cache, [0])
        change()
        plain = model.allocate_cache(3, 60)
        plain.fused = False
        for a, b in zip(states(plain), states(cache), strict=True):
            a.copy_(b)
        for a, b in zip(plain.root.stages(), cache.root.stages(), strict=True):
            a.seen[:] = b.seen
        want, got = (model.step(torch.tensor([66]), c, [0])[0] for c in (plain, cache))
        assert torch.allclose(got, want, atol=1e-5)
        assert was_native(cache)
        assert not was_native(plain)


class Louder(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_cpp_has_no_code_for_steps_as_before():
    def hook(model):
        model.backbone.encoder.layers[0].register_forward_hook(lambda m, args, out: out)

    def subclass(model):
        louder = Louder(64, 256, bias=False)
        louder.weight = model.lm_head.weight
        model.lm_head = louder

    def strided(model):
        model.lm_head.weight.data = model.lm_head.weight.data.T.contiguous().T

    for change in (hook, subclass, strided):
        model = made("tiny")
        change(model)
        cache = model.allocate_cache(1, 20)
        out = [model.step(torch.tensor([b]), cache)[0] for b in b"abc"]
        assert cache.native.refused
        full = model(torch.tensor(list(b"abc")), cu_seqlens=cu(3)).logits
        assert torch.allclose(torch.cat(out), full, atol=1e-4)


class Onlooker(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_it_stands_aside_for_another_backend_and_for_observers():
    model = made("tiny")
    cache, ids = model.allocate_cache(1, 20), torch.tensor([65])
    with hk.backend("reference"):
        model.step(ids, cache)
    with Onlooker():
        model.step(ids, cache)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.step(ids, cache)
    assert not was_native(cache)
    with hk.backend("cpu"):
        model.step(ids, cache)
    assert was_native(cache)
    assert cache.root.seen == [4] == cache.length.tolist()


def test_bytes_that_are_none():
    model = made("ngrams")
    cache = filled(model, True)
    before = [x.clone() for x in states(cache)]
    for byte in (-1, 256):
        with pytest.raises(IndexError, match=r"input_ids must be in \[0, 256\)"):
            model.step(torch.tensor([5, byte]), cache, [2, 0])
    assert all(torch.equal(a, b) for a, b in zip(before, states(cache), strict=True))
    assert was_native(cache)
    assert cache.root.seen == list(PROMPTS)


def test_sizes_that_do_not_meet_are_refused():
    from hnet_kernels import _C

    model = made("all")
    cache = filled(model, True)

    def described():
        return native_step.Describer().model(model, cache)

    _C.StepModel(described())
    table, vocab, D, *rest = described()
    for wrong in [(table, vocab, D + 1, *rest), (table, vocab, D), (table, vocab, D, *rest, 1)]:
        with pytest.raises(ValueError, match="a step needs"):
            _C.StepModel(wrong)
