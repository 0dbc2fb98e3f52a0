"""Other people's names for what we log."""

from __future__ import annotations

import re
from functools import lru_cache

_NAMES = {
    "step": "step iter iteration global_step it steps update _step trainer/global_step train/global_step num_steps",
    "planned_steps": "planned_steps max_steps total_steps num_train_steps",
    "loss": "loss train_loss training_loss lm_loss loss/train total_loss train_total_loss train_loss_step "
    "loss_metrics/global_avg_loss",
    "ce": "ce ce_loss loss_ce cross_entropy cross_entropy_loss lm_ce nll train_nll train_ce train_ce_loss "
    "train_cross_entropy",
    "bpb": "bpb bits_per_byte train_bpb train_bits_per_byte",
    "val_ce": "val_ce val_loss loss/val loss/valid val_ce_loss val_cross_entropy",
    "val_bpb": "val_bpb val_bits_per_byte held-out_bits_per_byte held_out_bits_per_byte",
    "ratio_loss": "ratio_loss ratio lb_loss loss_lb lb load_balancing_loss load_balance_loss aux_loss balance_loss "
    "train_ratio_loss train_lb_loss train_load_balancing_loss train_aux_loss",
    "lr": "lr learning_rate lr_now train_lr train_learning_rate lr-adamw lr/default optim/lr",
    "grad_norm": "grad_norm gradnorm norm gnorm grad_norm_total total_grad_norm global_grad_norm "
    "train_gradient_norm gradient_norm total_norm train_grad_norm optim/grad_norm",
    "bytes_per_second": "bytes_per_second bytes_per_sec bytes/s bytes/sec",
    "tokens_per_second": "tokens_per_second tokens_per_sec tok/sec tok/s tokens/s tokens/sec tps wps throughput(tps) "
    "train_tokens_per_second throughput",
    "step_ms": "step_ms dt step_time_ms",
    "epoch": "epoch train_epoch",
    "epoch_loss": "avg_loss epoch_loss",
    "cutoff": "cutoff",
    "stage0/F": "boundary_rate boundary_fraction train_boundary_rate",
    "stage0/G": "boundary_prob mean_boundary_prob",
    "stage0/bytes_per_chunk": "bytes_per_chunk bytes/chunk avg_chunk_len avg_chunk_length chunk_len compression_ratio "
    "bpc_chunk",
    "data_wait_share": "data_wait_share data_share data_wait_fraction",
    "data_wait": "data_wait data_wait_seconds data_time data_seconds data_loading_time",
}
_CANONICAL = {name: ours for ours, names in _NAMES.items() for name in names.split()}
_STAGE = "F|G|target|bytes_per_chunk|ratio_loss|grad_norm|lr|p_on|p_off|undecided|G_minus_F|flips"
_STAGED = {n: c.removeprefix("stage0/") for n, c in _CANONICAL.items()} | {"f": "F", "g": "G"}
_OF_A_STAGE = re.compile(_STAGE)
_HELD_OUT = re.compile(r"^(eval|valid|validation|dev|test|held[-_]out)(?=[_/])")
_SECTION = re.compile(r"^(metrics|optim|optimizer|loss|losses|model|stats|trainer|grad|grads|gradients|lr|perf)/")
_STAGE_LAST = re.compile(r"^(.*?)[_/ .-]*(?:stage|level|s|group|pg)?[_/ .-]*(\d+)$")
_STAGE_FIRST = re.compile(r"^(?:stage|level|s)[_/ .-]?(\d+)[_/ .-]+(.*)$")


@lru_cache(maxsize=4096)
def canonical(name: str) -> str | None:
    """Our name of a logged quantity, None when it is none of ours.

    "Train Loss", "train/loss", "lm loss", "my-run - loss" (W&B) -> "loss"; "eval_loss", "Validation loss" -> "val_ce";
    "F" -> "stage0/F"; "lr_stage_1", "train/stage_1/lr" -> "stage1/lr".
    """
    name = name.strip().rsplit(" - ", 1)[-1]
    if name in ("F", "G"):
        return f"stage0/{name}"
    if m := re.fullmatch(rf"stage[ _]?(\d+)[/ _.]({_STAGE})", name):
        return f"stage{m[1]}/{m[2]}"
    low = re.sub(r"\s+", "_", name.lower())
    for candidate in (low, _HELD_OUT.sub("val", low), _SECTION.sub("", low)):
        candidate = re.sub(r"^(train|val)/", r"\1_", candidate)
        if candidate in _CANONICAL:
            return _CANONICAL[candidate]
    return _of_a_stage(re.sub(r"^(train|training)[_/]", "", low))


def _of_a_stage(name: str) -> str | None:
    """ "lr_stage_1", "stage_1/lr", "grad_norm/1" -> "stage1/lr", "stage1/lr", "stage1/grad_norm" """
    if m := _STAGE_FIRST.match(name):
        stage, rest = m[1], m[2]
    elif m := _STAGE_LAST.match(name):
        stage, rest = m[2], m[1]
    else:
        return None
    ours = _STAGED.get(rest) or _STAGED.get(_SECTION.sub("", rest))
    return f"stage{int(stage)}/{ours}" if ours and _OF_A_STAGE.fullmatch(ours) else None
