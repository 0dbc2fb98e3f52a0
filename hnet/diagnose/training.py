"""The loss: non-finite values, spikes, the end of a run, early stopping, over-fitting, plateaus."""

from __future__ import annotations

import numpy as np

from hnet.plots.run import smooth

from .findings import Finding
from .runs import Log
from .series import episodes, noise, percent, slope, tail, trailing_median
from .thresholds import threshold

LOSS = ("ce", "bpb", "loss")
VAL = ("val_ce", "val_bpb")
PATIENCE = ("patience", "early_stop_patience", "early_stopping_patience")
UNTRAINED, LEARNT = 4.0, 0.01  # nats of a model that is not trained, at least; and the share a run must take off
IMPOSSIBLE = 0.2  # nats
SPIKE_SIGMA, SPIKE_SHARE = 8.0, 0.25  # a spike is this far above the median before it, in noise and in the loss


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
    rate = log.number("learning_rate")
    keys = {"learning_rate": float(f"{rate / 2:.2g}")} if rate > 0 else {}
    change = [
        "a learning_rate 2 to 4 times lower, or a longer warmup_steps",
        'dtype = "fp32" for a few hundred steps tells overflow from divergence',
        "max_grad_norm = 1.0 if clipping is off",
    ]
    return [
        Finding(
            "warning" if recovered else "critical",
            "non_finite",
            "Loss or gradient was not finite",
            evidence,
            change,
            (seen[0], seen[-1]),
            keys=keys,
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
    rate = log.number("learning_rate")
    keys = {"learning_rate": float(f"{threshold('lr_advice') * rate:.2g}")} if rate > 0 else {}
    change = ["a lower learning_rate, or clip harder (max_grad_norm)", "look at the documents of that step"]
    if lost:
        change.insert(
            0, f"go back to a checkpoint before step {steps[worst[0]]:.0f} and resume with a lower learning_rate"
        )
    return [
        Finding(
            "critical" if lost else "warning",
            "loss_spike",
            "Loss spike" + (" the run never recovered from" if lost else ""),
            evidence,
            change,
            (int(steps[found[0][0]]), int(steps[found[-1][1]])),
            keys=keys,
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
                "critical",
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
        change = ["a larger eval_bytes makes evaluations less noisy"]
        title = "Stopped early on the noise of the evaluations"
        keys = {"patience": max(wanted, 10)}
        return [Finding("warning", "early_stop_noise", title, evidence, change, span, keys=keys)]
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
    change = [f"keep the checkpoint of step {at[best]:.0f}; stop there", "more data, or fewer steps"]
    keys = {"patience": 10, "dropout": 0.1} if not log.number("dropout", default=0) else {"patience": 10}
    span = (int(at[best]), int(at[-1]))
    return [Finding("warning", "overfitting", "Over-fitting", evidence, change, span, keys=keys)]


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
        change.insert(0, "let the learning rate decay now, or plan a shorter run: most of the rest comes then")
    keys = {"schedule": "wsd"} if log.setting("schedule") == "constant" else {}
    span = (int(at[start]), int(at[-1]))
    return [Finding("warning", "plateau", "The loss is flat", evidence, change, span, keys=keys)]


def not_learning(log: Log) -> list[Finding]:
    """A loss that stays where an untrained model's is."""
    at, v = log.series("ce", "loss", "bpb")
    begun = len(at) >= 60 and at[0] <= 10 * float(np.median(np.diff(at)))  # a part of a log shows less
    if not begun or log.setting("init_from"):
        return []
    first, last = float(np.median(v[:5])), float(np.median(tail(v)))
    nats = first * (np.log(2) if "ce" not in log.columns and "loss" not in log.columns else 1)
    if nats < UNTRAINED or last < (1 - LEARNT) * first:
        return []
    why = [f"{first:.4g} at first and {last:.4g} over the last tenth, {len(at):,} logged steps later."]
    _, lr = log.series("lr", *(f"stage{i}/lr" for i in log.stages("lr")))
    if len(lr):
        why.append(f"The learning rate peaks at {lr.max():.3g}.")
    _, g = log.series("grad_norm")
    if len(g):
        why.append(f"The gradient norm is {np.median(g):.3g} (median).")
    change = [
        "is the learning rate what it should be (about 1e-3 for AdamW at 10M parameters, 3e-4 at 1B)?",
        "are all parameters in the optimiser, do gradients arrive, and do targets belong to their inputs?",
    ]
    rate = log.number("learning_rate")
    keys = {"learning_rate": 1e-3} if 0 < rate < 1e-5 else {}
    span = (int(at[0]), int(at[-1]))
    return [Finding("critical", "not_learning", "The model does not learn", why, change, span, keys=keys)]


def too_good(log: Log) -> list[Finding]:
    """A held-out loss that no model of text reaches."""
    at, v = log.series(*VAL)
    at, v = at[at > 0], v[at > 0]
    nats = v * (np.log(2) if "val_ce" not in log.columns else 1)
    if not len(v) or not nats[-1] < IMPOSSIBLE:
        return []
    why = [
        f"Held out {nats[-1]:.3g} nats at step {at[-1]:.0f}; the best models of text stay above 0.4 nats a byte, and a "
        "token has several bytes."
    ]
    change = [
        "does the model see what it predicts (targets not shifted, attention not causal)?",
        "is held-out text trained on, or does one document fill it?",
    ]
    title = "The held-out loss is too good to be true"
    return [Finding("critical", "too_good", title, why, change, (int(at[0]), int(at[-1])))]


def unfinished(log: Log) -> list[Finding]:
    """The log ends before the steps that were planned, and nothing stopped it early."""
    planned, last = log.planned_steps, log.last_step
    if not planned or not len(log.step) or last >= 0.99 * planned or log.events_named("early_stop"):
        return []
    evidence = [f"{last:,} of {planned:,} steps ({percent(last / planned)})."]
    _, v = log.series(*LOSS)
    if len(v) >= 40:
        part = v[len(v) * 3 // 4 :]
        per, error = slope(part)
        gained = -per * len(part)
        if per < -2 * error:
            evidence.append(f"The loss still fell: by {gained:.3g} over the last quarter of the log, to {v[-1]:.4g}.")
        else:
            evidence.append(f"The loss changed by {-gained:+.2g} over the last quarter of the log, to {v[-1]:.4g}.")
    _, lr = log.series("lr", *(f"stage{i}/lr" for i in log.stages("lr")))
    if len(lr) and lr.max() > 0:
        evidence.append(
            f"The learning rate ends at {percent(float(lr[-1] / lr.max()))} of its peak, before what a decay gains."
        )
    change = [
        "resume from the last checkpoint (hnet train --resume --out RUN), to the end of its schedule",
        f"or plan what can be afforded: --steps {last} with its decay inside",
    ]
    title = f"The run ended at {percent(last / planned)} of its steps"
    return [Finding("warning", "unfinished", title, evidence, change, (last, planned))]


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
            out.append(Finding("critical", name, title, evidence, change, (events[0].step, events[-1].step)))
    return out


RULES = (non_finite, loss_spike, not_learning, too_good, unfinished, early_stop, overfitting, plateau, failures)
