"""Routers that never make up their mind."""

from __future__ import annotations

from typing import Any

import numpy as np

from .findings import Finding
from .runs import Log
from .series import percent, tail

SEPARATED = 0.5  # p on boundaries less p elsewhere; runs without help reach 0.25, decided ones 0.85 to 1
DECIDES = 300  # steps of an entropy or surprisal term at its full weight that decide a router; 48 do not
LEAST_OFF = 0.2  # p elsewhere, where only F and G are logged: a bound, and so a note


def undecided(log: Log) -> list[Finding]:
    """p on boundaries and elsewhere close together at the end of the log. Every router begins like this, so that it is
    judged after the first quarter of the run, and once the entropy term, if there is one, has acted in full; a warning
    where no term decides it, or one has had the steps to."""
    out = []
    for i in sorted({*log.stages("p_on"), *log.stages("G")}):
        begin = _begin(log, i)
        logged = {f"stage{i}/p_on", f"stage{i}/p_off"} <= log.columns.keys()
        evidence = _evidence(log, i, begin) if logged else _evidence_of_rates(log, i, begin)
        if not evidence:
            continue
        evidence.append("At F = 1/N the ratio loss has no gradient for G: nothing in it decides the router.")
        if logged:
            evidence.append("See decisiveness.png (--out, or hnet plot).")
        severity, title = ("warning", "is undecided") if logged else ("note", "looks undecided")
        keys, change = _change(log, i)
        if (acted := _acted(log, i)) is not None and acted < DECIDES:
            severity, title, keys = "note", "has not decided yet", {}
            evidence.append(
                f"What decides it (entropy_weight, surprisal_weight) acted in full for {max(acted, 0):.0f} steps; a "
                "few hundred are usual."
            )
            change = ["judge it in a longer run; in this one nothing is wrong with it"]
        span = (int(begin), log.last_step)
        title = f"The router of stage {i} {title}"
        out.append(Finding(severity, "undecided", title, evidence, change, span, i, keys))
    return out


def _evidence(log: Log, stage: int, begin: float) -> list[str]:
    s = f"stage{stage}"
    at, above = log.series(f"{s}/p_on")
    _, below = log.series(f"{s}/p_off")
    if len(above) < 20 or at[-1] < begin:
        return []
    on, off = float(np.median(tail(above))), float(np.median(tail(below)))
    _, per_sequence = log.series(f"{s}/chunks_per_sequence")
    forced = 1 / max(float(np.median(tail(per_sequence))), 1.0) if len(per_sequence) else 0.0
    if forced > 0.9:  # a collapse, told by its own rule
        return []
    on = (on - forced) / (1 - forced)  # first positions have p = 1, whatever the router thinks
    if on - off >= SEPARATED:
        return []
    parts = [f"p is {on:.2f} on boundaries (but for first positions) and {off:.2f} elsewhere over the last tenth"]
    for name, text in (("undecided", "{} of positions are within 0.1 of 1/2"), ("G_minus_F", "G - F is {}")):
        _, v = log.series(f"{s}/{name}")
        if len(v):
            end = float(np.median(tail(v)))
            parts.append(text.format(percent(end) if name == "undecided" else f"{end:+.2f}"))
    evidence = ["; ".join(parts) + "."]
    mixed = f"The EMA mixes {percent(1 - on)} of the chunk before into each"
    _, flips = log.series(f"{s}/flips")
    if len(flips):
        moved = percent(float(np.median(flips[-3:])))
        mixed += f", and from one evaluation to the next {moved} of the boundaries moved at the end"
    return [*evidence, mixed + "."]


def _evidence_of_rates(log: Log, stage: int, begin: float) -> list[str]:
    """From G = F p_on + (1 - F) p_off with p_on <= 1."""
    at, rates = log.series(f"stage{stage}/F")
    _, means = log.series(f"stage{stage}/G")
    if len(rates) < 20 or not len(means) or at[-1] < begin:
        return []
    f, g = float(np.median(tail(rates))), float(np.median(tail(means)))
    if not 0.02 < f < 0.9 or (least := (g - f) / (1 - f)) <= LEAST_OFF:
        return []
    return [f"F is {f:.2f} and G {g:.2f} over the last tenth: p elsewhere than on boundaries is {least:.2f} or more."]


def _begin(log: Log, stage: int) -> float:
    """The first step that is judged."""
    total = log.total_steps
    begin = max(log.number("warmup_steps", default=0), 0.25 * total)
    if _weight(log, "entropy_weight", stage):
        full = log.number("entropy_start", default=0) + log.number("entropy_warmup", default=0)
        begin = max(begin, min(full + 0.1, 1) * total)
    return begin


def _acted(log: Log, stage: int) -> float | None:
    """Steps for which a term that decides the router has had its full weight; None where there is no such term."""
    full = []
    if _weight(log, "entropy_weight", stage):
        full.append(log.number("entropy_start", default=0) + log.number("entropy_warmup", default=0))
    if _weight(log, "surprisal_weight", stage):
        full.append(log.number("surprisal_warmup", default=0))
    return log.last_step - max(full) * log.total_steps if full else None


def _change(log: Log, stage: int) -> tuple[dict[str, Any], list[str]]:
    entropy, surprisal = (_weight(log, f"{k}_weight", stage) for k in ("entropy", "surprisal"))
    keys: dict[str, Any] = {}
    change = []
    if not surprisal:
        keys["surprisal_weight"] = [0.1]
        change.append("surprisal_weight teaches p to be 1 where the model is least sure of what comes")
    keys["entropy_weight"] = [0.1] if not entropy else [round(2 * entropy, 3)]
    if not entropy:
        change.append(
            "entropy_weight drives p to 0 or 1, and so freezes the boundaries there are: entropy_start and "
            "entropy_warmup say when it acts, after they have come to good places"
        )
    else:
        change.append(f"entropy_weight is {entropy:g} now; a smaller entropy_start helps too")
    return keys, change


def _weight(log: Log, name: str, stage: int) -> float:
    """A key's weight of a stage, where it has one for all or one each; 0 where it is not set."""
    value = log.setting(name, default=0.0)
    values = value if isinstance(value, list) and value else [value]
    own = values[stage] if stage < len(values) else values[0]
    return float(own) if isinstance(own, (int, float)) else 0.0


RULES = (undecided,)
