"""Chunks: collapse, missed targets, what a ratio loss does not show, F against G, budgets."""

from __future__ import annotations

from typing import Any

import numpy as np

from .findings import Finding
from .runs import Log
from .series import slope, tail

OPEN = 0.95  # F above: one byte a chunk
MISSED = 0.25
BIAS = {"rate_control": "bias"}
BLIND = 0.1  # a ratio loss this near 1 looks as if the target were reached


def _rate(log: Log, stage: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps, F): logged, else from bytes per chunk of this stage and the one outside it."""
    at, f = log.series(f"stage{stage}/F")
    if len(f):
        return at, f
    at, inner = log.series(f"stage{stage}/bytes_per_chunk")
    if not len(at) or stage == 0:
        return at, 1 / np.maximum(inner, 1e-9)
    outer_at, outer = log.series(f"stage{stage - 1}/bytes_per_chunk")
    if not len(outer_at):
        return np.zeros(0), np.zeros(0)
    return at, np.interp(at, outer_at, outer) / np.maximum(inner, 1e-9)


def _target(log: Log, stage: int) -> float:
    """Positions per chunk asked of a stage at the end of the log; NaN when unknown."""
    _, t = log.series(f"stage{stage}/target")
    if len(t):
        return float(t[-1])
    wanted = log.setting("compression")
    return (
        float(wanted[stage]) if isinstance(wanted, list) and stage < len(wanted) and log.kind == "run" else float("nan")
    )


def _stages(log: Log) -> list[int]:
    return sorted({*log.stages("F"), *log.stages("bytes_per_chunk")})


def collapse(log: Log) -> list[Finding]:
    out = []
    outer = 1.0  # bytes of a position of this stage
    for i in _stages(log):
        at, f = _rate(log, i)
        if len(f) < 10:
            continue
        end, target = float(np.median(tail(f))), _target(log, i)
        span = (int(at[0]), int(at[-1]))
        first = f"F is {end:.4f} over the last tenth (steps to {at[-1]:.0f})"
        wanted = f"; the target is {target:g} positions a chunk." if np.isfinite(target) else "."
        if end > OPEN:
            since = at[np.argmax(f > OPEN)]
            out.append(
                Finding(
                    "critical",
                    "collapse_open",
                    f"Stage {i} collapsed to one chunk per position",
                    [
                        first + wanted,
                        f"F is above {OPEN} since step {since:.0f}: the inner stages see every byte.",
                    ],
                    [
                        "rate_control bias holds F by a logit bias",
                        f"a smaller lr_multipliers for stage {i} and a longer warm-up of the rate",
                    ],
                    span,
                    i,
                    _more_alpha(log, 4) | BIAS,
                )
            )
        floor = outer / log.number("seq_len", default=np.inf)  # every sequence has its first chunk
        closed = max(2 * floor, 0.1 / target if np.isfinite(target) else 0.01)
        if end < closed:
            since = at[np.argmax(f < closed)]
            document = f", {end / floor:.1f} chunks a sequence of {log.number('seq_len'):g} bytes" if floor else ""
            out.append(
                Finding(
                    "critical",
                    "collapse_closed",
                    f"Stage {i} collapsed to one chunk per document",
                    [
                        first + document + wanted,
                        f"below {closed:.4f} since step {since:.0f}: the inner stages see next to nothing.",
                    ],
                    ["rate_control bias holds F by a logit bias", "lower learning_rate of the outer stage"],
                    span,
                    i,
                    _more_alpha(log, 4) | BIAS,
                )
            )
        outer /= max(end, 1e-9)
    found = {f.name for f in out}
    for name, what in (("collapse_open", "one chunk per position"), ("collapse_closed", "one chunk per document")):
        events = log.events_named(name)
        if events and name not in found:
            out.append(
                Finding(
                    "warning",
                    name,
                    f"The guards saw a collapse to {what}",
                    [f"step {e.step}: {e.message}" for e in events[:5]],
                    [],
                    (events[0].step, events[-1].step),
                    keys=_more_alpha(log, 2) | BIAS,
                )
            )
    return out


def _more_alpha(log: Log, factor: float) -> dict[str, Any]:
    alpha = log.number("ratio_weight", "ratio_loss_weight", "alpha")
    return {"ratio_weight": float(f"{min(alpha * factor, 5):.3g}")} if alpha > 0 else {"ratio_weight": "auto"}


def target_missed(log: Log) -> list[Finding]:
    out = []
    begin = max(log.number("warmup_steps", default=0), 0.05 * log.total_steps)
    for i in _stages(log):
        at, f = _rate(log, i)
        target = _target(log, i)
        if len(f) < 20 or not np.isfinite(target) or at[-1] < begin:
            continue
        end = float(np.median(tail(f)))
        off = 1 / (end * target) - 1
        if abs(off) <= MISSED or end > OPEN or end < 0.1 / target:  # beyond: a collapse, told by its own rule
            continue
        per_chunk = 1 / end
        evidence = [f"{per_chunk:.2f} positions a chunk over the last tenth, target {target:g} ({off:+.0%})."]
        _, loss = log.series(f"stage{i}/ratio_loss")
        if not len(loss) and len(_stages(log)) == 1:
            _, loss = log.series("ratio_loss")
        g = log.series(f"stage{i}/G")[1]
        blind = len(loss) > 0 and abs(float(np.median(tail(loss))) - 1) < BLIND
        if blind:
            mean = f" Here G is {np.median(tail(g)):.3f} against 1/N = {1 / target:.3f}." if len(g) else ""
            evidence.append(
                f"The ratio loss is {np.median(tail(loss)):.3f}, near 1, and looks fine: "
                f"L - 1 = N^2/(N-1) (F - 1/N)(G - 1/N) vanishes whenever G = 1/N, and F has no gradient.{mean}"
            )
        change: list[str] = []
        keys: dict[str, Any] = {}
        alpha = log.number("ratio_weight", "ratio_loss_weight", "alpha")
        if alpha > 0:  # the equilibrium alpha (F - 1/N) = const of a weak alpha, solved for an error of 5 %
            wanted = min(max(alpha * abs(end * target - 1) / 0.05, 2 * alpha), 5.0)
            if wanted > 1.2 * alpha:
                keys["ratio_weight"] = float(f"{wanted:.2g}")
                change.append(f"ratio_weight is {alpha:g} now: the error shrinks about as its inverse")
        else:
            change.append("a higher ratio_weight (about 1 at 10M parameters, 0.2 at 1B)")
        if str(log.setting("rate_control", default="none")) in ("none", "", "False"):
            keys |= BIAS
            change.append("rate_control bias meets the target exactly, whatever ratio_weight is")
        title = f"Stage {i} misses its compression target" + (" though its ratio loss is near 1" if blind else "")
        out.append(Finding("critical", "target_missed", title, evidence, change, (int(begin), int(at[-1])), i, keys))
    events = log.events_named("target_missed")
    if events and not out:
        why = [f"step {e.step}: {e.message}" for e in events[:5]]
        out = [
            Finding(
                "note",
                "target_missed",
                "The compression target was missed for a while",
                why,
                [],
                (events[0].step, events[-1].step),
                keys=BIAS,
            )
        ]
    return out


def ratio_blind(log: Log) -> list[Finding]:
    """A ratio loss near 1 beside which neither F nor bytes per chunk is logged: it proves nothing."""
    seen = _stages(log)
    ends = {i: tail(log.series(f"stage{i}/ratio_loss")[1]) for i in log.stages("ratio_loss") if i not in seen}
    if not ends and not seen and "ratio_loss" in log.columns:
        whole = tail(log.series("ratio_loss")[1])
        ends = {-1: whole / max(round(float(np.median(whole))), 1)}  # a sum over stages is near their number
    near = {i: float(np.median(v)) for i, v in ends.items() if abs(float(np.median(v)) - 1) < BLIND}
    if not near:
        return []
    values = ", ".join(f"{v:.4f}" + (f" (stage {i})" if i >= 0 else "") for i, v in near.items())
    why = [
        f"Ratio loss {values} over the last tenth, and no F, G or bytes per chunk in the log.",
        "L - 1 = N^2/(N-1) (F - 1/N)(G - 1/N): it is 1 for every F, all bytes or none, as soon as G = 1/N, and F has "
        "no gradient. A ratio loss of 1 is no evidence of good compression, nor of bad.",
    ]
    change = ["log F, G and bytes per chunk of every stage beside it (hnet train does), and judge those"]
    title = "A ratio loss near 1 says nothing of the compression"
    span = (int(log.step.min()), log.last_step)
    return [Finding("warning", "ratio_blind", title, why, change, span)]


def drift(log: Log) -> list[Finding]:
    """F (what happens) and G (what the gradient sees) moving apart: G alone is being pushed. G above F is usual; a
    growing gap is not."""
    out = []
    for i in log.stages("G"):
        at, f = log.series(f"stage{i}/F")
        _, g = log.series(f"stage{i}/G")
        if len(f) != len(g) or len(f) < 40:
            continue
        gap = np.abs(g - f)
        early, late = float(np.median(gap[len(gap) // 10 : len(gap) // 3])), float(np.median(tail(gap)))
        if late < 0.15 or late - early < 0.1:
            continue
        per = slope(gap[len(gap) // 10 :])[0]
        evidence = [
            f"|F - G| was {early:.3f} until step {at[len(gap) // 3]:.0f} and is {late:.3f} at the end "
            f"({per * len(gap):+.3f} over the run); F {np.median(tail(f)):.3f}, G {np.median(tail(g)):.3f}."
        ]
        change = ["the bias moves F itself; a higher ratio_weight only moves G further"]
        span = (int(at[len(gap) // 3]), int(at[-1]))
        out.append(Finding("warning", "drift", f"F and G of stage {i} drift apart", evidence, change, span, i, BIAS))
    return out


def budget(log: Log) -> list[Finding]:
    events = log.events_named("budget_overflow")
    if not events:
        return []
    evidence = [f"{len(events)} times, first at step {events[0].step}: {events[0].message}".rstrip(": ")]
    change = ["raise max_chunks, or the compression target; at the start about half of all positions are boundaries"]
    return [
        Finding(
            "warning",
            "budget_overflow",
            "More chunks than the budget: boundaries were dropped",
            evidence,
            change,
            (events[0].step, events[-1].step),
        )
    ]


RULES = (collapse, target_missed, ratio_blind, drift, budget)
