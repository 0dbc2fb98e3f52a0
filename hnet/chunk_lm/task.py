"""A ChunkLM for the training loop; see hnet.train.task for what a task is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import Tensor, nn

from hnet.data.sources import open_corpus
from hnet.device import World
from hnet.disk import replacing
from hnet.errors import UserError, user_path
from hnet.events import Event
from hnet.model.checkpoint_format import CONFIG, WEIGHTS, load_state, read_weights

from .config import ChunkLMConfig
from .evaluation import evaluate_chunk_lm
from .model import ChunkLM
from .train_config import ChunkLMTrainConfig
from .windows import Windows, WindowStream, chunk_lm_loss


class ChunkLMTask:
    prints = True  # its own lines, below
    held_out: Sequence[dict] = ()  # it has no boundaries

    def __init__(
        self,
        config: ChunkLMTrainConfig,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        world: World,
    ) -> None:
        if world.size > 1:
            raise UserError(f"a ChunkLM trains in one process, got {world.size}: raise accum_steps instead")
        self.config, self.device, self.autocast, self.world = config, device, autocast, world
        train, self.val = open_corpus(config)
        if config.ckpt:
            with user_path(config.ckpt, "write"):  # now, not at the first save
                Path(config.ckpt).parent.mkdir(parents=True, exist_ok=True)
        self.stream = WindowStream(train, config.seq_len, config.chunk, config.batch_size, config.seed, config.causal)
        self.model = ChunkLM(config.model()).to(device)
        self.stages = [list(self.model.parameters())]
        self.multipliers = [1.0]
        self.curriculum = config.make_curriculum()
        self.model.set_cutoff(self.curriculum.cutoff)
        self.losses: list[float] = []  # of this epoch, as far as printed
        self.unprinted: list[float] = []  # since the last line

    def begin(self) -> list[Event]:
        return []

    def prepare(self, step: int) -> None:
        pass

    def loss(self, model: nn.Module, batch: Windows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        smoothing = self.config.label_smoothing if model.training else 0.0
        with self.autocast():
            loss, ce = chunk_lm_loss(self.model, batch, label_smoothing=smoothing)
        return loss, {"ce": ce}

    def after_step(self, step: int, means: dict[str, Tensor]) -> None:
        pass

    def trained_at(self, step: int) -> dict[str, Any]:
        return {"cutoff": self.model.cutoff, "epoch": self.curriculum.epoch(step)}

    def row(self, step: int, means: dict[str, float]) -> dict[str, Any]:
        return {}

    def observe(self, row: dict[str, Any]) -> list[Event]:
        at_peak = row["lr"] / self.config.peak(row["step"] - 1)
        events = self.curriculum.observe(row["step"], row["ce"], at_peak, row["cutoff"])
        self.model.set_cutoff(self.curriculum.cutoff)
        return events

    def settles(self, step: int) -> bool:
        """At the end of an epoch: a raise there and the schedule's own restart are at the same step."""
        return step % self.config.steps_per_epoch == 0

    def evaluated(self, val_ce: float) -> list[Event]:
        return []

    def lines(self, row: dict[str, Any]) -> list[str]:
        """What is printed after a finished step; its loss is the mean since the last line."""
        c, out = self.config, []
        if math.isfinite(row["ce"]):
            self.losses.append(row["ce"])
        at = (row["step"] - 1) % c.steps_per_epoch + 1
        self.unprinted.append(row["loss"])
        if at % c.log_every == 0:
            rate = f"{row['lr']:.1e}".replace("e-0", "e-")
            mean = sum(self.unprinted) / len(self.unprinted)
            out.append(f"  step {at}/{c.steps_per_epoch} loss={mean:.2f} lr={rate} cutoff={row['cutoff']}")
            self.unprinted.clear()
        if at == c.steps_per_epoch and self.losses:
            mean = sum(self.losses) / len(self.losses)
            out.append(f"Epoch {row['epoch']} avg_loss={mean:.2f} cutoff={row['cutoff']}/{self.model.bins}")
            self.losses.clear()
            self.unprinted.clear()
        return out

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out cross entropy, nats a byte predicted, at the present cutoff."""
        c = self.config
        score = evaluate_chunk_lm(
            self.model, self.val, self.autocast, seq_len=c.seq_len, batch_size=c.batch_size, max_bytes=c.eval_bytes
        )
        return {"val_ce": score.ce, "val_bpb": score.bpb}

    def sample(self) -> tuple[str, Text]:
        c = self.config
        held_out = self.val.longest(64)
        prompt = c.sample_prompt.encode() or held_out[: c.seq_len]
        new = self.model.generate(prompt, max_new_bytes=c.sample_bytes, temperature=0.8, top_p=0.95, seed=0)
        text = new.decode(errors="replace")
        return f"--- continuation of {prompt[-64:].decode(errors='replace')!r}\n{text}\n", Text(text)

    def saved(self, checkpoint: Path, step: int) -> None:
        """The latest weights in one file too, if asked for."""
        if not self.config.ckpt:
            return
        path = Path(self.config.ckpt)
        config = ChunkLMConfig.from_json(checkpoint / CONFIG)
        state = {
            "model": read_weights(checkpoint / WEIGHTS), "config": config.to_dict(), "step": step,
            "epoch": self.curriculum.epoch(step), "cutoff": config.cutoff,
        }  # fmt: skip
        with replacing(path) as partial, partial.open("wb") as file:
            torch.save(state, file)

    def load_weights(self, state: dict[str, Tensor], where: Path) -> None:
        load_state(self.model, state, str(where))

    def state_dict(self) -> dict[str, Any]:
        return {"curriculum": self.curriculum.state_dict(), "losses": list(self.losses), "unprinted": [*self.unprinted]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curriculum.load_state_dict(state["curriculum"])
        self.losses, self.unprinted = list(state["losses"]), list(state.get("unprinted", []))
        self.model.set_cutoff(self.curriculum.cutoff)
