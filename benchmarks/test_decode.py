"""Bytes a second of `generate`, for one sequence and for many, at the target compression: what one step takes, and what
reading prompts takes."""

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

ALWAYS = {"cpu": (1, 4, 8), "cuda": (1, 32)}  # the others: --full
PROMPT = 512  # bytes


def cases(always: dict[str, tuple[int, ...]], *more: int) -> list:
    """Of a CPU and a GPU, for these numbers of sequences, and for 1, 4, 16, 64."""
    found = []
    for device, models in (("cpu", [("laptop", [4.0])]), ("cuda", [("laptop", [4.0]), ("hnet_1stage_L", [6.0])])):
        for preset, target in models:
            for B in sorted({*always[device], *more}):
                marks = [pytest.mark.gpu] if device == "cuda" else []
                marks += [] if B in always[device] else [pytest.mark.long]
                name = f"{preset}-B{B}" + ("-cpu" if device == "cpu" else "")
                found.append(pytest.param(device, preset, B, target, id=name, marks=marks))
    return found


def seconds_a_step(model: HNetForCausalLM, B: int, new: int) -> float:
    """Median over the second half of `new` steps, each of which hands its bytes to the host."""
    prompts = [random_bytes(64, seed) for seed in range(B)]
    marks = [time.perf_counter() for _ in stream(model, prompts, max_new_bytes=new, seed=0, stop_at_eos=False)]
    later = marks[new // 2 :]
    return statistics.median(b - a for a, b in zip(later, later[1:], strict=False))


def seconds_a_prefill(model: HNetForCausalLM, B: int, length: int, rounds: int) -> float:
    """Median over `rounds` of reading B prompts of `length` bytes to their first new bytes, cache included."""
    prompts, laps = [random_bytes(length, seed) for seed in range(B)], []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        next(stream(model, prompts, max_new_bytes=1, seed=0, stop_at_eos=False))
        laps.append(time.perf_counter() - start)
    return statistics.median(laps[1:])


def at_its_target(preset: str, compression: list[float], device: str, smoke: bool) -> HNetForCausalLM:
    config = at_target(HNetConfig.preset(preset), compression, device, 256 if smoke else 2048)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return HNetForCausalLM(config, device=device, dtype=dtype).eval()


@pytest.mark.parametrize(("device", "preset", "B", "compression"), cases(ALWAYS, 1, 4, 16, 64))
def test_decode(keep_row, smoke, device, preset, B, compression):
    if smoke:
        preset, B, compression = "tiny", 2, [3.0]
    model = at_its_target(preset, compression, device, smoke)
    new = 8 if smoke else 128
    seconds = {"ours": seconds_a_step(model, B, new)}
    if device == "cuda":
        model.allocate_cache = functools.partial(model.allocate_cache, graphs=False)
        seconds["without graphs"] = seconds_a_step(model, B, new)
    else:
        with hk.backend("reference"):
            seconds["plain PyTorch ops"] = seconds_a_step(model, B, new)
    keep_row(seconds, ours="ours", op="decoding", model=preset, device=device, dtype=dtype_of(model), B=B)


@pytest.mark.parametrize(
    ("device", "preset", "B", "compression"), cases({"cpu": (1, 4), "cuda": ()}, 1, 4, 16, 64)
)  # fmt: skip
def test_prefill(keep_row, smoke, rounds, device, preset, B, compression):
    length = PROMPT
    if smoke:
        preset, B, compression, length = "tiny", 2, [3.0], 32
    model = at_its_target(preset, compression, device, smoke)
    seconds = {"ours": seconds_a_prefill(model, B, length, rounds)}
    if device == "cpu":
        with hk.backend("reference"):
            seconds["plain PyTorch ops"] = seconds_a_prefill(model, B, length, rounds)
    keep_row(
        seconds, ours="ours", op="prefill", model=preset, device=device, dtype=dtype_of(model), B=B, length=length,
    )  # fmt: skip


def dtype_of(model: HNetForCausalLM) -> str:
    return str(model.embeddings.weight.dtype)[6:]
