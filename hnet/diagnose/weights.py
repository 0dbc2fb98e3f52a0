"""The model as its checkpoint has it: sizes, scales, and routers on held-out text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hnet.config import parse_layout
from hnet.data.packing import Batch
from hnet.model.causal_lm import HNetForCausalLM
from hnet.model.parameters import stage_of
from hnet.model.router_metrics import decisiveness, router_sums

from .findings import Finding
from .series import percent

INIT = 0.02  # standard deviation of linear maps at the start
GROWN = 100.0  # times that
ALIKE = 0.01  # standard deviation of p: the router says the same of every position
DECIDED = 1e-3  # from 0 or 1: no gradient comes through
LOW_RANK = 2.0


def effective_rank(weight: Tensor) -> float:
    """exp of the entropy of the singular values, between 1 and the smaller side; 0 for a matrix of zeros."""
    s = torch.linalg.svdvals(weight.double())
    p = s[s > 0] / s.sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def drift(weight: Tensor) -> float:
    """How far a routing projection is from the identity it began as, over that identity's norm."""
    eye = torch.eye(*weight.shape, dtype=torch.float64)
    return float((weight.double() - eye).norm() / eye.norm())


def describe(model: HNetForCausalLM) -> dict[str, Any]:
    """`architecture` of the summary, docs/diagnose.md."""
    c = model.config
    sizes = [0] * c.num_stages
    for name, p in model.named_parameters():
        sizes[stage_of(name)] += p.numel()
    attends = [
        any("t" in m.lower() for layout in c.layouts(s) for m, _ in parse_layout(layout)) for s in range(c.num_stages)
    ]
    routers = []
    for stage in model.stages():
        if stage.innermost:
            continue
        maps = {n: getattr(stage.routing_module, f"{n}_proj_layer").weight.detach() for n in "qk"}
        routers.append(
            {f"drift_{n}": drift(w) for n, w in maps.items()}
            | {f"rank_{n}": effective_rank(w) for n, w in maps.items()}
            | {"width": c.d_model[stage.stage]}
        )
    return {
        "layout": c.arch_layout,
        "layers": [sum(n for layout in c.layouts(s) for _, n in parse_layout(layout)) for s in range(c.num_stages)],
        "d_model": c.d_model,
        "windows": [c.attn_cfg.window_size[s] if attends[s] else None for s in range(c.num_stages)],
        "parameters_by_stage": sizes,
        "scales": scales(model),
        "routers": routers,
    }


def scales(model: HNetForCausalLM) -> dict[str, dict[str, float]]:
    """Root mean square of the matrices of every stage: least, median, largest; embeddings and routers left out."""
    found: dict[str, list[float]] = {}
    for name, p in _matrices(model):
        found.setdefault(f"stage{stage_of(name)}", []).append(float(p.double().square().mean().sqrt()))
    return {
        k: {"least": min(v), "median": float(torch.tensor(v).median()), "largest": max(v)} for k, v in found.items()
    }


def _matrices(model: HNetForCausalLM) -> list[tuple[str, Tensor]]:
    skipped = ("embeddings.", "ngrams.")
    return [
        (n, p.detach())
        for n, p in model.named_parameters()
        if p.dim() == 2 and not n.startswith(skipped) and "routing_module" not in n
    ]


def weights(model: HNetForCausalLM, step: int, frozen: bool = False) -> list[Finding]:
    """Weights that are broken or were never trained. step: of the checkpoint; frozen: some of them on purpose."""
    out = []
    broken = [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        why = [f"{len(broken)} tensors of the checkpoint hold NaN or infinity, {broken[0]} the first."]
        change = ["go back to an older checkpoint, and lower the learning rate from there"]
        return [Finding("critical", "weights_broken", "Weights are not finite", why, change)]
    zero = [n for n, p in _matrices(model) if step > 0 and not p.any()]
    if zero:
        why = [f"{len(zero)} matrices are all zero at step {step}: {', '.join(zero[:3])}. They do nothing."]
        change = ["do their gradients arrive, and does an optimiser group hold them?"]
        out.append(Finding("warning", "weights_untrained", "Matrices are zero", why, change))
    out += [] if frozen or step < 1 else _at_their_start(model, step)
    big = {n: r for n, p in _matrices(model) if (r := float(p.double().square().mean().sqrt())) > GROWN * INIT}
    if big:
        name = max(big, key=lambda n: big[n])
        why = [f"{name} has a root mean square of {big[name]:.3g} at step {step}; matrices begin at {INIT} or less."]
        keys = {"weight_decay": 0.1}
        change = ["a lower learning_rate"]
        out.append(Finding("warning", "weights_grown", "Weights have grown out of scale", why, change, keys=keys))
    return out


def _at_their_start(model: HNetForCausalLM, step: int) -> list[Finding]:
    """Stages whose norms are all 1, as they began: any update at all moves them."""
    norms: dict[int, list[bool]] = {}
    for name, p in model.named_parameters():
        if "norm" in name.rsplit(".", 2)[-2] and p.dim() == 1:
            norms.setdefault(stage_of(name), []).append(bool((p == 1).all()))
    out = []
    for stage in (s for s, ones in norms.items() if all(ones)):
        why = [f"All {len(norms[stage])} norms of stage {stage} are exactly 1, as they began, at step {step}."]
        change = ["does an optimiser group hold its parameters, with a rate above 0? Do gradients reach it?"]
        title = f"Stage {stage} was never trained"
        out.append(Finding("critical", "weights_untrained", title, why, change, stage=stage))
    return out


@torch.no_grad()
def routers(model: HNetForCausalLM, batch: Batch, targets: list[float], step: int) -> tuple[list[Finding], list[dict]]:
    """Routers by their weights and by what they do on a pack of held-out text; the same as numbers for the summary."""
    found = model(batch.input_ids, cu_seqlens=batch.cu_seqlens).routing
    out: list[Finding] = []
    numbers = []
    for i, (stage, r) in enumerate(zip(model.stages(), found, strict=False)):
        free = _free(r)
        on, off, near = (float(x) for x in router_sums(r))
        positions = len(r.boundary_prob)
        numbers.append(
            {"F": float(r.boundary_mask.float().mean()), "G": float(r.boundary_prob.mean())}
            | {"p_std": float(free.std()) if len(free) > 1 else math.nan}
            | decisiveness(positions, float(r.boundary_mask.sum()), on, off, near)
        )
        target = targets[i] if i < len(targets) else math.nan
        maps = {n: getattr(stage.routing_module, f"{n}_proj_layer").weight.detach() for n in "qk"}
        out += _dead(i, maps, free) or _frozen(i, maps, step) or _saturated(i, free, target)
    return out, numbers


def _free(r: Any) -> Tensor:
    """p of a Routing but for first positions, where it is 1 whatever the router thinks."""
    keep = torch.ones_like(r.boundary_mask)
    keep[r.cu_seqlens[:-1].long().clamp(max=max(len(keep) - 1, 0))] = False
    return r.boundary_prob[keep]


def _dead(stage: int, maps: dict[str, Tensor], p: Tensor) -> list[Finding]:
    why = []
    for n, w in maps.items():
        if (rank := effective_rank(w)) < LOW_RANK <= min(w.shape) / 4:
            why.append(f"{n}_proj_layer has an effective rank of {rank:.2f} of {min(w.shape)}.")
    if len(p) > 1 and float(p.std()) < ALIKE:
        why.append(
            f"p is {float(p.mean()):.4f} +- {float(p.std()):.2g} over {len(p)} positions of held-out text: the same "
            "everywhere, whatever the text."
        )
    if not why:
        return []
    change = ["does the router get a gradient? Start it anew as the identity", "rate_control bias moves a stuck rate"]
    keys = {"rate_control": "bias"}
    title = f"The router of stage {stage} is dead"
    return [Finding("critical", "router_dead", title, why, change, stage=stage, keys=keys)]


def _frozen(stage: int, maps: dict[str, Tensor], step: int) -> list[Finding]:
    still = [n for n, w in maps.items() if step > 0 and drift(w) < 1e-6]
    if not still:
        return []
    names = " and ".join(f"{n}_proj_layer" for n in still)
    why = [f"{names} of stage {stage} are the identity they began as, after {step} steps."]
    change = ["is the router in a group of the optimiser, with a rate above 0?"]
    title = f"The router of stage {stage} was never trained"
    return [Finding("warning", "router_frozen", title, why, change, stage=stage, keys={"router_lr": 0.1})]


def _saturated(stage: int, p: Tensor, target: float) -> list[Finding]:
    if len(p) < 2 or not target > 0:
        return []
    decided = float(((p < DECIDED) | (p > 1 - DECIDED)).float().mean())
    rate = float((p > 0.5).float().mean())
    if decided < 0.99 or 0.5 < rate * target < 2:
        return []
    why = [
        f"{percent(decided)} of p are within {DECIDED:g} of 0 or 1, where next to no gradient comes through, and "
        f"{percent(rate)} of the positions are boundaries; the target is {percent(1 / target)}."
    ]
    change = ["a smaller entropy_weight, or one that acts later", "rate_control bias moves the rate without a gradient"]
    title = f"The router of stage {stage} is saturated away from its target"
    keys = {"rate_control": "bias"}
    return [Finding("warning", "router_saturated", title, why, change, stage=stage, keys=keys)]
