"""Bytes a second of `generate`, for one sequence and for many, at the target compression: what one step takes, and what
reading prompts takes; of a large model, how fast its weights are read."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import hnet_kernels as hk
from hnet.config import HNetConfig
from hnet.generate import quantize, stream
from hnet.model.cache import HNetCache
from hnet.model.causal_lm import HNetForCausalLM
from hnet_kernels import _C

from .steps import at_target, random_bytes

ALWAYS = {"cpu": (1, 4, 8), "cuda": (1, 32)}  # the others: --full
PROMPT = 512  # bytes


def cases(always: dict[str, tuple[int, ...]], *more: int) -> list:
    """Of a CPU and a GPU, for these numbers of sequences, and for 1, 4, 16, 64."""
    found = []
    for device, models in (
        ("cpu", [("laptop", [4.0]), ("small", [4.0])]),
        ("cuda", [("laptop", [4.0]), ("hnet_1stage_L", [6.0])]),
    ):
        for preset, target in models:
            for B in sorted({*always[device], *more}):
                marks = [pytest.mark.gpu] if device == "cuda" else []
                marks += [] if B in always[device] and preset != "small" else [pytest.mark.long]
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
        with layer_by_layer(model):
            seconds["layer by layer"] = seconds_a_step(model, B, new)
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


@contextmanager
def layer_by_layer(model: HNetForCausalLM) -> Iterator[None]:
    """Steps of new caches are not one call of the extension, as with modules it has no code for."""
    allocate = model.allocate_cache

    def plain(*args: Any, **kwargs: Any) -> HNetCache:
        cache = allocate(*args, **kwargs)
        cache.fused = False
        return cache

    model.allocate_cache = plain
    try:
        yield
    finally:
        del model.allocate_cache


# --- large models ----------------------------------------------------------------------------------------------------


def size_of(*modules: torch.nn.Module) -> int:
    """Bytes of parameters, and of int8 weights and their scales"""
    tensors = {x.data_ptr(): x for m in modules for x in [*m.parameters(), *m.buffers()]}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def product_bandwidth(size: int) -> float:
    """Bytes of bf16 weights a second in a plain product of a matrix of `size` bytes with a vector: the faster of
    PyTorch's and ours."""
    width = 4096
    weight = torch.randn(max(size // 2 // width, 1), width).bfloat16()
    x, y = torch.randn(1, width), torch.empty(1, len(weight))
    low = x[0].bfloat16()
    described = (weight.data_ptr(), 1, 0, None, *weight.shape)
    ours = functools.partial(_C.linear, described, x.data_ptr(), 1, y.data_ptr(), torch.get_num_threads())
    laps = []
    for _ in range(9):
        for product in (lambda: torch.mv(weight, low), ours):
            start = time.perf_counter()
            product()
            laps.append(time.perf_counter() - start)
    return weight.numel() * 2 / min(statistics.median(laps[::2]), statistics.median(laps[1::2]))


@pytest.mark.long
@pytest.mark.parametrize("B", [1, 16])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_weights_of_a_step(keep_row, smoke, dtype, B):
    """Seconds a step, the innermost network left out where no row begins a chunk, and the bytes of weights it reads."""
    preset, compression, steps = ("tiny", [3.0], 4) if smoke else ("hnet_1stage_L", [6.0], 24)
    config = at_target(HNetConfig.preset(preset), compression, "cpu", 256)
    torch.manual_seed(0)
    model = HNetForCausalLM(config, dtype=torch.bfloat16).eval()
    if dtype == "int8":
        quantize(model)
    outer = size_of(model.lm_head, *(m for n, m in model.backbone.named_children() if n != "main_network"))
    inner = size_of(model.backbone.main_network)
    cache, ids = model.allocate_cache(B, steps + 8), torch.tensor(list(random_bytes(B * (steps + 8)))).view(-1, B)
    seconds = read = 0.0
    for i, row in enumerate(ids):
        start = time.perf_counter()
        mask = model.step(row, cache)[1][0]
        if i >= 8:
            seconds += time.perf_counter() - start
            read += outer + inner * bool(mask.any())
    plain = read / product_bandwidth(1 << (16 if smoke else 29))
    times = {"ours": seconds / steps, "plain product": plain / steps}
    keep_row(
        times,
        ours="ours",
        bytes=round(read / steps),
        op="weights of a step",
        model=preset,
        device="cpu",
        dtype=dtype,
        B=B,
    )


def test_context(keep_row, smoke):
    """A model with windows everywhere: what has left them costs nothing."""
    config = HNetConfig.preset("tiny" if smoke else "laptop").to_dict()
    config["attn_cfg"]["window_size"] = [31, 31] if smoke else [127, 127]
    torch.manual_seed(0)
    model = HNetForCausalLM(HNetConfig.from_dict(config)).eval()
    seconds = {}
    for length in (64, 256) if smoke else (1024, 16384):
        cache, ids = model.allocate_cache(1, length + 200), torch.tensor(list(random_bytes(length + 200)))
        model.prefill(ids[:length], torch.tensor([0, length], dtype=torch.int32), cache)
        laps = []
        for byte in ids[length:, None]:
            start = time.perf_counter()
            model.step(byte, cache)
            laps.append(time.perf_counter() - start)
        seconds[f"after {length} bytes"] = statistics.mean(sorted(laps)[20:-20])
    name = f"{'tiny' if smoke else 'laptop'} with windows of {config['attn_cfg']['window_size'][0]}"
    keep_row(seconds, ours=list(seconds)[-1], op="context", model=name, device="cpu", dtype=dtype_of(model), B=1)


def dtype_of(model: HNetForCausalLM) -> str:
    return str(model.embeddings.weight.dtype)[6:]
