"""Requests that join and leave: each text is the one its request would have alone."""

import random
import threading

import pytest
import torch

from hnet import HNetConfig, HNetForCausalLM
from hnet.generate import Engine, SamplingConfig, generate
from hnet.model.decode_graphs import Graphs

from ..model.tape import taped
from ..model.test_causal_lm import TWO_STAGES
from ..model.test_decode_graphs import decided

GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module", params=["tiny", "two"])
def model(request):
    m = decided(HNetConfig.preset("tiny") if request.param == "tiny" else HNetConfig.from_dict(TWO_STAGES))
    with torch.no_grad():
        m.lm_head.weight.mul_(40)  # peaked, so that rounding decides nothing and a text depends on what was before
    return m


def run(engine, most=10_000):
    for _ in range(most):
        if not engine.busy:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def alone(model, prompt, config, **options):
    engine = Engine(model, slots=1)
    request = engine.submit(prompt, config, **options)
    run(engine)
    return bytes(request.text), request.finish


def cases(count):
    r = random.Random(0)
    settings = [GREEDY, SamplingConfig(), SamplingConfig(top_k=20, valid_utf8=True),
                SamplingConfig(temperature=0.5, repetition_penalty=1.5, no_repeat_ngram=2)]  # fmt: skip
    for n in range(count):
        prompt = bytes(r.choices(range(128), k=r.randrange(30)))
        yield prompt, settings[n % 4], dict(max_new_bytes=r.randrange(1, 25), seed=n, stop_at_eos=n % 3 > 0)


def test_many_requests_through_few_slots_equal_each_alone(model):
    engine, texts, asked = Engine(model, slots=3, max_length=64, prefill_bytes=40), list(cases(9)), []
    for prompt, config, options in texts[:4]:
        asked.append(engine.submit(prompt, config, **options))
    for prompt, config, options in texts[4:]:  # they come while others run
        engine.step()
        engine.step()
        asked.append(engine.submit(prompt, config, **options))
        assert len(engine.running) <= 3
    run(engine)
    expected = [alone(model, prompt, config, **options) for prompt, config, options in texts]
    assert [(bytes(r.text), r.finish) for r in asked] == expected
    assert len({text for text, _ in expected}) > 6
    for (prompt, config, options), request in zip(texts, asked, strict=True):
        if config is GREEDY:
            del options["seed"]
            assert generate(model, prompt, temperature=0, **options) == [bytes(request.text)]


def test_slots_in_use_lie_first_so_a_step_gathers_nothing(model):
    engine, orders = Engine(model, slots=4, max_length=64), []
    reserve = type(engine.cache.root).reserve
    engine.cache.root.reserve = lambda named: orders.append(named) or reserve(engine.cache.root, named)
    asked = [engine.submit(b"abc", max_new_bytes=n, seed=n, stop_at_eos=False) for n in (2, 9, 4, 12)]
    run(engine)
    assert all(named == list(range(len(named))) for named in orders)
    assert [len(named) for named in orders] == [4] + [3] * 2 + [2] * 5 + [1] * 3
    assert [len(r.text) for r in asked] == [2, 9, 4, 12]


def test_with_graphs():
    model = decided(HNetConfig.preset("tiny"))
    engine = Engine(model, slots=9, max_length=64)
    engine._cache = model.allocate_cache(9, 64, graphs=Graphs())
    engine._cache.run = taped(engine._cache)
    asked = [engine.submit(f"{n}", max_new_bytes=3 + n % 4, seed=n, stop_at_eos=False) for n in range(10)]
    run(engine)
    for r in asked:
        options = dict(max_new_bytes=r.max_new_bytes, seed=r.seed, stop_at_eos=False)
        assert (bytes(r.text), r.finish) == alone(model, r.prompt, r.config, **options)


def test_cancelled_requests_leave_and_others_do_not_notice(model):
    engine = Engine(model, slots=2, max_length=64)
    first, second, third, fourth = (
        engine.submit(f"prompt {n}", max_new_bytes=20, seed=n, stop_at_eos=False) for n in range(4)
    )
    for _ in range(5):
        engine.step()
    engine.cancel(first)
    engine.cancel(third)  # that waits
    assert len(first.text) == 5
    run(engine)
    assert [r.finish for r in (first, second, third, fourth)] == ["cancelled", "length", "cancelled", "length"]
    assert (len(first.text), bytes(third.text)) == (5, b"")
    for n, r in ((1, second), (3, fourth)):
        expected = alone(model, f"prompt {n}", SamplingConfig(), max_new_bytes=20, seed=n, stop_at_eos=False)
        assert bytes(r.text) == expected[0]
    engine.cancel(second)
    assert second.finish == "length"
    assert engine.step() == []


def poisoned():
    """A model for which byte 7 is no number."""
    torch.manual_seed(0)
    config = HNetConfig.from_dict(HNetConfig.preset("tiny").to_dict() | {"arch_layout": ["t1", ["T1"], "c1"]})
    m = HNetForCausalLM(config).eval()  # its outermost attention keeps every byte
    with torch.no_grad():
        m.embeddings.weight[7] = float("nan")
    return m


def test_logits_that_are_no_numbers_end_one_request():
    model = poisoned()
    healthy = SamplingConfig(logit_bias={7: -1e9})
    engine = Engine(model, slots=3, max_length=300)
    prompts = [b"good", b"bad \x07 prompt of some length" * 4, b"also good"]
    asked = [engine.submit(p, healthy, max_new_bytes=12, seed=1, stop_at_eos=False) for p in prompts]
    sick = SamplingConfig(logit_bias={7: 1e9})  # its first byte is the bad one
    asked.append(engine.submit("x", sick, max_new_bytes=12, seed=1))
    after = [engine.submit("after", healthy, max_new_bytes=12, seed=n, stop_at_eos=False) for n in range(4)]
    run(engine)
    assert [r.finish for r in asked] == ["length", "error", "length", "error"]
    assert all("the model's logits are not finite" in r.error for r in asked if r.finish == "error")
    assert bytes(asked[3].text) == b"\x07"
    for r in (asked[0], asked[2], *after):  # those packed beside it, and those who had its slot after it
        expected = alone(model, r.prompt, healthy, max_new_bytes=12, seed=r.seed, stop_at_eos=False)
        assert (bytes(r.text), r.finish) == expected == (bytes(r.text), "length")


def test_an_exception_of_the_model_ends_what_runs_and_is_raised(model, monkeypatch):
    engine = Engine(model, slots=1, max_length=64)
    asked = [engine.submit("a", max_new_bytes=5, seed=1, stop_at_eos=False) for _ in range(2)]
    engine.step()
    with monkeypatch.context() as m:
        m.setattr(model, "step", lambda *_: (_ for _ in ()).throw(MemoryError("no more")))
        with pytest.raises(MemoryError):
            engine.step()
    assert (asked[0].finish, asked[0].error, asked[1].finish) == ("error", "MemoryError: no more", None)
    run(engine)
    assert asked[1].finish == "length"


def test_submitting_from_another_thread(model):
    engine, asked = Engine(model, slots=2, max_length=64), []

    def ask():
        for n in range(8):
            asked.append(engine.submit(f"{n}", max_new_bytes=4, seed=n, stop_at_eos=False))
            if n % 4 == 3:
                engine.cancel(asked[-1])

    thread = threading.Thread(target=ask)
    thread.start()
    while thread.is_alive() or engine.busy:
        engine.step()
    assert [r.finish for r in asked] == (["length"] * 3 + ["cancelled"]) * 2
    for n in (0, 5):
        expected = alone(model, f"{n}", None, max_new_bytes=4, seed=n, stop_at_eos=False)
        assert (bytes(asked[n].text), "length") == expected


def test_prompts_are_taken_in_up_to_a_number_of_bytes(model):
    engine = Engine(model, slots=8, max_length=64, prefill_bytes=20)
    for n in (30, 5, 5, 5, 5):
        engine.submit(b"x" * n, max_new_bytes=20, stop_at_eos=False)
    sizes = []
    for _ in range(4):
        engine.step()
        sizes.append(len(engine.running))
    assert sizes == [1, 4, 5, 5]


def test_log_probabilities_and_chunks_of_what_is_shown(model):
    config = SamplingConfig(logprobs=1)
    full = alone(model, "prompt", config, max_new_bytes=20, seed=3, stop_at_eos=False)[0]
    engine = Engine(model, slots=2, max_length=64, chunks=True)
    other = engine.submit("another prompt", max_new_bytes=30, seed=1, stop_at_eos=False)
    r = engine.submit("prompt", config, max_new_bytes=20, seed=3, stop=full[10:14], stop_at_eos=False)
    run(engine)
    assert bytes(r.text) == full[: full.index(full[10:14])]
    assert len(r.text) == len(r.logprobs) > 0
    for request in (r, other):
        text = bytes([254]) + request.prompt + bytes(request.history.text[len(request.prompt) :])
        out = model(torch.tensor([list(text)]))
        at, depths = list(range(len(text))), [0] * len(text)
        for routing in out.routing:
            at = [p for p, b in zip(at, routing.boundary_mask.tolist(), strict=True) if b]
            for p in at:
                depths[p] += 1
        assert request.prompt_depths + request.depths == depths[1 : 1 + len(request.prompt) + len(request.depths)]
        assert len(request.depths) == request.history.new - 1
        assert sum(request.depths) > 0
    logprobs = torch.log_softmax(model(torch.tensor([[254, *b"prompt", *r.text]])).logits[0].double(), -1)
    for i, choice in enumerate(r.logprobs):
        assert choice.byte == r.text[i]
        assert choice.logprob == pytest.approx(logprobs[6 + i, choice.byte].item(), abs=2e-3)


def test_what_cannot_be_asked(model):
    engine = Engine(model, max_length=32)
    for options, message in [
        ({"prompt": b"x" * 20, "max_new_bytes": 12}, "with max_new_bytes 12 does not fit max_length 32"),
        ({"max_new_bytes": -1}, "max_new_bytes must be >= 0, got -1"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"stop": [""]}, "stop must be texts or bytes, none of them empty"),
        ({"stop": b"\xff", "config": SamplingConfig(valid_utf8=True)}, "stop must be UTF-8"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            engine.submit(**{"prompt": "x", "max_new_bytes": 1, **options})
    for name in ("slots", "max_length", "prefill_bytes"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Engine(model, **{name: 0})
    assert not engine.busy
    assert engine.submit(b"x" * 20, max_new_bytes=11).finish is None


def test_nothing_to_write():
    engine = Engine(decided(HNetConfig.preset("tiny")))
    whole = SamplingConfig(valid_utf8=True)
    assert engine.submit("x", max_new_bytes=0).finish == "length"
    assert engine.submit("🎉".encode()[:1], whole, max_new_bytes=2).finish == "length"
    assert not engine.busy
    r = engine.submit("🎉".encode()[:1], whole, max_new_bytes=3, stop_at_eos=False)
    run(engine)
    (r.prompt + r.text).decode()
