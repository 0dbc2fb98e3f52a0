"""One run: a small H-Net learns agglutinative text, and all that was held out is scored."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hnet.config.keys import override, read_toml
from hnet.data.corpus import Corpus
from hnet.data.packing import eval_batches
from hnet.model.causal_lm import HNetForCausalLM
from hnet.segment import baselines
from hnet.segment.characters import Characters
from hnet.segment.scores import ahead, score
from hnet.train.config import TrainConfig
from hnet.train.evaluation import evaluate_hnet
from hnet.train.loop import Trainer

from .arms import ARMS, SMALL

RECIPE = Path(__file__).parents[2] / "configs" / "agglutinative.toml"
EDGES = ("words", "morphemes", "morphemes_inside")
Gold = Mapping[str, tuple[str, ...]]


def configuration(arm: str, lines: list[str], chars_per_chunk: float, seed: int, steps: int, out: Path) -> TrainConfig:
    """The last tenth of the lines is held out; N, which is in bytes, is `chars_per_chunk` of this text's characters."""
    cut = len(lines) * 9 // 10
    for name, part in (("train", lines[:cut]), ("held_out", lines[cut:])):
        (out / f"{name}.txt").write_text("".join(line + "\n" for line in part), encoding="utf-8")
    text = "".join(lines)
    bytes_per_chunk = chars_per_chunk * len(text.encode()) / len(text)
    given = SMALL | {"compression": [bytes_per_chunk], "steps": steps, "ratio_warmup": steps // 10} | ARMS[arm]
    given |= {
        "data": [str(out / "train.txt")], "val_data": [str(out / "held_out.txt")], "seed": seed,
        "out": str(out / "run"),
        "eval_every": steps, "eval_bytes": 4096, "checkpoint_every": steps,
    }  # fmt: skip
    return TrainConfig(**override(read_toml(RECIPE, TrainConfig), given))


def run(config: TrainConfig, gold: Gold | None) -> dict[str, Any]:
    """Train and score. `seconds` is of the steps alone.

    Raises:
        SystemExit: stopped before the last step (Ctrl-C), so there is nothing to score.
    """
    trainer = Trainer(config)
    trainer.train()
    if trainer.step < config.steps:
        raise SystemExit(f"stopped at step {trainer.step} of {config.steps}: no row")
    row = held_out_scores(trainer.model, trainer.task.val, config, gold)
    return row | {"seconds": trainer.state.seconds, "target": config.compression[0]}


@torch.no_grad()
def held_out_scores(model: HNetForCausalLM, val: Corpus, config: TrainConfig, gold: Gold | None) -> dict[str, Any]:
    """Loss, rate and where boundaries are, beside baselines that have the same rate on the same text.

    Sequences are lines of one text: BOS, where a chunk begins that is given, stands for the line's beginning.
    """
    how: dict[str, Any] = {"seq_len": config.seq_len, "batch_bytes": 2 * config.batch_bytes}
    loss = evaluate_hnet(model, val, nullcontext, **how)
    model.eval()
    ids, masks, given, size = [], [], [], 0
    for batch in eval_batches(val, max_bytes=None, **how):
        routing = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen).routing[0]
        here = batch.input_ids.numpy().astype(np.uint8)
        begins = batch.cu_seqlens[:-1].numpy()
        here[begins] = ord("\n")
        ids.append(here)
        masks.append(routing.boundary_mask.numpy())
        given.append(size + begins)
        size += len(here)
    chars, first = Characters(np.concatenate(ids).tobytes()), np.concatenate(given)
    starts = np.flatnonzero(np.concatenate(masks))
    found = score(chars, starts, given=first, morphemes=gold, graphemes=False)
    predicted = ahead(np.setdiff1d(starts, first), size)
    ahead_of = score(chars, predicted, given=first, morphemes=gold, graphemes=False)
    rate = found["bytes_per_chunk"]
    others = {
        "white space": baselines.whitespace(chars),
        "random": baselines.random_characters(chars, rate),
        "BPE": baselines.bpe(chars, rate),
    }
    beside = {
        name: score(chars, starts, given=first, morphemes=gold, graphemes=False) for name, starts in others.items()
    }
    (decided,) = loss.decisiveness
    kept = ("bytes_per_chunk", "char_start_share", "char_end_share", "space_share", "word_start_share")
    return {
        "val_ce": loss.ce, "val_bpb": loss.bpb, **{k: found[k] for k in kept}, **decided,
        "word_starts_found": found["word_starts_found"], "morpheme_coverage": found.get("morpheme_coverage"),
        **{k: found[k] for k in EDGES if k in found},
        "ahead": {k: ahead_of[k] for k in EDGES if k in ahead_of},
        "baselines": {
            name: {k: x[k] for k in ("bytes_per_chunk", "word_starts_found", *EDGES) if k in x}
            for name, x in beside.items()
        },
    }  # fmt: skip


def steps_in(minutes: float, config: TrainConfig, trial: int = 20) -> int:
    """How many steps of this configuration take so long here, from the second half of `trial` of them."""
    trainer = Trainer(config)
    for i in range(trial):
        if i == trial // 2:
            begin = time.perf_counter()
        trainer.train_step()
    trainer.task.stream.close()
    return max(int(60 * minutes * (trial - trial // 2) / (time.perf_counter() - begin)), trial)
