"""The automaton against Python's decoder."""

import itertools
import random

import numpy as np
import torch

from hnet.generate import SamplingConfig, utf8
from hnet.generate.history import History
from hnet.generate.sampling import Sampler

from .oracle import is_utf8, is_utf8_so_far

EDGES = [0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF,
         0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xF8, 0xFE, 0xFF]  # fmt: skip


def test_exactly_what_python_decodes():
    """Every beginning of a text of up to three edges of ranges, with every byte after it: overlong forms, surrogates
    and what lies above U+10FFFF among them."""
    states = {b"": utf8.START}
    for length in range(4):
        for text in itertools.product(EDGES, repeat=length):
            text = bytes(text)
            if text not in states:
                continue
            after = utf8.NEXT[states[text]]
            expected = [is_utf8_so_far(text + bytes([b])) for b in range(256)]
            assert (after >= 0).tolist() == expected, text
            for b in EDGES:
                if after[b] >= 0:
                    states[text + bytes([b])] = int(after[b])
                    assert (after[b] == utf8.START) == is_utf8(text + bytes([b]))
    assert len(states) > 1000


def test_every_character_is_reached():
    for first, last in ((0, 0xD800), (0xE000, 0x110000)):
        for code in range(first, last, 499):
            state = utf8.START
            for i, byte in enumerate(encoded := chr(code).encode()):
                assert utf8.allowed(state, len(encoded) - i)[byte]
                assert not utf8.allowed(state, len(encoded) - i - 1)[byte]
                state = utf8.advance(state, byte)
            assert state == utf8.START


def test_the_state_after_any_bytes():
    r = random.Random(0)
    for _ in range(500):
        text = bytes(r.choice(EDGES) for _ in range(r.randrange(7)))
        unfinished = next((k for k in (3, 2, 1) if k <= len(text) and text[-k] >= 0xC0 and not is_utf8(text[-k:])
                           and is_utf8_so_far(text[-k:])), 0)  # fmt: skip
        state = utf8.state_after(text)
        assert (state != utf8.START) == bool(unfinished)
        if unfinished:
            assert [is_utf8_so_far(text[-unfinished:] + bytes([b])) for b in range(256)] == (
                utf8.NEXT[state] >= 0
            ).tolist()


def test_texts_of_any_limit_are_whole():
    """Of logits that love lead bytes; EOS comes only between characters."""
    logits = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    logits[:, 0xC0:] += 4
    sampler, config = Sampler(256, logits.device), SamplingConfig(valid_utf8=True)
    rows = [History("é".encode()[:1] if n % 2 else b"", config, seed=n, limit=n // 2 + 1) for n in range(40)]
    active, ended = list(range(40)), set()
    while active:
        chosen = sampler.sample(logits[active], [rows[n] for n in active]).tolist()
        for n, byte in zip(active, chosen, strict=True):
            if byte == 255:
                ended.add(n)
            else:
                rows[n].append(byte)
        active = [n for n in active if n not in ended and rows[n].new < rows[n].limit]
    assert all(is_utf8(bytes(row.text)) for row in rows)
    assert 0 < len(ended) < 40
    assert np.mean([len(row.text.decode()) < len(row.text) for row in rows]) > 0.8


def test_a_limit_that_cannot_hold_the_rest_of_a_character():
    config = SamplingConfig(valid_utf8=True)
    assert [History("🎉".encode()[:1], config, seed=0, limit=n).stuck for n in range(5)] == [True] * 3 + [False] * 2
