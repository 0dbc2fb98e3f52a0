"""What a config alone shows, before any step is run. Keys it lacks are not judged, unknown ones are ignored."""

from __future__ import annotations

import numpy as np

from hnet.model.parameters import count_parameters
from hnet.train.compression import auto_ratio_weight

from .architecture import model_of
from .findings import Finding
from .runs import Log
from .series import percent
from .training import PATIENCE


def schedule(log: Log) -> list[Finding]:
    out = []
    steps, warm, decay = log.number("steps"), log.number("warmup_steps"), log.number("decay_fraction", default=0)
    kind = log.setting("schedule", default="")
    if warm >= steps:
        out.append(
            Finding(
                "error",
                "warmup_all",
                "The warm-up is as long as the run",
                [f"warmup_steps is {warm:g}, steps is {steps:g}: the peak learning rate is never reached."],
                [f"--warmup-steps {max(round(0.05 * steps), 1)}"],
            )
        )
    elif kind == "wsd" and warm + decay * steps > steps:
        out.append(
            Finding(
                "warning",
                "warmup_decay",
                "Warm-up and decay overlap",
                [f"warmup_steps {warm:g} + decay_fraction {decay:g} x steps {steps:g} is more than steps."],
                ["a smaller decay_fraction or warmup_steps"],
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
                ["--schedule wsd: decays over the last part"],
            )
        )
    elif log.number("min_lr", default=0) > 0.3:
        out.append(
            Finding(
                "warning",
                "lr_end",
                "The learning rate ends high",
                [f"min_lr is {percent(log.number('min_lr'))} of the peak."],
                ["--min-lr 0 to 0.1"],
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
                ["lower learning_rate"],
            )
        )
    if numbers and len(multipliers) > 1:
        if any(b > a for a, b in zip(multipliers, multipliers[1:], strict=False)):
            out.append(
                Finding(
                    "warning",
                    "lr_multipliers",
                    "Learning-rate multipliers grow inwards",
                    [
                        f"lr_multipliers is {multipliers}, outermost first; inner stages see fewer, longer units "
                        "and are wider, and take a lower rate."
                    ],
                    [f"--lr-multipliers {','.join(f'{m:g}' for m in sorted(multipliers, reverse=True))}"],
                )
            )
        elif top > 4 * min(multipliers):
            out.append(
                Finding(
                    "note",
                    "lr_multipliers",
                    "Far apart learning-rate multipliers",
                    [
                        f"lr_multipliers is {multipliers}; the paper's rule, sqrt(bytes per unit x width ratio), "
                        "gives 2 to 3 outside."
                    ],
                    ["watch stage0/grad_norm"],
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
                ["--clipping norm --max-grad-norm 1.0"],
            )
        )
    return out


def compression(log: Log) -> list[Finding]:
    """Too weak a ratio loss for the size of the model; targets out of the usual range."""
    alpha, targets = log.number("ratio_weight"), log.setting("compression")
    controlled = str(log.setting("rate_control", default="none")) not in ("none", "", "False")
    model = model_of(log)
    out = []
    if np.isfinite(alpha) and model is not None and not controlled:
        size = count_parameters(model)
        needed = auto_ratio_weight(size)
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
                    [f"--ratio-weight {needed:.2g}", "or --rate-control bias"],
                )
            )
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
                ["--patience 10"],
            )
        )
    metric = str(log.setting("early_stop_metric", "early_stopping_metric", "monitor", default=""))
    if metric in ("loss", "val_loss", "total_loss"):
        out.append(
            Finding(
                "error",
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
                ["--eval-bytes 65536 or more"],
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
                [f"--eval-every {max(round(steps / 20), 1)}"],
            )
        )
    return out


RULES = (schedule, learning_rate, compression, evaluation)
