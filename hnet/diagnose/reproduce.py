"""Whether a checkpoint has the held-out loss that the log claims for it."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np

from hnet.train.evaluation import evaluate_hnet

from .checkpoint import Material
from .findings import Finding
from .runs import Log
from .series import percent

MOST = 16384  # bytes of held-out text that are predicted again, at most
WHOLE, PART = 0.03, 0.25  # how far apart: other kernels and bf16; a part of the evaluation's text


def reproduced(log: Log, material: Material) -> list[Finding]:
    """One finding where they are apart. Nothing where the log has no evaluation at the checkpoint's step."""
    config = material.config
    at, v = log.series("val_ce")
    if config is None or material.val is None or config.weight_ema or material.step not in at:
        return []
    size = min(config.eval_bytes, MOST)
    score = evaluate_hnet(
        material.model, material.val, nullcontext, seq_len=config.seq_len,
        batch_bytes=max(config.seq_len, min(config.batch_bytes, MOST)),
        max_bytes=size,
    )  # fmt: skip
    logged = float(v[np.flatnonzero(at == material.step)[-1]])
    apart = score.ce / logged - 1
    part = size < min(config.eval_bytes, material.val.num_bytes)
    if abs(apart) <= (PART if part else WHOLE):
        return []
    why = [
        f"val_ce is {logged:.4f} in the log at step {material.step}; the checkpoint of that step has {score.ce:.4f} on "
        f"{size:,} bytes of the run's held-out text ({percent(apart)} apart)."
    ]
    change = [
        "was another text evaluated (the training text?), or another model (targets it saw, dropout on, an average)?",
        "believe `hnet eval`, not the log",
    ]
    title = "The checkpoint does not have the held-out loss of the log"
    span = (material.step, material.step)
    return [Finding("critical", "not_reproduced", title, why, change, span)]
