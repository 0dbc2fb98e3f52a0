"""Gradient norms: bursts and growth, clipping that acts too often, gradients that are not zeroed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .architecture import multipliers_of
from .findings import Finding
from .runs import Log
from .series import episodes, percent, tail, trailing_median
from .thresholds import row, threshold

GROWN = 10.0  # the end over the first third
LONGEST = 4000  # rows in which a period is looked for
CYCLES = 6  # at least so many of them
LEAST = 18  # rows
HIGH = 1.5  # times, top over bottom
TWO = 1.35  # the same of two rows: two gradients added up are 1.4 to 2 times as long as one
EXPLAINED = 0.6  # of the variance of log norm, by the place within the period
HARDLY = 0.35  # the same, where the place of the lowest norms leaves no doubt


class Burst(NamedTuple):
    value: float
    step: int
    median: float
    bursts: int
    first: int  # step of the first


def burst(at: np.ndarray, g: np.ndarray) -> Burst | None:
    """The largest of the norms far above both the median before them and that of the run; one is enough."""
    if len(g) < 20 or not (median := float(np.median(g))) > 0:
        return None
    high = g > threshold("burst") * np.maximum(trailing_median(g, 50), median)
    high[: min(5, len(g) // 20)] = False  # a median of nothing
    found = episodes(high, gap=5)
    if not found:
        return None
    top = int(np.argmax(np.where(high, g, 0)))
    return Burst(float(g[top]), int(at[top]), median, len(found), int(at[found[0][0]]))


def grad_explosion(log: Log) -> list[Finding]:
    out = []
    for name in [f"stage{i}/grad_norm" for i in log.stages("grad_norm")] or ["grad_norm"]:
        out += _explosion(log, name)
    if not out and log.stages("grad_norm"):
        out = _explosion(log, "grad_norm")
    events = log.events_named("grad_explosion")
    if events and not out:
        evidence = [f"step {e.step}: {e.message}" for e in events[:5]]
        span = (events[0].step, events[-1].step)
        change = ["lower learning_rate or the lr_multipliers of that stage"]
        title = "The guards saw an exploding gradient norm"
        out = [Finding("warning", "grad_explosion", title, evidence, change, span)]
    return out


def _explosion(log: Log, name: str) -> list[Finding]:
    at, g = log.series(name)
    hit = burst(at, g)
    base = end = 0.0
    if len(g) >= 40:
        later = g[len(g) // 10 :]
        base, end = float(np.median(later[: len(later) // 3])), float(np.median(tail(later)))
    grown = 0 < GROWN * base < end
    if not hit and not grown:
        return []
    stage = int(name[5 : name.index("/")]) if name != "grad_norm" else None
    evidence = []
    if grown:
        evidence.append(f"median {base:.3g} in the first third, {end:.3g} at the end ({end / base:.3g} times).")
    if hit:
        evidence.append(
            f"{hit.bursts} burst{'s' * (hit.bursts > 1)}, the first at step {hit.first}; the largest {hit.value:,.5g} "
            f"at step {hit.step}, {hit.value / hit.median:,.0f} times the median {hit.median:.3g}; final {g[-1]:.3g}."
        )
    keys: dict[str, Any] = {}
    multipliers = multipliers_of(log)
    if stage is not None and stage < len(multipliers) and multipliers[stage] > min(multipliers):
        evidence.append(f"Its learning rate is multiplied by {multipliers[stage]:.3g}.")
        keys["lr_multipliers"] = [round(m / 2, 3) if j == stage else m for j, m in enumerate(multipliers)]
    if (rate := log.number("learning_rate")) > 0:
        keys["learning_rate"] = float(f"{threshold('lr_advice') * rate:.2g}")
    change = ['clipping = "adaptive" bounds a burst by the norms before it; a longer warm-up if it came early']
    cut = hit is not None and hit.value > threshold("burst_critical") * hit.median
    where = "The gradient norm" if stage is None else f"Stage {stage}'s gradient norm"
    title = f"{where} {'exploded' if grown or cut else 'bursts'}"
    severity = "critical" if grown or cut else "warning"
    return [Finding(severity, "grad_explosion", title, evidence, change, (int(at[0]), int(at[-1])), stage, keys)]


def clip_tight(log: Log) -> list[Finding]:
    """Judged by the share of steps that are clipped; a burst that is cut to a sliver is told too."""
    limit, kind = log.number("max_grad_norm"), str(log.setting("clipping", "clip", default="norm"))
    at, g = log.series("grad_norm")
    if not limit > 0 or kind in ("adaptive", "off", "none") or len(g) < 40:
        return []
    after = bool(g.max() <= 1.01 * limit)  # what is logged is the norm after clipping
    share = float(np.mean(g >= 0.99 * limit if after else g > limit))
    most, cut = row("clipped"), row("clip_cut")
    hit = burst(at, g)
    evidence = [
        f"max_grad_norm is {limit:g} and {percent(share)} of {len(g)} logged steps are "
        + ("at it." if after else f"above it (median norm {np.median(g):.3g}, largest {g.max():,.5g}).")
    ]
    wanted = max(threshold("clip_advice") * limit, float(f"{np.quantile(g, 0.9):.2g}"))
    keys = {"clipping": "adaptive", "max_grad_norm": wanted}
    change = ["adaptive clips to a percentile of recent norms; max_grad_norm only holds until there are some"]
    span = (int(at[0]), int(at[-1]))
    if share > most.value:
        evidence.append(f"{most.source[0].upper()}{most.source[1:]}.")
        end = g[len(g) // 2 :] / limit
        if not after and end.min() >= 1 and end.max() < 2:
            evidence.append(
                f"In the second half the norm is {end.min():.3g} to {end.max():.3g} times the limit, never below it: "
                "so are gradients that are clipped in place and never zeroed."
            )
            change.insert(0, "make sure that gradients are zeroed after every update (optimizer.zero_grad())")
        title = "Clipping is too tight: it acts at most steps"
        return [Finding("warning", "clip_tight", title, evidence, change, span, keys=keys)]
    if hit and hit.value > cut.value * limit:
        evidence.append(
            f"At step {hit.step} the norm {hit.value:,.5g} was scaled by {limit / hit.value:.2g}: such a step keeps "
            f"the direction of the burst and none of its size ({cut.source})."
        )
        evidence.append(f"At {percent(share)} of the steps the limit itself is no brake on the others.")
        title = "Clipping at a fixed norm cuts bursts to a sliver"
        return [Finding("note", "clip_tight", title, evidence, change, span, keys=keys, confidence="low")]
    return []


class Sawtooth(NamedTuple):
    period: float  # steps
    ratio: float  # top over bottom of the mean tooth
    explained: float  # share of the variance
    flat: bool = False  # it climbs for a few rows only and stays: gradients that are clipped in place


def find_sawtooth(at: np.ndarray, g: np.ndarray) -> Sawtooth | None:
    """A norm that falls back all at once, in equal periods of 2 rows or more (from 3 on also halves: 100 micro-steps of
    8 a step are 12.5 steps), and in between climbs, or climbs and then stays where it is."""
    ok = g > 0
    at, g = at[ok][-LONGEST:], g[ok][-LONGEST:]
    n = len(g)
    if n < LEAST:
        return None
    every = float(np.median(np.diff(at)))
    if every <= 0 or np.mean(np.abs(np.diff(at) - every) < 0.01 * every) < 0.9:
        return None
    x = np.log(g)
    index = (at - at[0]) / every  # rows, gaps counted
    total = np.concatenate([[0.0], np.cumsum(x)])
    found: list[tuple[float, float, np.ndarray]] = []
    for period in [2.0, *np.arange(3.0, n / CYCLES + 0.25, 0.5)]:
        window = round(period)
        smooth = (total[window:] - total[:-window]) / window  # constant on what repeats itself
        low = window // 2
        rest, place = x[low : low + len(smooth)] - smooth, index[low : low + len(smooth)]
        bins = min(int(period), 32)
        phase = np.minimum((place % period / period * bins).astype(int), bins - 1)
        counts = np.maximum(np.bincount(phase, minlength=bins), 1)
        profile = np.bincount(phase, rest, minlength=bins) / counts
        m, variance = len(rest), float(rest.var())
        if m <= 2 * bins or variance <= 0:
            continue
        unexplained = float(np.mean((rest - profile[phase]) ** 2)) / variance
        found.append((1 - unexplained * (m - 1) / (m - bins), float(period), profile))
    best = max((f[0] for f in found), default=0.0)
    if best < HARDLY:
        return None
    # the shortest: its multiples fit as well
    explained, period, profile = next(f for f in found if f[0] >= 0.95 * best)
    drop = np.roll(profile, -1) - profile
    tooth = np.roll(profile, -(int(np.argmin(drop)) + 1))  # from its bottom to its top
    if -float(drop.min()) < 0.6 * np.ptp(profile):
        return None
    height = float(tooth[-1] - tooth[0])
    if period == 2:
        found_it = height >= np.log(TWO) and explained >= EXPLAINED
        return Sawtooth(2 * every, float(np.exp(height)), explained) if found_it else None
    climbing = float(np.corrcoef(np.argsort(np.argsort(tooth)), np.arange(len(tooth)))[0, 1])  # Spearman's
    if height >= np.log(HIGH) and climbing >= 0.85 and explained >= EXPLAINED:
        return Sawtooth(period * every, float(np.exp(height)), explained)
    height = float(np.median(tooth[len(tooth) // 2 :]) - tooth[0])
    falls = float(np.max(np.maximum.accumulate(tooth) - tooth))  # on the way
    flat = len(tooth) >= 4 and height >= np.log(HIGH) and falls < 0.25 * height
    if flat and (explained >= EXPLAINED or _lowest(index, x, period)):
        return Sawtooth(period * every, float(np.exp(height)), explained, flat=True)
    return None


def _lowest(index: np.ndarray, x: np.ndarray, period: float) -> bool:
    """Whether the smallest norm of a period comes at the same place of it too often for chance."""
    turn = (index // period).astype(int)
    places = [index[turn == t][np.argmin(x[turn == t])] % period for t in range(int(turn[-1])) if (turn == t).any()]
    away = np.abs(np.subtract.outer(places, places))
    hits = int((np.minimum(away, period - away) < 1).sum(0).max())
    share, n = min(2 / period, 1.0), len(places)  # of a period is that near
    chance = sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(hits, n + 1))
    return chance * len(x) * period < 1e-3  # of all the periods and places that were tried


def grad_sawtooth(log: Log) -> list[Finding]:
    at, g = log.series("grad_norm", *(f"stage{i}/grad_norm" for i in log.stages("grad_norm")))
    tooth = find_sawtooth(at, g)
    if tooth is None:
        return []
    micro = log.number("accumulation", default=1)
    in_micro = f" ({tooth.period * micro:g} micro-steps at an accumulation of {micro:g})" if micro > 1 else ""
    why = [
        f"The norm climbs {tooth.ratio:.3g} times and falls back every {tooth.period:g} steps{in_micro}; this alone "
        f"explains {percent(tooth.explained)} of its variation.",
        "Gradients that are added up over steps and zeroed only then do this: each update repeats all before it.",
    ]
    if tooth.flat:
        why[0] = (
            f"Every {tooth.period:g} steps{in_micro} the norm falls to 1/{tooth.ratio:.3g} of what it is else, and is "
            f"back within a few steps; this alone explains {percent(tooth.explained)} of its variation."
        )
        why.append("Where they are clipped in place, what is left over has the size of the limit: the norm soon stays.")
    change = ["zero the gradients after every update (optimizer.zero_grad()), not at every n-th micro-step"]
    title = "The gradient norm is a saw-tooth: gradients are zeroed too rarely"
    sure = "high" if tooth.explained > 0.8 and tooth.ratio > 2 and not tooth.flat else ""
    span = (int(at[0]), int(at[-1]))
    return [Finding("critical", "grad_sawtooth", title, why, change, span, confidence=sure)]


RULES = (grad_explosion, clip_tight, grad_sawtooth)
