"""What the training loop trains: an H-Net on packed documents. ChunkLM's (hnet.chunk_lm.task) is like it:

model, stages, stream     the network, its parameters by stage, endless batches with an exact cursor
multipliers               learning-rate factor of every stage
prepare(step)             before a step starts: writes to the device what changes from step to step
loss(model, batch, step)  what to minimise and () tensors to average over the step
constants(step)           what loss took from the host that may change, if it is to be recorded (captured.py)
after_step(step, means)   what moves after every step, on the device
trained_at(step)          keys for metrics.jsonl of what a step is trained at, asked as it starts
row(step, means)          more keys, from the averages as floats, once it is finished
observe(row)              what moves by the numbers of a finished step; events. Later steps may have been started
settles(step)             whether all `step` steps must be answered before the next one starts
evaluated(val_ce)         what moves by an evaluation; events
begin()                   at a fresh start: loads what it starts from; events
evaluate(), sample()      held-out cross entropy; a text to keep and one to look at
held_out                  lines of the last evaluation's text with their boundaries, to keep; perhaps none
prints, lines(row)        whether it prints rows itself, and what; called once for every finished row, in order
saved(checkpoint, step)   after a checkpoint is complete
state_dict, load_state_dict
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import Tensor, nn

from hnet.config.architecture import lr_multipliers
from hnet.data.pack_stream import PackStream
from hnet.data.packing import Batch, eval_batches
from hnet.data.sources import open_data
from hnet.data.workers import with_workers
from hnet.device import World
from hnet.events import Event
from hnet.model.causal_lm import HNetForCausalLM
from hnet.model.checkpoint_format import load_state
from hnet.model.cost import stage_costs
from hnet.model.hnet import candidates
from hnet.model.pack import Pack
from hnet.model.parameters import stage_parameters
from hnet.model.router_metrics import decisiveness, router_sums
from hnet.segment import render_plain, render_rich, segment

from . import lora
from .boundary_scores import BoundaryScores
from .compile import compile_blocks, compile_wanted
from .compression import Compression
from .config import TrainConfig
from .decisive import Decisive
from .distributed import shard
from .evaluation import evaluate_hnet
from .flips import Flips
from .freeze import freeze
from .held_out_lines import HeldOutLines
from .init_from import start_weights
from .losses import losses
from .shards import spread_state_like
from .start import check_reach, pack_size, settle_steps


class HNetTask:
    prints = False

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        world: World,
    ) -> None:
        self.config, self.device, self.autocast, self.world = config, device, autocast, world
        self.pack_bytes = pack_size(config, world.size)
        say = print if world.main else lambda _: None
        train, self.val = open_data(config, say)
        settle_steps(config, train)
        share = (world.rank, world.size, config.shards)
        stream = PackStream(train, config.seq_len, self.pack_bytes, config.seed, *share)
        if advice := stream.advice(world.size * max(config.num_workers, 1)):
            say(advice)
        check_reach(config, stream, self.pack_bytes)
        self.stream = with_workers(stream, config.num_workers)
        self.model = HNetForCausalLM(config.model(), device=device).set_dropout(config.dropout)
        if self.model.ngrams is not None:
            self.model.ngrams.dropout = config.ngram_dropout
        if config.freeze:
            still, total = freeze(self.model, config.freeze), sum(p.numel() for p in self.model.parameters())
            say(f"freeze: {still:,} of {total:,} parameters stay as they are")
        if config.lora_rank:
            say(f"lora: {lora.adapt(self.model, config)}")
        for i, stage in enumerate(self.model.stages()):
            chosen = config.recompute and (not config.recompute_stages or i in config.recompute_stages)
            for m in [stage.main_network] if stage.innermost else [stage.encoder, stage.decoder]:
                m.recompute = chosen
        if compile_wanted(config, device, world):
            compile_blocks(self.model)
        shard(self.model, config, world)
        self.stages = stage_parameters(self.model)
        given = config.lr_multipliers or [1.0] * len(self.stages)
        self.multipliers = lr_multipliers(self.model.config, config.compression) if isinstance(given, str) else given
        self.compression = Compression(config, self.model)
        self.decisive = Decisive(config, len(self.compression.stages), device)
        self.costs = stage_costs(self.model)
        self.flips, self.boundary_scores = Flips(world), BoundaryScores()
        self.held_out_lines, self.held_out = HeldOutLines(), list[dict[str, Any]]()

    def begin(self) -> list[Event]:
        if not self.config.init_from:
            return []
        state, what = start_weights(self.config.init_from, self.model)
        if self.config.lora_rank:
            state = lora.start_state(self.model, state)
        self._load(state, self.config.init_from)
        return [Event("init_from", f"starts from {what}")]

    def prepare(self, step: int) -> None:
        self.compression.prepare(step)
        self.decisive.prepare(step)

    def constants(self, step: int) -> Hashable:
        return tuple(self.compression.targets(step))

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        c, n = self.config, batch.targets.shape[0]
        alone = c.ratio_reduction == "global" and (self.world.size == 1 or not model.training)
        # a rare pack of very short documents has more sequences than the budget, and each begins a chunk
        budget = [max(math.ceil(m * n), batch.cu_seqlens.shape[0] - 1) for m in c.max_chunks] or None
        shares = self.compression.shares(step)
        with self.autocast():
            out = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, max_chunks=budget)
        result = losses(
            out.logits, batch.targets, out.routing, self.compression.targets(step), self.compression.weights(),
            reduction="batch" if alone else c.ratio_reduction, straight_through=c.straight_through,
            label_smoothing=c.label_smoothing if model.training else 0.0,
            decisive=self.decisive, shares=shares, candidates=self._candidates(batch),
        )  # fmt: skip
        lengths = [batch.cu_seqlens.diff(), *(r.cu_chunks.diff() for r in out.routing)]
        flops = torch.stack([cost.of(x) for cost, x in zip(self.costs, lengths, strict=True)]).sum()
        means = {"ce": result.ce, "ratio_loss": result.ratio_loss, "flops": flops / n}
        for i, (s, r) in enumerate(zip(result.stages, out.routing, strict=True)):
            if (bias := self.compression.stages[i].logit_bias) is not None:
                means[f"stage{i}/logit_bias"] = bias
            if isinstance(share := shares[i], Tensor):
                means[f"stage{i}/taught"] = share
            means |= {
                f"stage{i}/F": s.F, f"stage{i}/G": s.G, f"stage{i}/ratio_loss": s.ratio_loss,
                f"stage{i}/chunks": s.chunks / n,
                f"stage{i}/sequences": s.sequences / n,
                f"stage{i}/dropped": s.dropped / n,
            }  # fmt: skip
            means |= {f"stage{i}/{k}": x / n for k, x in router_sums(r)._asdict().items()}
        return result.loss, means

    def _candidates(self, batch: Batch) -> Tensor | None:
        where = self.model.config.routing_cfg.boundaries
        if self.decisive.surprisal is None or where == "any":
            return None
        return candidates(where, batch.input_ids, Pack(batch.cu_seqlens, len(batch.input_ids)))

    def after_step(self, step: int, means: dict[str, Tensor]) -> None:
        self.flips.due = True
        if self.compression.stages:
            F = torch.stack([means[f"stage{i}/F"] for i in range(len(self.compression.stages))])
            self.compression.after_step(step, F)

    def trained_at(self, step: int) -> dict[str, Any]:
        return {f"stage{i}/target": target for i, target in enumerate(self.compression.targets(step))}

    def row(self, step: int, means: dict[str, float]) -> dict[str, Any]:
        c, row = self.config, {"ratio_loss": means["ratio_loss"], "flops_per_position": means["flops"]}
        positions = 1.0  # of a stage, for each byte
        for i in range(len(self.compression.stages)):
            s = f"stage{i}"
            chunks = max(means[f"{s}/chunks"], 1e-9)
            sums = [means[f"{s}/{k}"] for k in ("on", "off", "near")]
            counts = [c.batch_bytes * x for x in (positions, chunks, *sums)]
            row |= {f"{s}/{k}": v for k, v in decisiveness(*counts).items()}
            row[f"{s}/G_minus_F"] = means[f"{s}/G"] - means[f"{s}/F"]
            positions = chunks
            row |= {
                f"{s}/F": means[f"{s}/F"], f"{s}/G": means[f"{s}/G"], f"{s}/bytes_per_chunk": 1 / chunks,
                f"{s}/ratio_loss": means[f"{s}/ratio_loss"],
                f"{s}/chunks_per_sequence": chunks / max(means[f"{s}/sequences"], 1e-9),
            }  # fmt: skip
            row |= {k: means[k] for k in (f"{s}/logit_bias", f"{s}/taught") if k in means}
            if c.max_chunks:
                row[f"{s}/dropped"] = round(means[f"{s}/dropped"] * c.batch_bytes)
        return row

    def observe(self, row: dict[str, Any]) -> list[Event]:
        return self.compression.at_limits(row)

    def settles(self, step: int) -> bool:
        return False

    def evaluated(self, val_ce: float) -> list[Event]:
        if self.compression.observe(val_ce):
            now = ", ".join(f"{t:g}" for t in self.compression.targets(0))
            return [Event("target_annealed", f"the loss has settled: targets are now {now} positions per chunk")]
        return []

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out cross entropy (nats a symbol), bits per byte of text, and of every stage bytes per chunk and how
        decided its router is; flips and where boundaries are in the first evaluation after a step (an average's, if
        there is one, is later)."""
        c, flips = self.config, self.flips if self.flips.due else None
        score = evaluate_hnet(
            self.model, self.val, self.autocast, seq_len=c.seq_len, batch_bytes=self.pack_bytes,
            max_bytes=c.eval_bytes, world=self.world, see=None if flips is None else flips.see,
        )  # fmt: skip
        result = {"val_ce": score.ce, "val_bpb": score.bpb}
        result |= {f"stage{i}/val_bytes_per_chunk": n for i, n in enumerate(score.bytes_per_chunk)}
        for i, found in enumerate(score.decisiveness):
            result |= {f"stage{i}/val_{k}": v for k, v in found.items()}
        if flips is None:
            return result
        result |= {f"stage{i}/flips": x for i, x in enumerate(flips.compare() or [])}
        if flips.last is not None:
            packs = partial(eval_batches, self.val, c.seq_len, self.pack_bytes, c.eval_bytes)
            result |= self.boundary_scores.scores(flips.last, packs())
            self.held_out = self.held_out_lines.read(flips.last, packs())
        return result

    def sample(self) -> tuple[str, Text]:
        """A continuation and the chunks of a held-out snippet; and the outermost of these in colour."""
        c = self.config
        held_out = self.val.longest(64)
        prompt: str | bytes = c.sample_prompt or held_out[:64]
        self.model.eval()
        (new,) = self.model.generate(prompt, max_new_bytes=c.sample_bytes, temperature=0.8, top_p=0.95, seed=0)
        shown = prompt if isinstance(prompt, str) else prompt.decode(errors="replace")
        parts = [f"--- continuation of {shown!r}\n{new.decode(errors='replace')}"]
        snippet = held_out[: 4 * c.sample_bytes]
        chunks = segment(self.model, snippet)
        parts += [f"--- chunks of stage {i}\n{render_plain(chunks, i)}" for i in range(len(chunks.stages))]
        self.model.train()
        return "\n".join(parts) + "\n", render_rich(segment(self.model, snippet[:240])) if chunks.stages else Text()

    def lines(self, row: dict[str, Any]) -> list[str]:
        return []

    def saved(self, checkpoint: Path, step: int) -> None:
        pass

    def load_weights(self, state: dict[str, Tensor], where: Path) -> None:
        """Of the checkpoint `where`."""
        if self.config.lora_rank:
            state = lora.resumed_state(self.model, state, where)
        self._load(state, str(where))

    def _load(self, state: dict[str, Tensor], where: str) -> None:
        load_state(self.model, spread_state_like(state, self.model.state_dict()), where)

    def state_dict(self) -> dict[str, Any]:
        return {**self.compression.state_dict(), "flips": self.flips.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.compression.load_state_dict(state)
        self.flips.load_state_dict(state.get("flips", {}))  # not in 0.1.0
