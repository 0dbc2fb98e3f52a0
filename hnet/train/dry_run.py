"""`hnet train --dry-run`: what a run would be, without training."""

from __future__ import annotations

import torch

from hnet.data.corpus import Corpus
from hnet.data.pack_stream import PackStream
from hnet.data.packing import Pieces
from hnet.data.sources import open_data
from hnet.device import pick_autocast, pick_device
from hnet.model.causal_lm import HNetForCausalLM
from hnet.model.cost import plan, positions_per_byte

from . import lora
from .config import TrainConfig
from .freeze import freeze
from .init_from import weights_file
from .schedule import Schedule, make_schedule
from .start import check_reach, pack_size, settle_steps

BARS = "▁▂▃▄▅▆▇█"


def report(config: TrainConfig) -> str:
    """Reads the data and the config, as a run would; returns a page of text.

    Raises:
        ValueError, FileNotFoundError: what would stop the run before its first step.
    """
    c = config.validate()
    notes: list[str] = []
    train, val = open_data(c, notes.append)
    settle_steps(c, train)
    pack = pack_size(c, processes=1)
    check_reach(c, PackStream(train, c.seq_len, pack, c.seed, shards=c.shards), pack)  # complains of too little, too
    passes = ""
    if isinstance(train, Corpus):
        passes = f", {c.steps * c.batch_bytes / (train.num_bytes + len(train)):.2f} passes over the data"
    sequences = Pieces(train if isinstance(train, Corpus) else val, c.seq_len).positions
    device = pick_device(c.device)
    bf16 = pick_autocast(c.dtype, device) is not None
    architecture = c.model()
    found = plan(architecture, c.compression, torch.from_numpy(sequences), pack, c.optimizer == "muon", bf16)
    total = sum(s.parameters for s in found.stages)
    seen, flops = c.steps * c.batch_bytes, sum(found.flops)
    lines = [
        f"data       {train.amount}; held out {val.num_bytes:,} in {len(val):,}",
        *(f"           {note}" for note in notes),
        f"run        {c.steps:,} steps x {c.batch_bytes:,} bytes = {seen / 1e6:,.1f} MB{passes}",
        f"model      {total / 1e6:,.2f} M parameters, {flops / 1e6:,.2f} MFLOP a byte (forward and backward, at the "
        f"target, sequences of {sequences.mean():,.0f} bytes on average), {flops * seen:.3g} FLOP in all",
    ]
    shares = positions_per_byte(c.compression)
    for s, (stage, share, cost) in enumerate(zip(found.stages, shares, found.flops, strict=True)):
        layout = " / ".join(architecture.layouts(s))
        lines.append(
            f"  stage {s}  {layout:16} width {architecture.d_model[s]:5}  {stage.parameters / 1e6:9.2f} M parameters  "
            f"{1 / share:6.2f} bytes a position  {cost / 1e6:9.2f} MFLOP a byte"
        )
    if c.init_from:
        lines.append(f"start      the weights {weights_file(c.init_from)}")
    if c.freeze:
        with torch.device("meta"):
            still = freeze(HNetForCausalLM(architecture, device="meta"), c.freeze)
        lines.append(f"frozen     {still / 1e6:,.2f} M parameters, counted below as if they were trained")
    if c.lora_rank:
        with torch.device("meta"):
            what = lora.adapt(HNetForCausalLM(architecture, device="meta"), c)
        lines.append(f"lora       {what}; the rest is counted below as if it were trained")
    lines += [
        f"memory     {found.state_bytes / 2**20:,.0f} MiB weights, gradients and optimiser; about "
        f"{found.activation_bytes / 2**20:,.0f} MiB activations on {device} in {'bf16' if bf16 else 'fp32'}",
        f"schedule   {c.schedule}, peak {c.learning_rate:g}, warm-up {c.warmup} steps",
        f"           {curve(make_schedule(c), c.steps)}",
    ]
    return "\n".join(lines)


def curve(schedule: Schedule, steps: int, columns: int = 64) -> str:
    """The learning rate over the run, in one line."""
    at = [schedule.factor(min(int((i + 0.5) * steps / columns), steps - 1)) for i in range(columns)]
    return "".join(BARS[min(int(f * len(BARS)), len(BARS) - 1)] for f in at)
