"""Training steps as the trainer makes them, in a steady run: seconds, MFU, peak memory.

The model is new but at its target: without training about half of all positions are boundaries, so a logit bias, found
on the data, sets the rate of every stage, and the learning rate is next to nothing, so that the rate stays. What was
realised is part of the result. The data are random bytes: nothing here depends on what they say.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hnet.config import HNetConfig
from hnet.model.causal_lm import HNetForCausalLM
from hnet.model.cost import plan
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer

BYTES = 254  # values; the others begin and end documents


class Case(NamedTuple):
    preset: str
    T: int  # positions of a step
    L: int  # of a sequence
    compression: list[float]

    def __str__(self) -> str:
        return f"{self.preset}-T{self.T}"


class Steps(NamedTuple):
    seconds: float  # a step, median
    flops_per_byte: float  # forward and backward, realised
    mfu: float | None  # None on a device whose peak is not known
    peak_bytes: int | None  # allocated at most; None on a CPU
    bytes_per_chunk: float | None  # of the outermost stage; None without chunks


def measure(config: TrainConfig, warmup: int, steps: int) -> Steps:
    """`steps` steps after `warmup`, each read back once the next has been started where the trainer works so."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(config)
    rows = []
    for _ in range(warmup + steps):
        trainer.running.append(trainer.start_step())
        if len(trainer.running) > trainer.delay:
            rows.append(trainer.finish_step(trainer.running.popleft()))
    rows += [trainer.finish_step(running) for running in trainer.running]
    trainer.task.stream.close()
    times = [row["time"] for row in rows][warmup - 1 :]
    seconds = statistics.median(b - a for a, b in zip(times, times[1:], strict=False))
    last = rows[-1]
    flops = last["flops_per_byte"]
    mfu = None if trainer.peak is None else flops * config.batch_bytes / seconds / trainer.peak
    return Steps(seconds, flops, mfu, last.get("peak_memory"), last.get("stage0/bytes_per_chunk"))


def random_bytes(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, BYTES, size, dtype=np.uint8).tobytes()


def prepare(folder: Path, case: Case, device: str) -> dict[str, TrainConfig]:
    """Configurations of the H-Net and of an isotropic Transformer as costly, with data of their own in `folder`."""
    for name in ("train", "val"):
        (folder / f"{name}.bin").write_bytes(random_bytes(8 * case.T))
    hnet = at_target(HNetConfig.preset(case.preset), case.compression, device, case.L)
    configs = {}
    for name, model, compression in (
        ("hnet", hnet, case.compression),
        ("isotropic", isotropic_like(hnet, case.compression, case.L), []),
    ):
        model.to_json(path := folder / f"{name}.json")
        configs[name] = TrainConfig(
            data=[str(folder / "train.bin")], val_data=[str(folder / "val.bin")], model_config=str(path),
            compression=compression, seq_len=case.L, batch_bytes=case.T, learning_rate=1e-9, warmup_steps=0,
            out=str(folder / "run"), plots=False, device=device,
        )  # fmt: skip
    return configs


def with_budget(config: TrainConfig) -> TrainConfig:
    """max_chunks a quarter above the target: static shapes."""
    return dataclasses.replace(config, max_chunks=[min(1.25 / n, 1.0) for n in running_product(config.compression)])


def running_product(factors: list[float]) -> list[float]:
    return np.cumprod(factors).tolist()


@torch.no_grad()
def at_target(config: HNetConfig, compression: list[float], device: str, length: int, seed: int = 0) -> HNetConfig:
    """The config with the logit biases at which a new model has `compression` positions a chunk on random bytes."""
    torch.manual_seed(seed)
    model = HNetForCausalLM(config, device=device)
    count = max(length, 4096) // length
    ids = torch.tensor(list(random_bytes(count * length)), device=device).view(count, length)
    biases: list[float] = []
    for s, (stage, target) in enumerate(zip(model.stages(), compression, strict=False)):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            r = model(ids).routing[s]
        p = r.boundary_prob
        inside = torch.ones_like(p, dtype=torch.bool).index_fill(0, r.cu_seqlens[:-1].long(), False)
        odds = torch.logit(p[inside].float(), eps=1e-6)
        biases.append(-torch.quantile(odds, 1 - 1 / target).item())
        stage.set_logit_bias(biases[-1])
    return dataclasses.replace(config, routing_cfg=dataclasses.replace(config.routing_cfg, logit_bias=biases))


def flops(config: HNetConfig, compression: list[float], length: int) -> float:
    """Of a byte, forward and backward, at the target."""
    return sum(plan(config, compression, float(length), length, False, True).flops)


def isotropic(width: int, layers: int, d_intermediate: int) -> HNetConfig:
    """A Transformer over bytes: attention to all before, heads of 64 channels, SwiGLU."""
    return HNetConfig.from_dict(
        {
            "arch_layout": [f"T{layers}"], "d_model": [width], "d_intermediate": [d_intermediate],
            "attn_cfg": {"num_heads": [max(width // 64, 1)], "rotary_emb_dim": [32], "window_size": [-1]},
        }
    )  # fmt: skip


def isotropic_like(config: HNetConfig, compression: list[float], length: int) -> HNetConfig:
    """Of Transformers one to two times as wide as the outermost stage, with a SwiGLU of 2 to 4 widths in 128s, the one
    whose FLOPs a byte come nearest to those of `config` at its target."""
    wanted, best = flops(config, compression, length), (math.inf, 0, 0, 0)
    narrowest = -(-config.d_model[0] // 64) * 64
    for width in range(narrowest, 2 * narrowest + 1, 64):
        for d in range(-(-2 * width // 128) * 128, 4 * width + 1, 128):
            head, layer = 6.0 * width * config.vocab_size, 6.0 * (4 * width**2 + 3 * width * d)
            layer += 6.0 * width * (length + 1)  # attention: 12 width for each of the (length + 1) / 2 keys seen
            n = max(round((wanted - head) / layer), 1)
            best = min(best, (abs(head + n * layer - wanted), width, n, d))
    return isotropic(*best[1:])
