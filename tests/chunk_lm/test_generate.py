import codecs

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hnet.generate import SamplingConfig
from hnet.generate.chunk_lm import generate, generate_text
from hnet.generate.history import History
from hnet.generate.sampling import Sampler

from .test_model import ids, make

PROMPT = bytes(range(40, 100))  # longer than the window of 48


def sampled(model, **options):
    return list(generate(model, PROMPT, **options))


@pytest.mark.parametrize("state", [False, True])
def test_greedy_chunks_are_the_argmax_of_windows(state):
    model, text = make(spectral_state=state).eval(), PROMPT
    pieces = sampled(model, max_new_bytes=28, temperature=0)
    assert [len(p) for p in pieces] == [8, 8, 8, 4]
    for piece in pieces:
        logits = model(torch.tensor([list(text[-48:])]))
        assert piece == bytes(logits[0].argmax(-1).tolist())[: len(piece)]
        text += piece


def test_stateful_chunks_remember_the_whole_text():
    model, text = make(spectral_state=True).eval(), PROMPT
    for piece in sampled(model, max_new_bytes=24, temperature=0, stateful=True):
        everything = torch.tensor([list(text)])
        logits, _ = model.predict(everything[:, -48:], everything, None)
        assert piece == bytes(logits[0].argmax(-1).tolist())
        text += piece


def test_stateful_chunks_without_spectral_state_equal_stateless():
    model = make()
    options = dict(max_new_bytes=24, seed=1)
    assert sampled(model, stateful=True, **options) == sampled(model, **options)


def test_causal_greedy_windows():
    model, text = make(causal=True).eval(), PROMPT
    pieces = sampled(model, max_new_bytes=20, temperature=0)
    for piece in pieces:
        assert piece == bytes([int(model(torch.tensor([list(text[-48:])]))[0, -1].argmax())])
        text += piece
    assert len(text) == len(PROMPT) + 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cutoff", [5, 33])
def test_steps_equal_the_full_forward_far_beyond_the_window(dtype, cutoff):
    model, text = make(dtype, causal=True).eval(), ids(2, 300)
    model.set_cutoff(cutoff)
    with torch.inference_mode():
        full, state = model(text), model.causal_state()
        parts = [model.extend(piece, state) for piece in text.split([1, 60, 1, 1, 130, 7] + [1] * 100, 1)]
    error = (torch.cat(parts, 1) - full).abs().max() / full.abs().max()
    assert error < (1e-12 if dtype == torch.float64 else 1e-5)
    assert state.count == 300


def test_causal_stateful_generation_is_greedy_on_the_whole_text():
    model, text = make(causal=True).eval(), PROMPT * 3
    for piece in generate(model, PROMPT * 3, max_new_bytes=30, temperature=0, stateful=True):
        assert piece == bytes([int(model(torch.tensor([list(text)]))[0, -1].argmax())])
        text += piece


@pytest.mark.parametrize("options", [{}, {"spectral_state": True}, {"causal": True}])
def test_cost_of_a_byte_does_not_grow_with_the_text(options):
    model = make(torch.float32, **options)
    costs = []
    stream = generate(model, PROMPT, max_new_bytes=400, stateful=True, temperature=0)
    while True:
        with FlopCounterMode(display=False) as counter:
            new = next(stream, None)
        if new is None:
            break
        costs.append(counter.get_total_flops() / len(new))
    assert len(costs) == (400 if options.get("causal") else 50)
    assert 0 < costs[1] == costs[-1] == max(costs[1:])  # the first takes in the prompt


def test_state_of_the_causal_head_has_a_fixed_size():
    model = make(torch.float32, causal=True).eval()
    state = model.causal_state()

    def size():
        return [tuple(t.shape) for t in [*state.histories, *state.means, *state.taps]]

    with torch.inference_mode():
        model.extend(ids(1, 3), state)
        small = size()
        model.extend(ids(1, 500), state)
    assert size() == small == [(11, 24)] * 3 + [(24,)] * 3 + [(12,)] * 3


def test_seed_repeats():
    model = make()
    a, b, c = (b"".join(sampled(model, max_new_bytes=40, seed=s)) for s in (1, 1, 2))
    assert a == b != c
    assert len(a) == 40
    assert model.generate(PROMPT, max_new_bytes=40, seed=1) == a


def test_a_model_in_training_is_sampled_without_dropout_and_goes_on_training():
    model = make(dropout=0.5).train()
    before = b"".join(sampled(model, max_new_bytes=16, temperature=0))
    assert model.training
    assert before == b"".join(sampled(model.eval(), max_new_bytes=16, temperature=0))
    assert not model.training


def test_repetition_penalty_sees_the_bytes_of_its_own_chunk():
    model = make().eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.zeros(8, 256).index_fill(1, torch.tensor([65, 66]), 2.0).flatten())
        model.head.bias.view(8, 256)[:, 65] += 0.5
    options = dict(max_new_bytes=8, temperature=0, repetition_window=1)
    assert b"".join(generate(model, "x", **options)) == b"AAAAAAAA"
    assert b"".join(generate(model, "x", repetition_penalty=2.0, **options)) == b"ABABABAB"


def test_top_p_and_temperature_are_those_of_the_h_net():
    model = make().eval()
    history = History(PROMPT, SamplingConfig(temperature=0.8, top_p=0.7), seed=5, bos=True)
    for row in model(torch.tensor([list(PROMPT[-48:])]))[0]:
        history.append(Sampler(256, row.device)(row[None], [history])[0].byte)
    expected = bytes(history.text[len(PROMPT) :])
    assert sampled(model, max_new_bytes=8, temperature=0.8, top_p=0.7, seed=5) == [expected]


def test_stop_strings_and_whole_characters():
    model = make().eval()
    text = b"".join(sampled(model, max_new_bytes=40, seed=1))
    stop = text[13:16]  # across two chunks
    assert b"".join(sampled(model, max_new_bytes=40, seed=1, stop=stop)) == text[: text.index(stop)]
    for limit in range(1, 12):
        new = b"".join(sampled(model, max_new_bytes=limit, seed=limit, valid_utf8=True, logit_bias={0xE2: 8.0}))
        assert len(new) == limit
        new.decode()


def test_logits_that_are_not_finite_are_an_error():
    model = make().eval()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(RuntimeError, match="logits are not finite: there is nothing to sample"):
        sampled(model, max_new_bytes=8)


def test_streamed_text_never_breaks_a_character():
    """Characters across chunks of 8 bytes: the head says a fixed chunk again and again, cut inside its characters."""
    model = make().eval()
    says = "aé తె🎉"[:5].encode()[:8]
    assert len(says) == 8
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.bias.view(8, 256)[torch.arange(8), torch.tensor(list(says))] = 50.0
    pieces = list(generate_text(model, "x", max_new_bytes=40))
    whole = (says * 5).decode(errors="replace")
    assert "".join(pieces) == whole
    decoder, sent = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    for _ in range(5):
        sent.append(decoder.decode(says))
    assert pieces[:5] == sent  # each piece ends where a character does
    assert "é" in whole


def test_bad_options():
    model = make()
    for options, message in [
        ({"prompt": ""}, "prompt must hold at least one byte"),
        ({"max_new_bytes": -1}, "max_new_bytes must be >= 0, got -1"),
        ({"temperature": -1}, "temperature must be >= 0"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(model, **{"prompt": "x", **options})
    assert list(generate(model, "x", max_new_bytes=0)) == []
