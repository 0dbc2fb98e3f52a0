"""Bytes a second of `generate`: what one step takes, for one sequence and for many, at the target compression."""

from __future__ import annotations

import functools
import statistics
import time

import pytest
import torch

import hnet_kernels as hk
from hnet.config import HNetConfig
from hnet.generate import stream
from hnet.model.causal_lm import HNetForCausalLM

from .steps import at_target, random_bytes

CASES = [
    *(pytest.param("cpu", "laptop", B, [4.0], id=f"laptop-B{B}-cpu") for B in (1, 8)),
    *(
        pytest.param("cuda", preset, B, target, id=f"{preset}-B{B}", marks=pytest.mark.gpu)
        for preset, target in (("laptop", [4.0]), ("hnet_1stage_L", [6.0]))
        for B in (1, 32)
    ),
]


def seconds_a_step(model: HNetForCausalLM, B: int, new: int) -> float:
    """Median over the second half of `new` steps, each of which hands its bytes to the host."""
    prompts = [random_bytes(64, seed) for seed in range(B)]
    marks = [time.perf_counter() for _ in stream(model, prompts, max_new_bytes=new, seed=0, stop_at_eos=False)]
    later = marks[new // 2 :]
    return statistics.median(b - a for a, b in zip(later, later[1:], strict=False))


@pytest.mark.parametrize(("device", "preset", "B", "compression"), CASES)
def test_decode(keep_row, smoke, device, preset, B, compression):
    if smoke:
        preset, B, compression = "tiny", 2, [3.0]
    config = at_target(HNetConfig.preset(preset), compression, device, 256 if smoke else 2048)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = HNetForCausalLM(config, device=device, dtype=dtype).eval()
    new = 8 if smoke else 128
    seconds = {"ours": seconds_a_step(model, B, new)}
    if device == "cuda":
        model.allocate_cache = functools.partial(model.allocate_cache, graphs=False)
        seconds["without graphs"] = seconds_a_step(model, B, new)
    else:
        with hk.backend("reference"):
            seconds["plain PyTorch ops"] = seconds_a_step(model, B, new)
    keep_row(seconds, ours="ours", op="decoding", model=preset, device=device, dtype=str(dtype)[6:], B=B)
