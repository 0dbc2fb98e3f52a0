"""What a decoding step on a CPU is made of: products of few rows, and the choice of bytes (no public ops)."""

import numpy as np
import pytest
import torch

from hnet.generate.config import SamplingConfig
from hnet.generate.history import History
from hnet.generate.sampling import Sampler
from hnet_kernels import _C
from hnet_kernels.dispatch import backend

from .cases import rand

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


def linear(weight, x, scale=None, bias=None, threads=1):
    """x (n, in) fp32; weight and what goes with it end where their memory ends, so that reading on is found out"""
    y = torch.full((x.shape[0], weight.shape[0]), float("nan"))
    described = (
        weight.data_ptr(), CODES[weight.dtype], 0 if scale is None else scale.data_ptr(),
        None if bias is None else (bias.data_ptr(), CODES[bias.dtype]), *weight.shape,
    )  # fmt: skip
    _C.linear(described, x.data_ptr(), x.shape[0], y.data_ptr(), threads)
    return y


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize(("out", "width"), [(1, 1), (5, 33), (8, 64), (7, 1000), (130, 16)])
def test_linear_on_a_cpu(out, width, dtype):
    weight, bias = rand(out, width), rand(out, seed=1).to(torch.bfloat16)
    scale = None
    if dtype == torch.int8:
        weight, scale = (weight * 40).round().clamp(-127, 127), rand(out, seed=2).exp()
    weight = weight.to(dtype)
    exact = weight.double() * (1 if scale is None else scale.double()[:, None])
    for n in (1, 2, 3, 4, 5, 16, 33):
        x = rand(n, width, seed=n)
        got, want = linear(weight, x, scale, bias), x.double() @ exact.T + bias.double()
        size = x.double().abs() @ exact.T.abs() + 1
        assert ((got - want).abs() <= 1e-6 * width**0.5 * size).all()
        alone = torch.cat([linear(weight, row, scale, bias) for row in x.split(1)])
        assert torch.equal(got, alone)  # to the bit, whatever is beside a row


def test_threads_change_nothing_on_a_cpu():
    weight, x = rand(301, 1030), rand(3, 1030)
    assert torch.equal(linear(weight, x), linear(weight, x, threads=3))


def test_what_does_not_fit_is_refused():
    w = torch.zeros(4, 4)
    for described in [
        (w.data_ptr(), 3, 0, None, 4, 4), (w.data_ptr(), 0, w.data_ptr(), None, 4, 4), (w.data_ptr(), 9, 0, None, 4, 4),
        (w.data_ptr(), 0, 0, None, 0, 4), (w.data_ptr(), 0, 0, None, 4), (w.data_ptr(), 0, 0, None, 4, 4, 4),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="a step needs"):
            _C.linear(described, w.data_ptr(), 1, w.data_ptr(), 1)


CONFIGS = [
    {"temperature": 0},
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 5, "min_p": 0.05},
    {"temperature": 1e-40},
    {"repetition_penalty": 1.8, "no_repeat_ngram": 2, "presence_penalty": 0.5, "logit_bias": {101: 3.0}},
    {"temperature": 0, "dry_multiplier": 1.0, "dry_allowed": 1, "valid_utf8": True},
    {"top_k": 40, "top_p": 0.5, "valid_utf8": True},
]


def test_bytes_chosen_on_a_cpu_are_those_of_plain_pytorch():
    texts = [b"", b"abcabcabc ab", "naïve café".encode(), b"\xe2\x82"]
    rows = [
        History(text, SamplingConfig(**config), seed=7 * i + j, limit=50)
        for i, config in enumerate(CONFIGS)
        for j, text in enumerate(texts)
        if text != b"\xe2\x82" or config.get("valid_utf8")
    ]
    fused, plain = (Sampler(256, torch.device("cpu")) for _ in range(2))
    plain.fused = False
    assert fused.fused
    for step in range(8):
        logits = rand(len(rows), 256, seed=step) * 3
        logits[:, ord("a") : ord("f")] += 4
        if step == 3:
            logits[0, 5], logits[1, 6], logits[2, :] = float("nan"), float("inf"), -float("inf")
        chosen = fused.sample(logits, rows)
        with backend("reference"):
            assert torch.equal(fused.sample(logits, rows), chosen)
        assert torch.equal(plain.sample(logits, rows), chosen)
        assert (chosen == -1).nonzero().flatten().tolist() == ([0, 1, 2] if step == 3 else [])
        for row, byte in zip(rows, chosen.tolist(), strict=True):
            row.append(byte if byte >= 0 else 32)


def test_a_draw_on_a_cpu_follows_the_probabilities():
    """Shares of 4,000 seeds, within four standard deviations of what the logits say."""
    logits = torch.full((4000, 256), -30.0)
    logits[:, [40, 41, 42]] = torch.tensor([0.0, 1.0, 2.0])
    rows = [History(b"", SamplingConfig(temperature=2.0), seed=seed) for seed in range(4000)]
    counts = torch.bincount(Sampler(256, torch.device("cpu")).sample(logits, rows), minlength=256)[40:43].numpy()
    p = np.exp([0, 0.5, 1]) / np.exp([0, 0.5, 1]).sum()
    assert (abs(counts - 4000 * p) <= 4 * np.sqrt(4000 * p * (1 - p))).all()
