"""The training loop."""

from __future__ import annotations

import math
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hnet_kernels as hk
from hnet.data.corpus import Corpus
from hnet.data.packing import Batch, PackStream, eval_batches
from hnet.data.sources import open_data
from hnet.data.streaming import DocumentStream
from hnet.model.causal_lm import HNetForCausalLM

from .checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from .config import TrainConfig
from .console import TrainConsole
from .losses import Losses, losses
from .metrics import MetricsFile, truncate_metrics
from .optim import Optimizers, stage_parameters
from .schedule import lr_factor


class Trainer:
    """A run: model, data, optimiser and their joint state. `train()` runs it to the end."""

    def __init__(self, config: TrainConfig, resume: bool = False) -> None:
        self.config = config.validate()
        self.out = Path(config.out)
        self.device = pick_device(config.device)
        self.autocast_dtype = pick_autocast(config.dtype, self.device)
        if self.device.type == "cpu":
            hk.keep_memory()
        train, self.val = read_data(config)
        self.stream = PackStream(train, config.seq_len, config.batch_bytes, config.seed)
        torch.manual_seed(config.seed)
        self.model = HNetForCausalLM(config.model(), device=self.device)
        self.optimizers = Optimizers(self.model, config)
        self.stages = stage_parameters(self.model)
        self.step = self.bytes = 0
        self.seconds = 0.0
        if resume:
            self._load(latest_checkpoint(self.out / "checkpoints"))
        elif (self.out / "metrics.jsonl").exists():
            raise FileExistsError(f"{self.out} already holds a run: resume it with --resume, or choose another --out")
        self.stop = False

    # --- one step -------------------------------------------------------------------------------------------------

    def _autocast(self):
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def _losses(self, batch: Batch) -> Losses:
        with self._autocast():
            out = self.model(batch.input_ids, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
        return losses(out.logits, batch.targets, out.routing, self.config.compression, self.config.ratio_weight)

    def train_step(self) -> dict[str, Any]:
        """One optimiser step; returns its line of metrics.jsonl."""
        c, begin = self.config, time.perf_counter()
        batch = next(self.stream).to(self.device)
        result = self._losses(batch)
        result.loss.backward()
        norms = [norm(p) for p in self.stages]
        total = norm_of(norms)
        if c.max_grad_norm:
            clip(self.model, total, c.max_grad_norm)
        factor = lr_factor(self.step, c.steps, c.schedule, c.warmup_steps, c.decay_fraction, c.min_lr)
        rates = self.optimizers.set_lr(factor)
        self.optimizers.step()
        self.optimizers.zero_grad()
        self.step += 1
        self.bytes += batch.num_targets
        ce = result.ce.item()
        took = time.perf_counter() - begin
        self.seconds += took
        row = {
            "step": self.step, "bytes": self.bytes, "time": self.seconds, "loss": result.loss.item(), "ce": ce,
            "bpb": ce / math.log(2), "ratio_loss": result.ratio_loss.item(), "grad_norm": total.item(),
            "lr": c.learning_rate * factor, "bytes_per_second": batch.num_targets / took,
        }  # fmt: skip
        for i, (s, target) in enumerate(zip(result.stages, c.compression, strict=True)):
            row |= {
                f"stage{i}/F": s.F.item(), f"stage{i}/G": s.G.item(), f"stage{i}/target": target,
                f"stage{i}/bytes_per_chunk": batch.num_targets / max(s.chunks.item(), 1),
                f"stage{i}/ratio_loss": s.ratio_loss.item(),
            }  # fmt: skip
        for i, n in enumerate(norms):
            row |= {f"stage{i}/grad_norm": n.item(), f"stage{i}/lr": rates.get(i, 0.0)}
        return row

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out cross entropy (nats a target) and bits per byte."""
        self.model.eval()
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        for batch in eval_batches(self.val, self.config.seq_len, self.config.batch_bytes, self.config.eval_bytes):
            nats += self._losses(batch.to(self.device)).ce.double() * batch.num_targets
            count += batch.num_targets
        self.model.train()
        ce = nats.item() / count
        return {"val_ce": ce, "val_bpb": ce / math.log(2)}

    # --- the run --------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Run to the last step, or to Ctrl-C; either way the last state is saved. Returns the last evaluation."""
        c = self.config
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "samples").mkdir(exist_ok=True)
        (self.out / "config.toml").write_text(c.to_toml())
        truncate_metrics(self.out / "metrics.jsonl", self.step)
        metrics = MetricsFile(self.out / "metrics.jsonl")
        before = signal.signal(signal.SIGINT, self._interrupt)
        result: dict[str, float] = {}
        try:
            with TrainConsole(c.steps, self.step) as console:
                if self.step == 0:
                    result = self.evaluate()
                    metrics.write({"step": 0, "bytes": 0, "time": 0.0, **result})
                    console.say(f"held-out bits per byte before training: {result['val_bpb']:.3f}")
                while self.step < c.steps and not self.stop:
                    row = self.train_step()
                    last = self.step == c.steps
                    if last or self.step % c.eval_every == 0:
                        result = self.evaluate()
                        row |= result
                        console.say(f"step {self.step}: held-out bits per byte {result['val_bpb']:.3f}")
                    if last or self.step % c.log_every == 0 or "val_bpb" in row:
                        metrics.write(row)
                    console.update(row)
                    if last or self.stop or self.step % c.checkpoint_every == 0:
                        self.save()
                if self.stop and self.step < c.steps:
                    console.say(f"stopped at step {self.step}; saved. Go on with: hnet train --resume --out {self.out}")
        finally:
            signal.signal(signal.SIGINT, before)
            metrics.close()
        return result

    def _interrupt(self, *_: object) -> None:
        if self.stop:  # a second Ctrl-C does not wait for the step to end
            raise KeyboardInterrupt
        self.stop = True

    # --- state ----------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        state = {
            "step": self.step, "bytes": self.bytes, "seconds": self.seconds, "optimizers": self.optimizers.state_dict(),
            "data": self.stream.state_dict(), "rng": torch.get_rng_state(),
        }  # fmt: skip
        return save_checkpoint(self.out / "checkpoints", self.step, self.model, state, self.config.keep_checkpoints)

    def _load(self, path: Path) -> None:
        state = load_checkpoint(path, self.model)
        self.step, self.bytes, self.seconds = state["step"], state["bytes"], state["seconds"]
        self.optimizers.load_state_dict(state["optimizers"])
        self.stream.load_state_dict(state["data"])
        torch.set_rng_state(state["rng"])


def read_data(config: TrainConfig) -> tuple[Corpus | DocumentStream, Corpus]:
    """(training, held-out) documents."""
    return open_data(config)


def pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda' but PyTorch sees no CUDA device")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def pick_autocast(name: str, device: torch.device) -> torch.dtype | None:
    """bf16 where the matrix units have it: every GPU we support, and CPUs with AVX512-BF16 (1.3x a training step
    there; without it bf16 is far slower than fp32)."""
    if name == "auto":
        fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if name == "bf16" else None


def norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    """() fp32: 2-norm of the gradients"""
    grads = [p.grad for p in parameters if p.grad is not None]
    return norm_of(torch._foreach_norm(grads)) if grads else torch.zeros(())


def norm_of(norms: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack([n.float() for n in norms]))


def clip(model: nn.Module, total: torch.Tensor, limit: float) -> None:
    """Scale all gradients so that their norm is at most `limit`; no host sync."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_mul_(grads, (limit / (total + 1e-6)).clamp(max=1.0))
