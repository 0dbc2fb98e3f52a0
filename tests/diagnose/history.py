"""A documented 1.6B two-stage run that failed, made again from the numbers of its report."""

import csv
import io
import json
import math

import numpy as np

STEPS, PLANNED, EVERY = 32_800, 100_000, 10
CONFIG = {
    "preset": "hnet_2stage_XL", "steps": PLANNED, "learning_rate": 3e-4, "lr_multipliers": [3.0, 1.7, 0.9],
    "warmup_steps": 2000, "max_grad_norm": 1.0, "seq_len": 2048, "packing": True,
    "temperature": 1.0, "top_p": 1.0,
}  # fmt: skip


def rows(burst_at=14_000, sawtooth=True, every=EVERY, seed=0):
    """One dictionary a logged step: loss 5.77 -> 0.84, a norm of 1,810 once, 0.17 at the end, ratio losses 1."""
    rng = np.random.default_rng(seed)
    out = []
    for s in range(every, STEPS + 1, every):
        share = (s - every) / (STEPS - every)
        loss = 0.84 + (5.77 - 0.84) * math.exp(-12 * share) * (1 - share)
        if every < s < STEPS:
            loss *= 1 + 0.01 * rng.standard_normal()
        rise = ((s - 1) % 100 + 1) / 100 if sawtooth else 0.5
        norm = 0.17 * (0.1 + 0.9 * rise) * (1 + 0.05 * rng.standard_normal()) * (1 + 2 * math.exp(-20 * share))
        if s == burst_at:
            norm = 1810.0
        if s == STEPS:
            norm = 0.17
        lr = 3e-4 * min(s / 2000, 1)
        out.append({
            "step": s, "loss": loss, "ce": loss - 0.0602, "lb": 1.0 + 0.0079 * share,
            "lr0": 3 * lr, "lr1": 1.7 * lr, "lr2": 0.9 * lr, "norm": norm,
        })  # fmt: skip
    return out


def text(r):
    lines = [
        f"step {x['step']} | loss: {x['loss']:.4f} | ce_loss: {x['ce']:.4f} | lb_loss: {x['lb']:.4f} | "
        f"lr_stage_0: {x['lr0']:.3e} | lr_stage_1: {x['lr1']:.3e} | lr_stage_2: {x['lr2']:.3e} | "
        f"grad_norm: {x['norm']:.4f}"
        for x in r
    ]
    return "\n".join(lines) + "\n"


def named(x, prefix="train/"):
    return {
        f"{prefix}loss": x["loss"], f"{prefix}ce_loss": x["ce"], f"{prefix}lb_loss": x["lb"],
        f"{prefix}lr_stage_0": x["lr0"], f"{prefix}lr_stage_1": x["lr1"], f"{prefix}lr_stage_2": x["lr2"],
        f"{prefix}grad_norm": x["norm"],
    }  # fmt: skip


def jsonl(r):
    return "".join(json.dumps({"step": x["step"], **named(x, "")}) + "\n" for x in r)


def table(r, prefix="", first="step", extremes=False):
    out = io.StringIO()
    writer = None
    for x in r:
        cells = {first: x["step"]}
        for name, v in named(x, "").items():
            cells[prefix + name] = v
            if extremes:
                cells |= {f"{prefix}{name}__MIN": v, f"{prefix}{name}__MAX": v}
        writer = writer or csv.DictWriter(out, list(cells), quoting=csv.QUOTE_ALL)
        if out.tell() == 0:
            writer.writeheader()
        writer.writerow(cells)
    return out.getvalue()


SHAPES = {
    "train.log": text,
    "history.csv": table,
    "history.jsonl": jsonl,
    "wandb_export.csv": lambda r: table(r, "sunny-fox-7 - train/", "Step", extremes=True),
}
