"""The learning rate's beginning and its share in each stage: warm-up and multipliers."""

from __future__ import annotations

import numpy as np

from hnet.plots.run import smooth

from .architecture import multipliers_of, num_stages, parameters_of
from .findings import Finding
from .gradients import burst
from .runs import Log
from .series import noise, percent
from .thresholds import row, threshold

LOSS = ("ce", "bpb", "loss")


def size_text(parameters: float) -> str:
    return f"{parameters / 1e6:,.0f}M parameters" if parameters > 0 else "a model of unknown size"


def warmup(log: Log) -> list[Finding]:
    """Too short a warm-up: by the config and the model's size, and by what the first steps show."""
    total, steps = log.total_steps, int(log.number("warmup_steps", default=-1))
    if log.setting("warmup_fraction") and steps <= 0:
        steps = int(log.number("warmup_fraction", default=0) * total)
    from_lr = False
    at, lr = log.series("lr")
    if not len(lr) and log.stages("lr"):
        at, lr = log.series(f"stage{log.stages('lr')[0]}/lr")
    if steps < 0 and len(lr) >= 20 and lr.max() > 0:
        steps, from_lr = int(at[np.argmax(lr >= 0.99 * lr.max())]), True
        if steps > 0.3 * total:  # not a warm-up: a schedule that peaks late
            steps = -1
    size = parameters_of(log)
    evidence = _early_trouble(log, steps)
    least = row("warmup", size)
    short = 0 <= steps < least.value * total
    if not evidence and (not short or (from_lr and not size > 0)):
        return []
    if steps >= 0:
        source = "the learning rate peaks at" if from_lr else "warmup_steps is"
        wanted = f"; {size_text(size)} take {percent(least.value)} at least ({least.source})" if short else ""
        evidence.insert(0, f"{source} {steps} of {total} steps ({percent(steps / max(total, 1))}){wanted}.")
    trouble = len(evidence) > 1 or steps < 0
    short = short or (trouble and steps < threshold("warmup_ample") * total)
    share = threshold("warmup_advice")
    advice = max(2 * max(steps, 0), round(share * total), 50) if total >= 100 else max(2 * steps, round(0.1 * total))
    keys = {"warmup_steps": min(advice, max(total // 2, 1))} if short else {}
    change = [] if short else ["lower learning_rate: the warm-up itself is not short"]
    if not short:
        title = "The first steps are unstable in spite of the warm-up"
    else:
        title = "Too little warm-up" if trouble else "Short warm-up"
    harmless = not trouble and log.kind != "config" and len(log.step) >= 40 and not size >= 1e9
    if harmless:
        evidence.append("This log shows no harm from it.")
    span = (0, max(total // 10, 1)) if len(log.step) else None
    severity = "note" if harmless else "warning"
    sure = "high" if trouble and short else ""
    return [Finding(severity, "warmup", title, evidence, change, span, keys=keys, confidence=sure)]


def _early_trouble(log: Log, warmup_steps: int) -> list[str]:
    evidence = []
    at, v = log.series(*LOSS)
    early = v[: len(v) // 10]
    if len(early) >= 4:
        sm = smooth(early, max(1, len(v) // 200))
        rise = sm - np.minimum.accumulate(sm)
        i = int(np.argmax(rise))
        if rise[i] > max(0.1 * abs(sm[i] - rise[i]), 6 * noise(early)):
            evidence.append(f"The loss rose from {sm[i] - rise[i]:.3f} to {sm[i]:.3f} at step {at[i]:.0f}.")
    at, g = log.series("grad_norm")
    if len(g) >= 40:
        k = max(2, len(g) // 20, int(np.searchsorted(at, 2 * warmup_steps)) if warmup_steps > 0 else 0)
        k = min(k, len(g) // 2)
        later = float(np.median(g[k:]))
        if g[:k].max() > threshold("burst") * later:
            i = int(np.argmax(g[:k]))
            evidence.append(f"Gradient norm {g[i]:.3g} at step {at[i]:.0f}, median later {later:.3g}.")
    return evidence


def lr_multipliers(log: Log) -> list[Finding]:
    """Stages that learn at rates far apart, or faster inside."""
    m = multipliers_of(log)
    if len(m) < 2:
        return []
    shown = "/".join(f"{x:g}" for x in m)
    if any(b > a for a, b in zip(m, m[1:], strict=False)):
        why = [f"{shown}, outermost first; inner stages see fewer, longer units and are wider, and take a lower rate."]
        title = "Learning-rate multipliers grow inwards"
        keys = {"lr_multipliers": sorted(m, reverse=True)}
        return [Finding("warning", "lr_multipliers", title, why, keys=keys)]
    size = parameters_of(log)
    at, g = log.series("grad_norm")
    hit = burst(at, g)
    limit = row("lr_spread", size if size > 0 or not hit else np.inf)  # unknown size, and it burst: judged hard
    spread = max(m) / min(m)
    if spread <= limit.value:
        return []
    base = log.number("learning_rate")
    rates = f": {base * m[0]:.2g} outside, {base * m[-1]:.2g} inside" if base > 0 else ""
    why = [
        f"{shown}, outermost first, spread {spread:.1f} times{rates}; at most {limit.value:g} for {size_text(size)} "
        f"({limit.source})."
    ]
    if hit:
        why.append(f"The gradient norm reached {hit.value:,.4g} at step {hit.step} (median {hit.median:.3g}).")
    top = threshold("lr_spread_advice")
    keys = {"lr_multipliers": [round(float(x), 2) for x in np.linspace(top, 1.0, len(m))]}
    change = []
    if not log.stages("grad_norm") and num_stages(log) > 1:
        change.append("log the gradient norm of every stage: stage0/grad_norm shows whether the outer one bursts")
    severity = "warning" if size >= 1e9 or hit else "note"
    return [Finding(severity, "lr_multipliers", "Far apart learning-rate multipliers", why, change, keys=keys)]


def stage_norms(log: Log) -> list[Finding]:
    """One gradient norm for several stages, where their rates differ."""
    if "grad_norm" not in log.columns or log.stages("grad_norm") or len(set(multipliers_of(log))) < 2:
        return []
    why = [f"{num_stages(log)} stages with rates of their own, and one gradient norm of all of them."]
    change = ["log the norm of every stage (stage0/grad_norm ...); hnet train does"]
    return [Finding("note", "stage_norms", "Gradient norms are not logged by stage", why, change)]


RULES = (warmup, lr_multipliers, stage_norms)
