"""Learning rate, resuming, and the cutoff of a ChunkLM."""

from __future__ import annotations

import numpy as np

from .findings import Finding
from .runs import Log
from .series import noise, percent, tail

JUMP = 1.5  # a learning rate that grows by this factor from one line to the next was restarted
ENDS_HIGH = 0.3  # of the peak
AT_PEAK = 0.9
GONE = 0.05  # of the peak: a decay to 0 spends 1.5 % (linear, over the last 30 %) to 14 % (cosine) of its steps below
WASTED = 0.2  # of the steps


def lr_end(log: Log) -> list[Finding]:
    """A finished run whose learning rate never came down."""
    at, lr = log.series("lr")
    if len(lr) < 20 or lr.max() <= 0 or log.last_step < 0.99 * log.total_steps or log.events_named("early_stop"):
        return []
    share = float(lr[-1] / lr.max())
    if share <= ENDS_HIGH:
        return []
    known = "steps" in log.config  # else the log may be of a run that is still going on
    evidence = [f"{lr[-1]:.3g} at step {at[-1]:.0f}, {percent(share)} of the peak {lr.max():.3g}."]
    keys = {"schedule": "wsd", "decay_fraction": 0.3, "min_lr": 0.0}
    change = ["the falling rate takes the noise out", "or resume from the last checkpoint and only decay"]
    return [
        Finding(
            "warning" if known else "note",
            "lr_end",
            "The learning rate ends high",
            evidence,
            change,
            (int(at[0]), int(at[-1])),
            keys=keys,
        )
    ]


def lr_gone(log: Log) -> list[Finding]:
    """A rate that is down long before the last step, or was never up."""
    at, lr = log.series("lr", *(f"stage{i}/lr" for i in log.stages("lr")))
    if len(lr) < 20:
        return []
    span = (int(at[0]), int(at[-1]))
    if lr.max() <= 0:
        why = [f"It is {lr.max():g} at all {len(lr)} logged steps."]
        title = "The learning rate is zero"
        return [Finding("critical", "lr_gone", title, why, ["does the schedule multiply the rate?"], span)]
    up = np.flatnonzero(lr > GONE * lr.max())[-1]
    share = (at[-1] - at[up]) / max(at[-1] - at[0], 1)
    if share < WASTED:
        return []
    why = [
        f"After step {at[up]:.0f} it is under {percent(GONE)} of its peak {lr.max():.3g} to the end, step {at[-1]:.0f}"
        f": {percent(share)} of the steps next to nothing is learnt."
    ]
    _, v = log.series("ce", "loss", "bpb")
    if len(v) == len(lr):
        rest = v[up:]
        third = max(len(rest) // 3, 1)
        why.append(f"The loss there: {np.median(rest[:third]):.4g} at first, {np.median(rest[-third:]):.4g} at last.")
    change = [
        "let the schedule end with the run: does it count micro-steps, or the steps of another plan?",
        "hnet train's schedules end at `steps`",
    ]
    return [Finding("warning", "lr_gone", "The learning rate is gone long before the end", why, change, span)]


def _breaks(log: Log) -> list[int]:
    """Rows at which the log goes back in steps or says that it resumed; a roll-back by the guards is not one."""
    back = {int(i) + 1 for i in np.flatnonzero(np.diff(log.step) < 0)}
    back |= {e.row for e in log.events_named("resume") if 0 < e.row < len(log.step)}
    rolled = {e.row for e in log.events_named("rollback")}
    return sorted(i for i in back if not rolled & {i - 1, i, i + 1})


def resume(log: Log) -> list[Finding]:
    """What a resumed run did not pick up where it was: the cutoff, the learning rate, the loss, the step."""
    out = []
    breaks = _breaks(log)
    lr, cutoff = log.columns.get("lr"), log.columns.get("cutoff")
    loss = next((log.columns[n] for n in ("ce", "loss") if n in log.columns), None)
    if cutoff is not None:
        ok = np.flatnonzero(np.isfinite(cutoff))
        for a, b in zip(ok, ok[1:], strict=False):
            if cutoff[b] < cutoff[a]:
                where = (int(log.step[b]), int(log.step[b]))
                why = [f"{cutoff[a]:g} at step {log.step[a]:.0f}, {cutoff[b]:g} at step {log.step[b]:.0f}."]
                out.append(
                    Finding(
                        "critical",
                        "cutoff_regressed",
                        "The cutoff went back",
                        why,
                        ["a curriculum never lowers its cutoff: save the cutoff in the checkpoint and restore it"],
                        where,
                    )
                )
    repeated = []
    for i in breaks:
        step = int(log.step[i])
        if log.step[i] < log.step[i - 1]:
            repeated.append((step, int(log.step[i - 1])))
        if lr is not None and (change := _lr_change(log, lr, i)):
            before, after = change
            why = [f"{before:.3g} before and {after:.3g} after, around step {step}."]
            out.append(
                Finding(
                    "critical",
                    "resume_lr",
                    "Resuming changed the learning rate",
                    why,
                    ["restore the position in the schedule from the checkpoint, not only the weights"],
                    (step, step),
                )
            )
        if loss is not None:
            a, b = (x[np.isfinite(x)] for x in (loss[max(0, i - 20) : i], loss[i : i + 20]))
            if len(a) >= 5 and len(b) >= 5:
                rise = float(np.median(b[:10]) - np.median(a))
                if rise > max(4 * noise(a), 0.03 * abs(np.median(a))):
                    why = [f"median {np.median(a):.3f} before step {step}, {np.median(b[:10]):.3f} after."]
                    out.append(
                        Finding(
                            "critical",
                            "resume_loss",
                            "The loss jumped on resuming",
                            why,
                            ["save and restore optimiser, schedule, data position and random state"],
                            (step, step),
                        )
                    )
    if repeated:
        first, last = repeated[0]
        why = [f"The log goes back {len(repeated)} time{'s' * (len(repeated) > 1)}, first from step {last} to {first}."]
        out.append(
            Finding(
                "warning",
                "step_regressed",
                "Steps go back",
                why,
                [
                    "checkpoint on interruption too; truncate the log to the checkpoint on resuming",
                    "if nothing was resumed, two runs write into one log",
                ],
                (first, last),
            )
        )
    return out


def _lr_change(log: Log, lr: np.ndarray, i: int) -> tuple[float, float] | None:
    """(before, after) of a learning rate that does not go on where it was: compared at the same step where the log
    has it twice, else with the line before."""
    after = next((k for k in range(i, min(i + 10, len(lr))) if np.isfinite(lr[k])), None)
    if after is None:
        return None
    earlier = np.flatnonzero((log.step[:i] == log.step[after]) & np.isfinite(lr[:i]))
    if len(earlier):
        before = float(lr[earlier[-1]])
        return (before, float(lr[after])) if abs(lr[after] - before) > 0.02 * max(before, 1e-30) else None
    known = np.flatnonzero(np.isfinite(lr[:i]))
    if not len(known) or lr[known[-1]] <= 0:
        return None
    before = float(lr[known[-1]])
    return (before, float(lr[after])) if not 1 / JUMP < lr[after] / before < JUMP else None


def lr_restart(log: Log) -> list[Finding]:
    """A restart that lasts one step, and jumps nobody asked for."""
    at, lr = log.series("lr")
    if len(lr) < 20:
        return []
    up = [
        i
        for i in range(2, len(lr) - 1)
        if lr[i] > JUMP * lr[i - 1] and lr[i - 1] < AT_PEAK * lr[: i + 1].max() and lr[:i].max() >= 0.5 * lr.max()
    ]
    short = [i for i in up if lr[i + 1] < 1.1 * lr[i - 1]]
    out = []
    if short:
        i = short[0]
        why = [
            f"{len(short)} time{'s' * (len(short) > 1)}, first at step {at[i]:.0f}: "
            f"{lr[i - 1]:.3g}, {lr[i]:.3g}, {lr[i + 1]:.3g}."
        ]
        change = [
            "restart the position in the schedule, so that the rate decays again from its peak over the rest of the "
            "stage; `hnet train-chunk-lm` does"
        ]
        out.append(
            Finding(
                "critical",
                "lr_restart",
                "A learning-rate restart lasts one step",
                why,
                change,
                (int(at[i]), int(at[short[-1]])),
            )
        )
    known = log.events_named("lr_restart", "cutoff_raised", "rollback", "resume")
    resumed = {int(log.step[i]) for i in _breaks(log)}
    staged = "cutoff" in log.columns or "restart" in str(log.setting("schedule", default=""))
    odd = [
        i
        for i in up
        if i not in short
        and not staged
        and not resumed & set(range(int(at[i - 1]), int(at[i]) + 1))
        and not any(at[i - 1] - 1 <= e.step <= at[i] + 1 for e in known)
    ]
    if odd:
        i = odd[0]
        why = [
            f"from {lr[i - 1]:.3g} to {lr[i]:.3g} at step {at[i]:.0f}"
            + (f", {len(odd)} times." if len(odd) > 1 else ".")
        ]
        out.append(
            Finding(
                "warning",
                "lr_jump",
                "The learning rate jumps up",
                why,
                ["if no restart was meant, the run was resumed with another schedule or number of steps"],
                (int(at[i]), int(at[odd[-1]])),
            )
        )
    return out


def cutoff_raises(log: Log) -> list[Finding]:
    """After a raise the learning rate must be at its peak, and the loss back within an epoch."""
    at, cutoff = log.series("cutoff")
    raises = [(at[i], cutoff[i - 1], cutoff[i]) for i in range(1, len(at)) if cutoff[i] > cutoff[i - 1]]
    lr_at, lr = log.series("lr")
    loss_at, loss = log.series("ce", "loss")
    epoch = log.number("steps_per_epoch", default=_epoch_length(log))
    low, slow = [], []
    for n, (step, old, new) in enumerate(raises):
        name = f"{old:g} -> {new:g} at step {step:.0f}"
        rate = lr[lr_at >= step][:1]
        if len(rate) and rate[0] < AT_PEAK * lr.max():
            low.append(
                (
                    step,
                    f"{name}: learning rate {rate[0]:.3g}, {percent(rate[0] / lr.max())} of the peak {lr.max():.3g}.",
                )
            )
        until = min(step + epoch, raises[n + 1][0] if n + 1 < len(raises) else np.inf)
        before, after = loss[loss_at < step][-50:], loss[(loss_at >= step) & (loss_at < until)]
        if len(before) < 3 or len(after) < 3 or loss_at[-1] < step + epoch:
            continue
        k = min(10, len(after))
        best = min(float(np.median(after[i : i + k])) for i in range(len(after) - k + 1))
        usual = float(np.median(tail(before, 0.4)))
        if best > usual * 1.005 + noise(before) * 2 / np.sqrt(k):
            slow.append((step, f"{name}: {usual:.3f} before, {best:.3f} at best within {epoch:.0f} steps."))
    out = []
    if low:
        change = ["restart the learning rate at every raise and let it decay from there (schedule restarts)"]
        out.append(
            Finding(
                "warning",
                "cutoff_lr",
                "The cutoff was raised while the learning rate was not at its peak",
                [t for _, t in low],
                change,
                (int(low[0][0]), int(low[-1][0])),
            )
        )
    if slow:
        change = [
            "raise later (smaller plateau_threshold, larger plateau_window), or in smaller steps of the cutoff",
            "restart the learning rate at the raise",
        ]
        out.append(
            Finding(
                "warning",
                "cutoff_loss",
                "The loss had not recovered an epoch after a raise of the cutoff",
                [t for _, t in slow],
                change,
                (int(slow[0][0]), int(slow[-1][0])),
            )
        )
    return out


def _epoch_length(log: Log) -> float:
    """Steps of an epoch: as the log counts them, else from its epoch column, else 1000."""
    _, counted = log.series("steps_per_epoch")
    if len(counted):
        return float(counted[0])
    at, epoch = log.series("epoch")
    starts = at[1:][np.floor(epoch[1:]) > np.floor(epoch[:-1])]
    return float(np.median(np.diff(starts))) if len(starts) >= 2 else 1000.0


RULES = (lr_end, lr_gone, resume, lr_restart, cutoff_raises)
