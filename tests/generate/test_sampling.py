"""Every setting against tests/generate/oracle.py, alone and mixed, rows with different settings in one call."""

import random

import numpy as np
import pytest
import torch

from hnet.generate import SamplingConfig
from hnet.generate.history import History
from hnet.generate.noise import Noise
from hnet.generate.sampling import Sampler, truncate

from .oracle import noises, probabilities

SETTINGS = {
    "plain": {},
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.3},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.6},
    "top_k of top_p": {"top_k": 20, "top_p": 0.5},
    "min_p": {"min_p": 0.2, "temperature": 2.0},
    "repetition": {"repetition_penalty": 3.0, "repetition_window": 5},
    "no window": {"repetition_penalty": 3.0, "repetition_window": 0},
    "presence": {"presence_penalty": 2.0, "temperature": 0},
    "frequency": {"frequency_penalty": 1.5, "temperature": 0},
    "negative": {"frequency_penalty": -0.5, "presence_penalty": -1.0},
    "bias": {"logit_bias": {97: 4.0, 98: -100.0, 0: 2.5}},
    "ngram": {"no_repeat_ngram": 3, "temperature": 0},
    "unigram": {"no_repeat_ngram": 1},
    "dry": {"dry_multiplier": 4.0, "dry_base": 1.5, "dry_allowed": 2, "temperature": 0},
    "dry of few": {"dry_multiplier": 4.0, "dry_base": 1.5, "dry_allowed": 1, "dry_window": 4},
    "utf8": {"valid_utf8": True},
    "all": {
        "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3,
        "presence_penalty": 0.3, "frequency_penalty": 0.2, "no_repeat_ngram": 4, "dry_multiplier": 1.0,
        "dry_allowed": 2, "logit_bias": {99: 1.0}, "valid_utf8": True,
    },
}  # fmt: skip


def logits_of(seed: int, rows: int) -> torch.Tensor:
    """Few bytes are likely, so that texts repeat themselves."""
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed)) * 2
    x[:, 97:101] += 6
    return x


def test_rows_with_settings_of_their_own_equal_the_slow_way():
    configs = [SamplingConfig(**options) for options in SETTINGS.values()]
    prompts = [bytes(random.Random(n).choices(b"abcd", k=3 * n)) for n in range(len(configs))]
    limit, sampler = 24, Sampler(256, torch.device("cpu"))
    rows = [History(p, c, seed=n, limit=limit) for n, (p, c) in enumerate(zip(prompts, configs, strict=True))]
    for step in range(limit):
        logits = logits_of(step, len(rows))
        choices = sampler(logits, rows)
        for n, (row, choice) in enumerate(zip(rows, choices, strict=True)):
            new = bytes(row.text[len(prompts[n]) :])
            p = probabilities(logits[n], configs[n], prompts[n], new, limit)
            noise = noises(n, step, 256)
            best = max(range(256), key=lambda b: p[b] / noise[b]) if configs[n].temperature else p.index(1.0)
            assert choice.byte == best, (list(SETTINGS)[n], step)
            row.append(choice.byte)
    text = bytes(rows[list(SETTINGS).index("ngram")].text)
    assert len({text[i : i + 3] for i in range(len(prompts[13]) - 2, len(text) - 2)}) == limit


def test_a_row_does_not_depend_on_those_beside_it():
    configs = [SamplingConfig(**options) for options in SETTINGS.values()]
    logits = logits_of(0, len(configs))
    together = Sampler(256, logits.device)(logits, [History(b"abab", c, seed=5) for c in configs])
    for n, c in enumerate(configs):
        assert Sampler(256, logits.device)(logits[n : n + 1], [History(b"abab", c, seed=5)]) == [together[n]]


def test_noise_is_splitmix_and_draws_follow_the_probabilities():
    noise = Noise(2**63 - 1)
    for drawn in (7, 0, 15, 16, 17, 5000):
        assert noise.of(drawn).tolist() == pytest.approx(noises(2**63 - 1, drawn, 256), rel=1e-12)
    p = torch.softmax(torch.arange(4.0), 0)
    logits = torch.full((4000, 256), -1e4)
    logits[:, :4] = p.log()
    draws = Sampler(256, logits.device).sample(logits, [History(b"", SamplingConfig(), seed=s) for s in range(4000)])
    expected = p * 4000
    assert (
        (torch.bincount(draws, minlength=4) - expected) ** 2 / expected
    ).sum() < 16.3  # chi-square, 3 degrees, 0.1 %


def test_bytes_after_the_first_are_drawn_independently():
    config, logits = SamplingConfig(), torch.zeros(300, 256)
    rows = [History(b"", config, seed=s, bos=True) for s in range(300)]
    sampler, draws = Sampler(256, logits.device), []
    for _ in range(20):
        draws.append(sampler.sample(logits, rows))
        for row, byte in zip(rows, draws[-1].tolist(), strict=True):
            row.append(byte)
    same = np.mean([(a == b).float().mean().item() for a, b in zip(draws, draws[1:], strict=False)])
    assert same == pytest.approx(1 / 256, abs=0.003)


def test_truncation():
    def cut(k=4, p=1.0, m=0.0):
        columns = [torch.tensor([[v]]) for v in (k, p, m)]
        return truncate(torch.tensor([[0.15, 0.5, 0.05, 0.3]]), *columns)[0].tolist()

    def these(*kept):
        return pytest.approx([v if v in kept else 0 for v in (0.15, 0.5, 0.05, 0.3)])

    assert cut() == these(0.15, 0.5, 0.05, 0.3)
    assert cut(p=0.5) == these(0.5)
    assert cut(p=0.6) == these(0.5, 0.3)
    assert cut(k=2, p=0.7) == these(0.5, 0.3)  # 0.5 of 0.8 is less than 0.7
    assert cut(m=0.35) == these(0.5, 0.3)
    assert cut(k=1, p=1e-9, m=1.0) == these(0.5)


def test_repetition_penalty_forgets_what_left_the_window():
    c = SamplingConfig(temperature=0, repetition_penalty=4.0, repetition_window=2)
    logits = torch.full((1, 256), -1.0)
    logits[0, :3] = torch.tensor([1.0, 2.0, -1.0])
    sampler = Sampler(256, logits.device)
    row = History(b"\x01\x02", c, seed=0)
    assert sampler.sample(logits, [row]).tolist() == [0]
    row.append(0)  # byte 1 has left the window
    assert sampler.sample(logits, [row]).tolist() == [1]


def test_a_ban_that_leaves_nothing_is_lifted_but_not_that_of_broken_characters():
    logits = torch.zeros(1, 256)
    c = SamplingConfig(temperature=0, no_repeat_ngram=1, valid_utf8=True)
    prompt = bytes(range(256)) + "é".encode()[:1]
    byte = Sampler(256, logits.device).sample(logits, [History(prompt, c, seed=0)]).item()
    assert byte == 0x80


@pytest.mark.parametrize("temperature", [1e-50, 1e-38, 1e-30, 1e-3])
def test_almost_no_temperature_is_greedy(temperature):
    logits = logits_of(0, 50) * 100
    rows = [History(b"", SamplingConfig(temperature=temperature), seed=n) for n in range(50)]
    best = logits.index_fill(1, torch.tensor([254]), -1e9).argmax(-1)
    assert torch.equal(Sampler(256, logits.device).sample(logits, rows), best)


def test_log_probabilities_are_those_of_the_model():
    logits = logits_of(0, 3)
    configs = [
        SamplingConfig(temperature=0, logit_bias={7: 1e3}, logprobs=2),
        SamplingConfig(),
        SamplingConfig(logprobs=0),
    ]
    a, b, c = Sampler(256, logits.device)(logits, [History(b"", config, seed=1) for config in configs])
    exact = logits.double() - logits.double().exp().sum(-1, keepdim=True).log()
    assert a.byte == 7
    assert a.logprob == pytest.approx(exact[0, 7].item(), abs=1e-5)
    best = sorted(range(256), key=lambda i: -exact[0, i])[:2]
    assert [byte for byte, _ in a.top] == best
    assert [p for _, p in a.top] == pytest.approx([exact[0, i].item() for i in best], abs=1e-5)
    assert (b.logprob, b.top, c.top) == (None, (), ())
    assert c.logprob == pytest.approx(exact[2, c.byte].item(), abs=1e-5)


@pytest.mark.parametrize("config", [{}, {"temperature": 0}, {"top_p": 0.5}, {"valid_utf8": True}], ids=str)
@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_are_told_apart(config, lost):
    logits = logits_of(0, 3)
    logits[1, 254] = lost  # a byte that is masked
    rows = [History(b"", SamplingConfig(**config), seed=1) for _ in range(3)]
    chosen = Sampler(256, logits.device).sample(logits, rows).tolist()
    assert [byte < 0 for byte in chosen] == [False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be >= 0, got -1"),
        ({"temperature": 10**400}, "temperature must be >= 0, got 1000"),
        ({"temperature": float("nan")}, "temperature must be >= 0, got nan"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_k": 1.5}, "top_k must be a whole number, got 1.5"),
        ({"repetition_penalty": 0.5}, "repetition_penalty must be >= 1"),
        ({"repetition_window": -1}, "repetition_window must be >= 0"),
        ({"presence_penalty": float("inf")}, r"presence_penalty must be in \[-1e\+09, 1e\+09\], got inf"),
        ({"no_repeat_ngram": -3}, "no_repeat_ngram must be >= 0"),
        ({"dry_multiplier": -1}, "dry_multiplier must be >= 0"),
        ({"dry_base": 0.9}, "dry_base must be >= 1"),
        ({"dry_allowed": 0}, "dry_allowed must be >= 1"),
        ({"logprobs": 257}, r"logprobs must be in \[0, 256\]"),
        ({"logit_bias": {256: 1.0}}, r"a byte of logit_bias must be in \[0, 255\], got 256"),
        ({"logit_bias": {65: float("nan")}}, r"logit_bias of byte 65 must be in \[-1e\+09, 1e\+09\], got nan"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)
