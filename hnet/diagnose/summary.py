"""What a run was, in numbers, none of which is a finding; and what its log could not show."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .architecture import num_stages, parameters_of
from .data import data_files
from .gradients import LEAST
from .runs import Log
from .training import LOSS, VAL


def summary(log: Log) -> dict[str, Any]:
    """Keys and units as in docs/diagnose.md; a key is missing where the log has nothing to make it of."""
    out: dict[str, Any] = {"rows": len(log.step), "first_step": int(log.step.min()) if len(log.step) else None}
    out |= {"last_step": log.last_step, "planned_steps": log.planned_steps or None}
    name = next((n for n in LOSS if n in log.columns), None)
    if name:
        at, v = log.series(name)
        out["loss"] = {
            "name": name,
            "first": float(v[0]),
            "last": float(v[-1]),
            "best": float(v.min()),
            "best_step": int(at[v.argmin()]),
            "reduction_percent": 100 * float(1 - v[-1] / v[0]) if v[0] else None,
        }
        nats = float(v[-1]) * (math.log(2) if name == "bpb" else 1)
        if nats < 50:
            out["loss"]["perplexity"] = math.exp(nats)
    held = next((n for n in VAL if n in log.columns), None)
    if held:
        at, v = log.series(held)
        out["held_out"] = {"name": held, "last": float(v[-1]), "best": float(v.min()), "best_step": int(at[v.argmin()])}
    norms = {"all": "grad_norm"} | {f"stage{i}": f"stage{i}/grad_norm" for i in log.stages("grad_norm")}
    out["grad_norm"] = {k: _norms(*log.series(n)) for k, n in norms.items() if n in log.columns}
    rates = {"all": "lr"} | {f"stage{i}": f"stage{i}/lr" for i in log.stages("lr")}
    out["learning_rate"] = {
        k: {"peak": float(v.max()), "final": float(v[-1])} for k, n in rates.items() if len(v := log.series(n)[1])
    }
    chunks = {f"stage{i}": float(log.series(f"stage{i}/bytes_per_chunk")[1][-1]) for i in log.stages("bytes_per_chunk")}
    if chunks:
        out["bytes_per_chunk"] = chunks
    for name, unit in (("bytes_per_second", "bytes/s"), ("tokens_per_second", "tokens/s")):
        if len(v := log.series(name)[1]):
            out["throughput"] = {"median": float(np.median(v)), "unit": unit}
            break
    size, seen = parameters_of(log), _seen(log)
    if size > 0:
        out["parameters"] = size
    if seen > 0:
        out["tokens"] = seen
    if size > 0 and seen > 0:
        out["tokens_per_parameter"] = seen / size
    return out


def _norms(at: np.ndarray, v: np.ndarray) -> dict[str, Any]:
    top = int(v.argmax())
    return {"largest": float(v[top]), "at_step": int(at[top]), "median": float(np.median(v)), "final": float(v[-1])}


def _seen(log: Log) -> float:
    """Bytes or tokens trained on; 0 where unknown."""
    _, seen = log.series("bytes")
    if len(seen):
        return float(seen[-1])
    each = log.number("batch_bytes", "tokens_per_step", "batch_tokens", default=0)
    return each * log.last_step


def unexamined(log: Log) -> list[dict[str, str]]:
    """[{"what", "why"}]: what the material does not let one judge."""
    out = []

    def no(what: str, why: str) -> None:
        out.append({"what": what, "why": why})

    if not len(log.step):
        no("loss, gradients, throughput", "there is no log, only a config")
    else:
        if not any(n in log.columns for n in LOSS):
            no("the course of the loss", "no training loss in the log")
        if not any(n in log.columns for n in VAL):
            no("over-fitting", "no held-out loss in the log; val_fraction holds out documents at random")
        if "grad_norm" not in log.columns and not log.stages("grad_norm"):
            no("gradient explosion, clipping, zeroing of gradients", "no gradient norms in the log")
        else:
            at, _ = log.series("grad_norm", *(f"stage{i}/grad_norm" for i in log.stages("grad_norm")))
            every = float(np.median(np.diff(at))) if len(at) > 1 else 0.0
            if len(at) < LEAST:
                no(
                    "whether gradients are zeroed at every step",
                    f"{len(at)} gradient norms, a period needs {LEAST} or more",
                )
            elif every > 1:
                no(
                    f"whether gradients are zeroed every {every:.0f} steps or oftener",
                    f"norms are logged every {every:g} steps: a period shorter than 2 rows does not show",
                )
        if "lr" not in log.columns and not log.stages("lr"):
            no("how the learning rate went", "no learning rate in the log")
        if not log.stages("F") and not log.stages("bytes_per_chunk") and "cutoff" not in log.columns:
            no("compression", "neither F nor bytes per chunk in the log")
        if not log.planned_steps:
            no("whether the run ended as planned", "neither config nor log says how many steps were planned")
    if not log.config:
        no("the configuration", "no config beside the log; --config names one")
    elif not parameters_of(log) > 0:
        no("thresholds that depend on the model's size", "nothing says how many parameters it has")
    if log.config and not data_files(log):
        no("the data", "the files of the config cannot be found from here")
    if num_stages(log) > 1 and not log.stages("grad_norm") and len(log.step):
        no("which stage's gradients burst", "gradient norms are not logged by stage")
    if log.kind not in ("run", "config"):
        no("whether documents of a pack see each other", "a log of losses cannot show it; the model and its loader can")
    return out
