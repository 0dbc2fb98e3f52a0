"""Made-up runs: a healthy one, and ways to spoil it."""

import json
import math
from pathlib import Path

import numpy as np

from hnet.config import toml
from hnet.diagnose.report import diagnose
from hnet.diagnose.runs import read_log
from hnet.train.schedule import Schedule

STEPS = 400
CONFIG = {
    "data": ["/nowhere/text"], "preset": "small", "steps": STEPS, "warmup_steps": 40, "schedule": "wsd",
    "learning_rate": 1e-3, "lr_multipliers": [2.0, 1.0], "decay_fraction": 0.3, "compression": [4.0],
    "ratio_weight": 0.5,    "seq_len": 1024, "batch_bytes": 32768, "eval_every": 20, "max_grad_norm": 1.0,
}  # fmt: skip


def ratio_loss(f, g, n):
    return n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g))


def healthy_rows(steps=STEPS, f=0.25, g=0.3, target=4.0, seed=0):
    """The numbers a run of ours shows: loss 5.5 -> 1.2 with 3 % noise, F and G about given, norms falling."""
    rng = np.random.default_rng(seed)
    rows = [{"step": 0, "bytes": 0, "time": 0.0, "val_ce": 5.6, "val_bpb": 5.6 / math.log(2)}]
    for s in range(1, steps + 1):
        smooth = 1.2 + 4.3 * math.exp(-s / 40) + 0.2 * (1 - s / steps)
        ce = smooth * (1 + 0.03 * rng.standard_normal())
        share, mean = f * (1 + 0.04 * rng.standard_normal()), g * (1 + 0.01 * rng.standard_normal())
        lr = 1e-3 * Schedule("wsd", steps, warmup_steps=steps // 10).factor(s - 1)
        norm = (0.3 + 1.2 * math.exp(-s / 20)) * (1 + 0.1 * rng.standard_normal())
        ratio = ratio_loss(share, mean, target)
        row = {
            "step": s, "bytes": 32768 * s, "time": 0.5 * s, "loss": ce + 0.5 * ratio, "ce": ce, "bpb": ce / math.log(2),
            "ratio_loss": ratio, "grad_norm": norm, "lr": lr, "bytes_per_second": 65536 * (1 + 0.05 * rng.random()),
            "stage0/F": share, "stage0/G": mean, "stage0/bytes_per_chunk": 1 / share, "stage0/target": target,
            "stage0/ratio_loss": ratio, "stage0/grad_norm": norm, "stage0/lr": 2 * lr,
            "stage1/grad_norm": 0.1 * norm, "stage1/lr": lr,
        }  # fmt: skip
        if s % 20 == 0:
            row |= {"val_ce": smooth * 1.03, "val_bpb": smooth * 1.03 / math.log(2)}
        rows.append(row)
    return rows


def write_run(folder: Path, rows, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "config.toml").write_text(toml.dumps(CONFIG | config))
    return folder


def after(rows, step):
    """The rows of training steps past `step`."""
    return [r for r in rows if r["step"] > step and "event" not in r]


def findings(path) -> dict:
    """name -> Finding (the most severe of a name)."""
    found = {}
    for f in diagnose(read_log(path)):
        found.setdefault(f.name, f)
    return found
