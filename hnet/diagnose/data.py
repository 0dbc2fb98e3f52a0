"""Data: passes over it, batch size, the held-out split, and whether it arrives in time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hnet.data.files import find_files
from hnet.errors import UserError

from .architecture import parameters_of
from .findings import Finding
from .runs import Log
from .series import noise, percent, tail

MANY_PASSES = 10
NOISY = 0.1  # scatter of the training loss from step to step, as a share of it
FEW, ENOUGH = 4, 8  # sequences in the batch of an update
SLOWER = 0.7
WAIT = 0.1
SHIFT = 0.15


def files_of(log: Log, key: str) -> list[Path]:
    """Files a config names under `key`, [] where they cannot be found from here."""
    given = log.setting(key, default=[])
    given = [given] if isinstance(given, str) else given
    if isinstance(given, list):  # of a mixture
        given = [g.get("path") if isinstance(g, dict) else g for g in given]
    if not isinstance(given, list) or not all(isinstance(g, str) for g in given):
        return []
    try:
        return list(find_files(given, str(log.setting("pattern", default="*")), log.setting("exclude", default=[])))
    except (UserError, TypeError):  # another trainer's exclude may be anything
        return []


def data_files(log: Log) -> list[Path]:
    """Files of the training data that can be found from here."""
    return files_of(log, "data")


def _data_bytes(log: Log) -> float:
    """Bytes of the training files as they lie on the disk; 0 where unknown, or packed so that this says little."""
    files = files_of(log, "data")
    if any(p.suffix in (".gz", ".zst", ".parquet", ".jsonl") for p in files):
        return 0.0
    return float(sum(p.stat().st_size for p in files))


def passes(log: Log) -> list[Finding]:
    size = _data_bytes(log)
    if size and not log.setting("val_data"):
        size *= 1 - log.number("val_fraction", default=0.0)
    _, seen = log.series("bytes")
    planned = log.number("steps") * log.number("batch_bytes")
    total = float(seen[-1]) if len(seen) else planned
    _, epoch = log.series("epoch")
    if size > 0 and np.isfinite(total):
        count, what = total / size, f"{total:.3g} bytes over {size:.3g} bytes of training data"
    elif len(epoch) and "cutoff" not in log.columns:  # a ChunkLM's epoch is a number of steps, not a pass
        count, what = float(epoch.max()), f"the log ends in epoch {epoch.max():.3g}"
    else:
        return _few_bytes(log, total)
    if count > MANY_PASSES:
        _, v = log.series("val_ce", "val_bpb")
        worse = len(v) > 3 and v[-1] > 1.01 * v.min()
        held_out = " The held-out loss is past its best." if worse else ""
        return [
            Finding(
                "warning",
                "many_passes",
                f"{count:.0f} passes over the data",
                [f"{what}.{held_out}"],
                ["more data, or fewer steps", "weight_decay 0.1, dropout"],
                (0, log.last_step) if len(log.step) else None,
                keys={"patience": 10},
            )
        ]
    return _few_bytes(log, total) or (_part(count, what) if size > 0 else [])


def _part(count: float, what: str) -> list[Finding]:
    if count >= 0.5:
        return []
    return [
        Finding(
            "note",
            "few_passes",
            f"Only {percent(count)} of the data is seen",
            [f"{what}."],
            ["more steps, or a larger batch_bytes, if time allows"],
        )
    ]


def _few_bytes(log: Log, total: float) -> list[Finding]:
    size = parameters_of(log)
    if not total > 0 or "steps" not in log.config or not total < 2 * size:
        return []
    return [
        Finding(
            "note",
            "few_bytes",
            "Few training bytes for the model",
            [f"{total:.3g} bytes for {size:.3g} parameters; compute-optimal runs see tens of bytes for each."],
            ["more steps, or a smaller preset"],
        )
    ]


def _sequences(log: Log) -> float:
    """In the batch of an update, NaN where the config does not say. Another trainer may have several devices."""
    size, length = log.number("batch_bytes"), log.number("seq_len")
    if size > 0 and length > 0:
        return size / length
    return log.number("batch_size") * log.number("accumulation", default=1)


def batch(log: Log) -> list[Finding]:
    """Judged by the scatter of the loss; where there are few sequences in a batch, by less of it."""
    at, v = log.series("ce", "bpb", "loss")
    size, length, sequences = log.number("batch_bytes"), log.number("seq_len"), _sequences(log)
    held = f"an update has {sequences:.3g} sequence{'s' * (sequences != 1)}"
    held += f" of {length:g}." if np.isfinite(length) else "."
    if len(v) >= 100:
        last = v[len(v) // 2 :]
        scatter = noise(last) / max(abs(float(np.median(last))), 1e-12)
        few = sequences < FEW and scatter > NOISY / 2
        if scatter <= NOISY and not few:
            return []
        factor = 2 ** int(np.ceil(np.log2(max((scatter / (NOISY / 2)) ** 2, ENOUGH / sequences if few else 1))))
        why = [f"the training loss scatters by {percent(scatter)} from step to step over the second half."]
        if np.isfinite(sequences):
            why.append(held[0].upper() + held[1:])
        keys = {"batch_bytes": round(size * factor)} if np.isfinite(size) else {}
        change = [f"a batch {factor} times as large (scatter falls with its root), or accumulate gradients"]
        span = (int(at[len(v) // 2]), int(at[-1]))
        title = "The batch is too small for its noise"
        mild = sequences >= ENOUGH and scatter <= 1.5 * NOISY  # documents differ
        return [Finding("note" if mild else "warning", "small_batch", title, why, change, span, keys=keys)]
    if sequences < ENOUGH:
        keys = {"batch_bytes": round(ENOUGH * length)} if size > 0 else {}
        return [Finding("note", "small_batch", "Few sequences in a batch", [held], ["or more"], keys=keys)]
    return []


def split(log: Log) -> list[Finding]:
    """Held-out data that is trained on, the tail of the corpus, or of another kind than the training data."""
    out = []
    train, held_out = files_of(log, "data"), files_of(log, "val_data")
    shared = {p.resolve() for p in train} & {p.resolve() for p in held_out}
    if shared:
        names = ", ".join(sorted(str(p) for p in shared)[:3])
        out.append(
            Finding(
                "critical",
                "split_overlap",
                "Held-out files are trained on",
                [f"{len(shared)} files are in data and in val_data: {names}."],
                ["take them out of data (exclude), or leave val_data empty for a random split by document"],
            )
        )
    for a in train if len(train) * len(held_out) <= 100 else []:
        for b in held_out:
            if a.resolve() != b.resolve() and _is_tail(a, b):
                out.append(
                    Finding(
                        "critical",
                        "split_overlap",
                        "The held-out file is the tail of a training file",
                        [f"{a} ends with the {b.stat().st_size} bytes of {b}."],
                        ["cut them from the training file, better: hold out documents at random"],
                    )
                )
    way = str(log.setting("split", "val_split", "split_by", default=""))
    if way in ("tail", "contiguous", "last", "end"):
        out.append(
            Finding(
                "warning",
                "split_tail",
                "The tail of the corpus is held out",
                [f"the split is {way!r}."],
                ["hold out documents at random: the tail is one author, one date or one topic"],
            )
        )
    return out or _shift(log)


def _is_tail(whole: Path, part: Path) -> bool:
    size, have = part.stat().st_size, whole.stat().st_size
    if not 0 < size < have or size < 256:
        return False
    ends = []
    for path, at in ((whole, have - size), (part, 0)):
        with path.open("rb") as f:
            f.seek(at)
            first = f.read(4096)
            f.seek(-min(4096, size), 2)
            ends.append((first, f.read()))
    return ends[0] == ends[1]


def _shift(log: Log) -> list[Finding]:
    """A held-out loss far above the training loss before anything can have been learnt by heart."""
    size = _data_bytes(log)
    at, seen = log.series("bytes")
    if not size or not len(seen):
        return []
    names = ("ce", "val_ce") if "val_ce" in log.columns and "ce" in log.columns else ("bpb", "val_bpb")
    train_at, train = log.series(names[0])
    val_at, val = log.series(names[1])
    for step, v in zip(val_at, val, strict=True):
        count = float(np.interp(step, at, seen)) / size
        near = train[np.abs(train_at - step) <= max(25, 0.02 * log.last_step)]
        if step == 0 or count > 1 or len(near) < 10:
            continue
        gap = v / float(np.median(near)) - 1
        if gap <= SHIFT:
            continue
        if float(np.interp(val_at[-1], at, seen)) / size < 1 and val[-1] > 1.1 * val.min():
            return _repeated(val_at, val, train, float(np.interp(val_at[-1], at, seen)) / size)
        why = [
            f"At step {step:.0f}, after {count:.2f} passes, held out {v:.3f} and training {np.median(near):.3f} "
            f"({names[1]}, {names[0]}): {percent(gap)} apart before anything could be learnt by heart."
        ]
        change = ["is it the tail of the corpus, or another source? Leave val_data empty: documents at random"]
        title = "The held-out text differs in kind from the training text"
        return [Finding("warning", "split_shift", title, why, change, (int(step), int(step)))]
    return []


def _repeated(at: np.ndarray, val: np.ndarray, train: np.ndarray, count: float) -> list[Finding]:
    """Learnt by heart what cannot have been seen twice."""
    best = int(np.argmin(val))
    why = [
        f"After {count:.2f} passes over the data the training loss is {np.median(tail(train)):.3f}, and the held-out "
        f"one {val[-1]:.3f}, up from {val[best]:.3f} at step {at[best]:.0f}: text is learnt by heart that should have "
        "come once."
    ]
    change = [
        "does the loader go on from step to step (an iterator made anew begins anew, a seed set anew draws the same)?",
        "are there copies in the data?",
    ]
    span = (int(at[best]), int(at[-1]))
    return [Finding("critical", "same_batch", "The same batches come again and again", why, change, span)]


def order(log: Log) -> list[Finding]:
    """Sequences that get longer or shorter over the run: the data are not shuffled. Their length is what the outermost
    router counted."""
    at, chunk = log.series("stage0/bytes_per_chunk")
    also_at, chunks = log.series("stage0/chunks_per_sequence")
    at, here, there = np.intersect1d(at, also_at, return_indices=True)
    length = chunk[here] * chunks[there]
    if len(length) < 40:
        return []
    ends = [float(np.median(length[: len(length) // 5])), float(np.median(length[-(len(length) // 5) :]))]
    rank = np.argsort(np.argsort(length))
    trend = float(np.corrcoef(rank, np.arange(len(rank)))[0, 1])  # Spearman's
    if abs(trend) < 0.8 or max(ends) < 1.5 * min(ends):
        return []
    why = [
        f"Sequences are {ends[0]:.3g} positions long in the first fifth of the log and {ends[1]:.3g} in the last, and "
        f"go {'up' if trend > 0 else 'down'} all the way (rank correlation with the step {trend:+.2f})."
    ]
    change = ["shuffle documents before packing; what comes late is learnt at a low rate, what came early is forgotten"]
    title = "The data come in an order: sequences of one length together"
    return [Finding("warning", "data_order", title, why, change, (int(at[0]), int(at[-1])))]


def throughput(log: Log) -> list[Finding]:
    out = []
    at, speed = log.series("bytes_per_second", "tokens_per_second")
    unit = "bytes" if "bytes_per_second" in log.columns else "tokens"
    if not len(speed):
        at, ms = log.series("step_ms")
        speed, unit = 1e3 / np.maximum(ms, 1e-9), "steps"
    if len(speed) >= 40:
        at, speed = at[len(speed) // 20 :], speed[len(speed) // 20 :]  # compiling and warming caches
        window = max(len(speed) // 10, 10)
        medians = np.array([np.median(speed[i : i + window]) for i in range(0, len(speed) - window + 1, window)])
        best = int(np.argmax(medians))
        later = medians[best:]
        if later.min() < SLOWER * medians[best] and len(later) > 1:
            worst = best + int(np.argmin(later))
            lasting = medians[-1] < SLOWER * medians[best]
            where = f"steps {at[worst * window]:.0f} to {at[min((worst + 1) * window, len(at)) - 1]:.0f}"
            why = [
                f"{medians[best]:.4g} {unit}/s around step {at[best * window]:.0f}, {medians[worst]:.4g} over {where} "
                f"({percent(later.min() / medians[best] - 1)}); {'it stayed slow' if lasting else 'it came back'}."
            ]
            change = [
                "another process on the machine, thermal throttling, or a slow disk",
                "rising F means more inner positions a byte: look at the compression plot",
            ]
            out.append(
                Finding(
                    "warning" if lasting else "note",
                    "slow",
                    "Throughput dropped",
                    why,
                    change,
                    (int(at[worst * window]), int(at[-1])),
                )
            )
    share_at, share = log.series("data_wait_share")
    if not len(share):
        share_at, wait = log.series("data_wait")
        _, ms = log.series("step_ms")
        time_at, time = log.series("time")
        if len(ms) == len(wait) and len(wait):
            share = wait / np.maximum(ms / 1e3, 1e-9)
        elif len(wait) > 1 and len(time) > 1:
            share = np.array([wait[1:].mean() * (time_at[-1] - time_at[0]) / max(time[-1] - time[0], 1e-9)])
    if len(share) and (mean := float(np.median(tail(share, 0.8)))) > WAIT:
        out.append(
            Finding(
                "warning",
                "data_wait",
                "Steps wait for data",
                [f"{percent(mean)} of the step's time."],
                ["more worker processes, local or uncompressed files"],
                (int(share_at[0]), int(share_at[-1])),
            )
        )
    return out


RULES = (passes, batch, split, order, throughput)
