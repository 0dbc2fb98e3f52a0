"""Loss and gradients: non-finite values, spikes, warm-up, explosion, early stopping, over-fitting, plateaus."""

from __future__ import annotations

import numpy as np

from hnet.plots.run import smooth

from .findings import Finding
from .runs import Log
from .series import episodes, noise, percent, slope, tail, trailing_median

LOSS = ("ce", "bpb", "loss")
VAL = ("val_ce", "val_bpb")
PATIENCE = ("patience", "early_stop_patience", "early_stopping_patience")
SPIKE_SIGMA, SPIKE_SHARE = 8.0, 0.25  # a spike is this far above the median before it, in noise and in the loss
EXPLOSION = 10.0  # growth of a gradient norm
EARLY_GRAD = 20.0  # first gradient norms over later ones; healthy runs from our presets show 6 to 8
SHORT_WARMUP = 0.01


def non_finite(log: Log) -> list[Finding]:
    events = log.events_named("non_finite")
    steps = {n: s for n, s in log.non_finite.items() if n in ("loss", "ce", "bpb", "val_ce") or n.endswith("grad_norm")}
    if not events and not steps:
        return []
    seen = sorted({e.step for e in events} | {s for v in steps.values() for s in v})
    good, _ = log.series(*LOSS)
    recovered = bool(len(good)) and good[-1] > seen[-1]
    counts = [f"{n} at {len(s)} step{'s' * (len(s) > 1)} (first {s[0]})" for n, s in sorted(steps.items())]
    evidence = ["not finite: " + ", ".join(counts) + "."] if counts else []
    if events:
        # older trainers wrote one event for many: their rows tell
        rows = {s for n, v in steps.items() if n in ("loss", "grad_norm") for s in v}
        skipped = max(len(events), len(rows))
        first = min([events[0].step, *rows])
        evidence.append(f"The trainer skipped {skipped} update{'s' * (skipped > 1)}, the first at step {first}.")
    last = f"{int(good[-1])}" if len(good) else "none"
    evidence.append(f"Last finite loss at step {last}; {'it went on' if recovered else 'it never came back'}.")
    change = [
        "lower learning_rate by 2-4x, or lengthen warmup_steps",
        'dtype = "fp32" for a few hundred steps tells overflow from divergence',
        "max_grad_norm = 1.0 if clipping is off",
    ]
    return [
        Finding(
            "warning" if recovered else "error",
            "non_finite",
            "Loss or gradient was not finite",
            evidence,
            change,
            (seen[0], seen[-1]),
        )
    ]


def loss_spike(log: Log) -> list[Finding]:
    steps, v = log.series(*LOSS)
    if len(v) < 40:
        return _spike_events(log)
    base, sigma = trailing_median(v, min(max(11, len(v) // 50), 101)), noise(v)
    high = v - base > np.maximum(SPIKE_SIGMA * sigma, SPIKE_SHARE * np.abs(base))
    high[: max(5, len(v) // 20)] = False  # the start is the warm-up's
    for raised in log.events_named("cutoff_raised"):  # judged by its own rule
        high[(steps >= raised.step) & (steps <= raised.step + 50)] = False
    found = episodes(high, gap=10)
    if not found:
        return _spike_events(log)
    worst = max(found, key=lambda e: (v - base)[e[0] : e[1] + 1].max())
    at = worst[0] + int(np.argmax((v - base)[worst[0] : worst[1] + 1]))
    before, end = float(base[worst[0]]), float(np.median(tail(v)))
    lost = end > before + max(3 * sigma, 0.05 * abs(before))
    evidence = [
        f"{len(found)} spike{'s' * (len(found) > 1)}; the largest at step {steps[at]:.0f}: loss {v[at]:.3f} where the "
        f"median before was {base[at]:.3f} (noise {sigma:.3f}).",
        f"The last tenth of the log has {end:.3f}: {'worse than before it' if lost else 'recovered'}.",
    ]
    grad_steps, grads = log.series("grad_norm")
    near = grads[np.abs(grad_steps - steps[at]) <= 2]
    if len(near) and near.max() > 5 * np.median(grads):
        evidence.append(f"Gradient norm there {near.max():.3g}, median of the run {np.median(grads):.3g}.")
    change = ["lower learning_rate, or clip harder (max_grad_norm)", "look at the documents of that step"]
    if lost:
        change.insert(
            0, f"go back to a checkpoint before step {steps[worst[0]]:.0f} and resume with a lower learning_rate"
        )
    return [
        Finding(
            "error" if lost else "warning",
            "loss_spike",
            "Loss spike" + (" the run never recovered from" if lost else ""),
            evidence,
            change,
            (int(steps[found[0][0]]), int(steps[found[-1][1]])),
        )
    ]


def _spike_events(log: Log) -> list[Finding]:
    events = log.events_named("loss_spike", "rollback")
    if not events:
        return []
    evidence = [f"step {e.step}: {e.name} {e.message}".rstrip() for e in events[:5]]
    return [
        Finding(
            "warning",
            "loss_spike",
            f"The guards stepped in {len(events)} times against loss spikes",
            evidence,
            ["lower learning_rate, or clip harder (max_grad_norm)"],
            (events[0].step, events[-1].step),
        )
    ]


def warmup(log: Log) -> list[Finding]:
    """Too short a warm-up: by the config, and by what the first steps show."""
    total, steps = log.total_steps, int(log.number("warmup_steps", default=-1))
    if log.setting("warmup_fraction") and steps <= 0:
        steps = int(log.number("warmup_fraction") * total)
    from_lr = False
    at, lr = log.series("lr")
    if steps < 0 and len(lr) >= 20 and lr.max() > 0:
        steps, from_lr = int(at[np.argmax(lr >= 0.99 * lr.max())]), True
        if steps > 0.3 * total:  # not a warm-up: a schedule that peaks late
            steps = -1
    evidence = _early_trouble(log)
    short = 0 <= steps < SHORT_WARMUP * total
    if not evidence and (not short or from_lr):
        return []
    if steps >= 0:
        source = "the learning rate peaks at" if from_lr else "warmup_steps is"
        evidence.insert(0, f"{source} {steps} of {total} steps ({percent(steps / max(total, 1))}).")
    short = 0 <= steps < 2 * SHORT_WARMUP * total or (bool(evidence) and steps < 0)
    advice = max(2 * steps, round(0.05 * total), 50) if total >= 100 else max(2 * steps, round(0.1 * total))
    change = [f"--warmup-steps {advice}"] if short else ["lower learning_rate: the warm-up itself is not short"]
    if not short:
        title = "The first steps are unstable in spite of the warm-up"
    else:
        title = "Too little warm-up" if len(evidence) > 1 else "Short warm-up"
    harmless = len(evidence) == 1 and log.kind != "config" and len(log.step) >= 40
    if harmless:
        evidence.append("This log shows no harm from it.")
    span = (0, max(total // 10, 1)) if len(log.step) else None
    return [Finding("note" if harmless else "warning", "warmup", title, evidence, change, span)]


def _early_trouble(log: Log) -> list[str]:
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
        k = max(2, len(g) // 20)
        later = float(np.median(g[k:]))
        if g[:k].max() > EARLY_GRAD * later:
            i = int(np.argmax(g[:k]))
            evidence.append(f"Gradient norm {g[i]:.3g} at step {at[i]:.0f}, median later {later:.3g}.")
    return evidence


def grad_explosion(log: Log) -> list[Finding]:
    names = [f"stage{i}/grad_norm" for i in log.stages("grad_norm")] or ["grad_norm"]
    out = []
    multipliers = log.setting("lr_multipliers", default=[])
    for i, name in enumerate(names):
        at, g = log.series(name)
        if len(g) < 40:
            continue
        skip = len(g) // 10
        at, g = at[skip:], g[skip:]
        base, end = float(np.median(g[: len(g) // 3])), float(np.median(tail(g)))
        if base <= 0:
            continue
        high = episodes(g > EXPLOSION * 2 * np.maximum(trailing_median(g, 50), base), gap=5)
        grown = end > EXPLOSION * base
        if not grown and len(high) < 3:
            continue
        staged = name != "grad_norm"
        stage = int(name[5 : name.index("/")]) if staged else None
        evidence = [f"median {base:.3g} from step {at[0]:.0f}, {end:.3g} at the end ({end / base:.3g} times)."]
        if high:
            evidence.append(f"{len(high)} bursts, the first at step {at[high[0][0]]:.0f} ({g[high[0][0]]:.3g}).")
        factor = _multiplier(log, multipliers, i) if staged else None
        change = []
        if factor and factor > 1:
            evidence.append(f"Its learning rate is multiplied by {factor:.3g}.")
            new = [round(m / 2, 3) if j == i else m for j, m in enumerate(multipliers)] if multipliers else None
            flag = (
                f"--lr-multipliers {','.join(f'{m:g}' for m in new)}" if new else f"halve lr_multipliers of stage {i}"
            )
            change.append(flag)
        change += ["lower learning_rate", "max_grad_norm = 1.0, or adaptive clipping"]
        where = f"stage {stage}'s gradient norm" if staged else "The gradient norm"
        title = f"{where} {'exploded' if grown else 'bursts'}"
        out.append(
            Finding(
                "error" if grown else "warning",
                "grad_explosion",
                title[0].upper() + title[1:],
                evidence,
                change,
                (int(at[0]), int(at[-1])),
                stage,
            )
        )
    events = log.events_named("grad_explosion")
    if events and not out:
        evidence = [f"step {e.step}: {e.message}" for e in events[:5]]
        out = [
            Finding(
                "warning",
                "grad_explosion",
                "The guards saw an exploding gradient norm",
                evidence,
                ["lower learning_rate or the lr_multipliers of that stage"],
                (events[0].step, events[-1].step),
            )
        ]
    return out


def _multiplier(log: Log, multipliers: object, stage: int) -> float | None:
    if isinstance(multipliers, list) and stage < len(multipliers):
        return float(multipliers[stage])
    rates = [log.series(f"stage{i}/lr")[1] for i in log.stages("lr")]
    if stage < len(rates) and all(len(r) for r in rates) and min(r.max() for r in rates) > 0:
        return float(rates[stage].max() / min(r.max() for r in rates))
    return None


def early_stop(log: Log) -> list[Finding]:
    events, patience = log.events_named("early_stop"), log.number(*PATIENCE)
    at, v = log.series(*VAL)
    at, v = at[at > 0], v[at > 0]
    if not events or len(v) < 3:
        return []
    span = (int(at[0]), events[-1].step)
    since = len(v) - 1 - int(np.argmin(v))
    if since == 0 or (np.isfinite(patience) and since < patience):
        evidence = [
            f"It stopped at step {events[-1].step}, {since} evaluations after the best held-out cross entropy "
            f"({v.min():.4f} at step {at[np.argmin(v)]:.0f})"
            + (f" although patience is {patience:g}." if np.isfinite(patience) else ".")
        ]
        _, ratio = log.series("ratio_loss")
        if len(ratio) >= 4:
            evidence.append(
                f"The ratio loss went from {np.median(ratio[: len(ratio) // 4]):.3f} to {np.median(tail(ratio)):.3f}: "
                "a stop on cross entropy + ratio loss follows it."
            )
        change = ["stop on val_ce alone, never on cross entropy + ratio loss", "resume from the last checkpoint"]
        return [
            Finding(
                "error",
                "early_stop_metric",
                "Stopped early while the held-out cross entropy was still improving",
                evidence,
                change,
                span,
            )
        ]
    window = v[-max(8, len(v) // 2) :]
    per, error = slope(window)
    sigma, waited = noise(v), patience if np.isfinite(patience) else since
    if per < -2 * error and waited * -per < 2 * sigma:
        wanted = int(np.ceil(3 * sigma / -per))
        evidence = [
            f"Evaluations scatter by {sigma:.4f}, and gained {-per:.4f} each over the last half: {waited:g} "
            f"evaluations of patience gain {waited * -per:.4f}, less than the scatter."
        ]
        change = [f"--patience {max(wanted, 10)}", "a larger eval_bytes makes evaluations less noisy"]
        return [
            Finding(
                "warning", "early_stop_noise", "Stopped early on the noise of the evaluations", evidence, change, span
            )
        ]
    return []


def overfitting(log: Log) -> list[Finding]:
    at, v = log.series(*VAL)
    at, v = at[at > 0], v[at > 0]
    train_at, train = log.series("ce" if "val_ce" in log.columns else "bpb", *LOSS)
    if len(v) < 4 or len(train) < 10:
        return []
    best = int(np.argmin(v))
    end = float(np.median(v[-2:]))
    if len(v) - 1 - best < 2 or end - v[best] < max(0.02 * v[best], 3 * noise(v)):
        return []
    sm = smooth(train, max(len(train) // 20, 1))
    then, now = (float(np.interp(s, train_at, sm)) for s in (at[best], at[-1]))
    if now >= then:
        return []
    evidence = [
        f"Held out: {v[best]:.4f} at step {at[best]:.0f}, {end:.4f} at step {at[-1]:.0f} "
        f"(+{percent(end / v[best] - 1)}).",
        f"Training meanwhile: {then:.4f} to {now:.4f}.",
    ]
    change = [
        f"keep the checkpoint of step {at[best]:.0f}; stop there (--patience)",
        "more data, or fewer steps",
        "weight_decay 0.1 or dropout",
    ]
    return [Finding("warning", "overfitting", "Over-fitting", evidence, change, (int(at[best]), int(at[-1])))]


def plateau(log: Log) -> list[Finding]:
    at, v = log.series(*LOSS)
    if len(v) < 100 or "cutoff" in log.columns:  # a ChunkLM's curriculum waits for plateaus
        return []
    start = int(0.6 * len(v))
    a, b = np.array_split(v[start:], 2)
    gain, error = a.mean() - b.mean(), np.sqrt(a.var() / len(a) + b.var() / len(b))
    _, lr = log.series("lr")
    level = float(lr[-1] / lr.max()) if len(lr) and lr.max() > 0 else None
    if abs(gain) > max(0.003 * abs(a.mean()), 2 * error) or (level is not None and level < 0.5):
        return []
    evidence = [
        f"{a.mean():.4f} on average over steps {at[start]:.0f} to {at[start + len(a) - 1]:.0f}, {b.mean():.4f} after."
    ]
    change = ["a larger model or more data if the loss is still too high"]
    if level is not None:
        evidence.append(f"The learning rate is still at {percent(level)} of its peak.")
        change.insert(
            0, "let the learning rate decay now (schedule wsd, or a shorter run): most of the rest comes then"
        )
    return [Finding("warning", "plateau", "The loss is flat", evidence, change, (int(at[start]), int(at[-1])))]


def failures(log: Log) -> list[Finding]:
    """Guard events that ended or hurt the run and that no other rule explains."""
    advice = {
        "out_of_memory": (
            "Out of memory",
            [
                "halve batch_bytes and double the accumulation, or shorten seq_len",
                "a budget (max_chunks) bounds the inner stages",
            ],
        ),
        "disk_full": (
            "The disk was full when saving",
            ["free space, or lower keep_checkpoints", "the checkpoint before it is intact"],
        ),
    }
    out = []
    for name, (title, change) in advice.items():
        if events := log.events_named(name):
            evidence = [f"step {e.step}: {e.message[:200]}" for e in events[:3]]
            out.append(Finding("error", name, title, evidence, change, (events[0].step, events[-1].step)))
    return out


RULES = (non_finite, loss_spike, warmup, grad_explosion, early_stop, overfitting, plateau, failures)
