"""What a config alone shows, before any step is run. Keys it lacks are not judged, unknown ones are ignored."""

from __future__ import annotations

from typing import Any

import numpy as np

from hnet.train.compression import auto_ratio_weight

from .architecture import multipliers_of, parameters_of
from .findings import Finding
from .runs import Log
from .series import percent
from .thresholds import row, threshold
from .training import PATIENCE


def schedule(log: Log) -> list[Finding]:
    out = []
    steps, warm, decay = log.number("steps"), log.number("warmup_steps"), log.number("decay_fraction", default=0)
    kind = log.setting("schedule", default="")
    if warm >= steps > 0:
        out.append(
            Finding(
                "critical",
                "warmup_all",
                "The warm-up is as long as the run",
                [f"warmup_steps is {warm:g}, steps is {steps:g}: the peak learning rate is never reached."],
                keys={"warmup_steps": max(round(0.05 * steps), 1)},
            )
        )
    elif kind == "wsd" and warm + decay * steps > steps > 0:
        out.append(
            Finding(
                "warning",
                "warmup_decay",
                "Warm-up and decay overlap",
                [f"warmup_steps {warm:g} + decay_fraction {decay:g} x steps {steps:g} is more than steps."],
                ["or a smaller warmup_steps"],
                keys={"decay_fraction": float(f"{max(1 - warm / steps, 0):.2g}")},
            )
        )
    if len(log.step):  # the log itself shows where the rate ended
        return out
    if kind == "constant":
        out.append(
            Finding(
                "warning",
                "lr_end",
                "The learning rate never decays",
                ["schedule is constant."],
                ["wsd decays over the last part"],
                keys={"schedule": "wsd"},
            )
        )
    elif log.number("min_lr", default=0) > 0.3:
        out.append(
            Finding(
                "warning",
                "lr_end",
                "The learning rate ends high",
                [f"min_lr is {percent(log.number('min_lr'))} of the peak."],
                ["or up to 0.1"],
                keys={"min_lr": 0.0},
            )
        )
    return out


def learning_rate(log: Log) -> list[Finding]:
    out = []
    lr, multipliers = log.number("learning_rate", "lr"), log.setting("lr_multipliers")
    high = {"adamw": 4e-3, "muon": 3e-2}.get(str(log.setting("optimizer", default="adamw")), np.inf)
    numbers = isinstance(multipliers, list) and all(isinstance(m, (int, float)) for m in multipliers)
    top = max(multipliers) if numbers and multipliers else 1.0
    if lr * top > high:
        peak = f"learning_rate {lr:g}" + (f" x multiplier {top:g}" if top != 1 else "") + f" is above {high:g}"
        out.append(
            Finding(
                "warning",
                "lr_high",
                "High learning rate",
                [f"{peak}, for {log.setting('optimizer', default='adamw')}."],
                keys={"learning_rate": float(f"{high / top / 2:.2g}")},
            )
        )
    limit, kind = log.setting("max_grad_norm"), str(log.setting("clip", "clipping", default="norm"))
    if kind in ("off", "none") or (limit == 0 and kind != "adaptive"):
        out.append(
            Finding(
                "warning",
                "no_clipping",
                "Gradients are not clipped",
                [f"max_grad_norm is {limit}, clipping {kind}."],
                keys={"clipping": "norm", "max_grad_norm": 1.0},
            )
        )
    return out


def optimiser(log: Log) -> list[Finding]:
    """Weight decay that outruns learning, moments that forget too soon, dropout of most of the network."""
    out = []
    decay, lr, multipliers = log.number("weight_decay"), log.number("learning_rate", "lr"), multipliers_of(log)
    shrink = decay * lr * max(multipliers, default=1.0)  # share of a matrix that goes in a step at the peak
    if shrink > threshold("decay"):
        half = np.log(2) / shrink
        why = [
            f"weight_decay {decay:g} x learning rate {lr * max(multipliers, default=1.0):.3g}: at the peak matrices "
            f"lose half of what they hold in {half:.0f} steps. The product is {shrink:.2g}; {row('decay').source}."
        ]
        keys: dict[str, Any] = {"weight_decay": 0.1}
        title = "Weights decay faster than they can learn"
        out.append(Finding("warning", "weight_decay", title, why, keys=keys))
    betas = log.setting("betas")
    if not isinstance(betas, list):
        betas = [log.setting("beta1"), log.setting("beta2")]
    if len(betas) == 2 and all(isinstance(b, (int, float)) for b in betas) and str(log.setting("optimizer")) != "muon":
        first, second = betas
        wrong = []
        if first > second:
            wrong.append("the second moment forgets sooner than the first: they are usually the other way round")
        elif second < 0.9:
            wrong.append(f"the second moment is an average of {1 / (1 - second):.0f} steps, its root mostly noise")
        if first > 0.98:
            wrong.append(f"the first moment averages {1 / (1 - min(first, 1 - 1e-9)):.0f} steps: updates come late")
        if wrong:
            why = [f"betas are {first:g} and {second:g}: {'; '.join(wrong)}."]
            keys = {"betas": [0.9, 0.95]}
            out.append(Finding("warning", "betas", "Unusual moments of the optimiser", why, keys=keys))
    rate = log.number("dropout")
    if rate > 0.5:
        why = [f"dropout is {rate:g}: {percent(rate)} of every mixer's and MLP's output is dropped at every step."]
        out.append(Finding("warning", "dropout", "Most of the network is dropped", why, keys={"dropout": 0.1}))
    return out


def compression(log: Log) -> list[Finding]:
    """Too weak a ratio loss for the size of the model; targets out of the usual range."""
    alpha, targets = log.number("ratio_weight"), log.setting("compression")
    controlled = str(log.setting("rate_control", default="none")) not in ("none", "", "False")
    size = parameters_of(log)
    out = []
    if np.isfinite(alpha) and size > 0 and not controlled:
        needed = auto_ratio_weight(round(size))
        if alpha < needed / 4:
            why = [
                f"ratio_weight is {alpha:g} for {size / 1e6:.3g}M parameters; reaching a target within 5 % takes "
                f"about {needed:.2g} (an inference from published and own runs)."
            ]
            out.append(
                Finding(
                    "warning",
                    "ratio_weight",
                    "Weak ratio loss",
                    why,
                    ["or rate_control bias"],
                    keys={"ratio_weight": float(f"{needed:.2g}")},
                )
            )
        if alpha > 10 * needed:
            why = [
                f"ratio_weight is {alpha:g} for {size / 1e6:.3g}M parameters, where about {needed:.2g} reaches a "
                "target within 5 %: the gradient of the outer stages is mostly the ratio loss's."
            ]
            keys = {"ratio_weight": float(f"{needed:.2g}")}
            out.append(Finding("warning", "ratio_weight", "Overbearing ratio loss", why, keys=keys))
    numbers = isinstance(targets, list) and all(isinstance(t, (int, float)) for t in targets)
    if numbers and any(t > 16 or t < 1.5 for t in targets):
        out.append(
            Finding(
                "note",
                "target_range",
                "Unusual compression target",
                [f"compression is {targets}; 3 to 8 positions a chunk of a stage are tried and tested."],
                ["more stages rather than a larger target"],
            )
        )
    return out


def evaluation(log: Log) -> list[Finding]:
    out = []
    patience = log.number(*PATIENCE)
    if 0 < patience < 5:
        out.append(
            Finding(
                "warning",
                "patience",
                "Short patience",
                [f"patience is {patience:g} evaluations; their noise alone stops a run after so few."],
                keys={"patience": 10},
            )
        )
    metric = str(log.setting("early_stop_metric", "early_stopping_metric", "monitor", default=""))
    if metric in ("loss", "val_loss", "total_loss"):
        out.append(
            Finding(
                "critical",
                "early_stop_metric",
                "Early stopping on cross entropy + ratio loss",
                [f"the metric is {metric!r}; the ratio loss in it says nothing about the model's text."],
                ["stop on val_ce"],
            )
        )
    held_out = log.number("eval_bytes")
    if held_out < 16384:
        out.append(
            Finding(
                "note",
                "eval_bytes",
                "Small evaluations",
                [f"eval_bytes is {held_out:g}: evaluations will be noisy."],
                ["or more"],
                keys={"eval_bytes": 65536},
            )
        )
    steps, every = log.number("steps"), log.number("eval_every")
    if every > steps / 4:
        out.append(
            Finding(
                "note",
                "eval_every",
                "Few evaluations",
                [f"eval_every is {every:g} of {steps:g} steps: over-fitting would go unseen."],
                keys={"eval_every": max(round(steps / 20), 1)},
            )
        )
    return out


def zero_grad(log: Log) -> list[Finding]:
    """Another trainer's key for when gradients are zeroed."""
    every, micro = log.number("zero_grad_every"), log.number("accumulation", default=1)
    if not every > micro:
        return []
    why = [
        f"zero_grad_every is {every:g} micro-steps, an update is made every {micro:g}: gradients of old steps stay in."
    ]
    change = ["zero the gradients after every update; in hnet train there is nothing to set"]
    return [Finding("critical", "zero_grad", "Gradients are zeroed at other steps than the updates", why, change)]


def leak(log: Log) -> list[Finding]:
    """Packing by a config that does not say how documents are kept apart. Our trainer always passes cu_seqlens."""
    packing, apart = log.setting("packing"), log.setting("cu_seqlens")
    if not packing or str(packing).lower() in ("false", "none", "no", "off") or (apart and apart != "none"):
        return []
    said = "says that they are not kept apart" if apart is not None else "does not name cu_seqlens or a document mask"
    why = [
        f"packing is {packing} and the config {said}: attention, convolutions, states, the EMA and routing then run "
        "from one document into the next.",
        "A log of losses cannot show it; the model and its loader can.",
    ]
    change = [
        "pass cu_seqlens of every pack to the model (hnet train does), and test it: perturb one document, the logits "
        "of the others must not move"
    ]
    sure = "high" if apart is not None else "low"
    title = "Packed documents see each other" if apart is not None else "Packed documents may see each other"
    severity = "critical" if apart is not None else "warning"
    return [Finding(severity, "leak", title, why, change, confidence=sure)]


def joined(log: Log) -> list[Finding]:
    """Sequences, as the outermost router counted them, that are longer than the loader makes them."""
    length = log.number("seq_len")
    at, chunk = log.series("stage0/bytes_per_chunk")
    also_at, chunks = log.series("stage0/chunks_per_sequence")
    at, here, there = np.intersect1d(at, also_at, return_indices=True)
    chunk, chunks = chunk[here], chunks[there]
    if not length > 0 or not len(at):
        return []
    seen = float(np.median(chunk * chunks))
    if seen <= 1.05 * length:
        return []
    why = [
        f"{np.median(chunks):.4g} chunks a sequence of {np.median(chunk):.3g} positions are sequences of {seen:,.0f} "
        f"positions, and seq_len is {length:g}: the model was told of fewer documents than a pack holds."
    ]
    change = ["pass cu_seqlens of every pack to the model, with a sequence for each document"]
    span = (int(at[0]), int(at[-1]))
    title = "Packed documents see each other"
    return [Finding("critical", "leak", title, why, change, span, confidence="high")]


def sampling(log: Log) -> list[Finding]:
    """Where the config says how text is sampled."""
    t, p, penalty = (log.number(k) for k in ("temperature", "top_p", "repetition_penalty"))
    if not (t >= 1 or p >= 1) or t < 0.95 or p < 0.95:
        return []
    given = {"temperature": t, "top_p": p, "repetition_penalty": penalty}
    why = [
        ", ".join(f"{k} {v:g}" for k, v in given.items() if np.isfinite(v))
        + ("" if penalty > 1 else ", no repetition penalty")
        + ": every unlikely byte is drawn as often as the model thinks, and one derails what follows."
    ]
    new: dict[str, object] = {"temperature": 0.8, "top_p": 0.9, "max_new_bytes": 2048}
    new |= {} if penalty > 1 else {"repetition_penalty": 1.1}
    change = ["then measure samples instead of reading a few"]
    return [Finding("warning", "sampling", "Text is sampled too hot", why, change, sampling=new)]


RULES = (schedule, learning_rate, optimiser, compression, evaluation, zero_grad, leak, joined, sampling)
