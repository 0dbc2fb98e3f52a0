"""The whole model on a device: what the GPU tests call, and the CPU tests of these helpers too."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import hnet_kernels as hk
from hnet import HNetConfig, HNetForCausalLM

from ..kernels.cases import cu_of
from ..model.test_golden import TARGETS, Golden, agrees

LENGTHS = [300, 1, 500, 223]


def check_golden(golden: Golden, device: str) -> None:
    """Logits, boundaries, losses, every gradient, ragged packing: 1e-4 of the published implementation."""
    model = golden.model.to(device)
    ids = golden["input_ids"].to(device)
    model.zero_grad()
    out = model(ids)
    agrees(out.logits.cpu(), golden["logits"])
    for i, r in enumerate(out.routing):
        agrees(r.boundary_prob.cpu(), golden[f"stage{i}.boundary_prob"])
        differ = r.boundary_mask.cpu() != golden[f"stage{i}.boundary_mask"]
        assert not (differ & ((r.boundary_prob.cpu() - 0.5).abs() > 1e-6)).any()
    ce = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    ratio = sum(hk.ratio_loss(r, n) for r, n in zip(out.routing, TARGETS, strict=False))
    agrees(ce.cpu(), golden["ce"])
    agrees(ratio.cpu(), golden["ratio_loss"])
    (ce + 0.03 * ratio).backward()
    for name, p in model.named_parameters():
        agrees(p.grad.cpu(), golden[f"grad.{name}"])
    ragged = model(golden["ragged.input_ids"].to(device), cu_seqlens=golden["ragged.cu_seqlens"].to(device))
    agrees(ragged.logits.cpu(), golden["ragged.logits"])


def check_decode(golden: Golden, device: str) -> None:
    """Prefill and cached steps give the published logits, and those of the full forward on the same device."""
    model = golden.model.to(device)
    ids = golden["input_ids"][0].to(device)
    cache = model.allocate_cache(1, 90)
    logits = [model.prefill(ids[:50], cu_of([50], device), cache).logits[-1]]
    logits += [model.step(ids[t : t + 1], cache)[0][0] for t in range(50, 90)]
    agrees(torch.stack(logits).cpu(), golden["decode.logits"])
    with torch.inference_mode():
        full = model(ids[:90], cu_seqlens=cu_of([90], device)).logits
    agrees(torch.stack(logits), full[49:])


class Step(NamedTuple):
    loss: float
    gradient: Tensor  # all of it, one fp64 vector on the CPU


def seeded_model(preset: str = "small_2stage") -> HNetForCausalLM:
    torch.manual_seed(0)
    return HNetForCausalLM(HNetConfig.preset(preset))


def training_step(
    model: HNetForCausalLM, device: str, dtype: torch.dtype, backend: str = "auto", max_chunks: list[int] | None = None
) -> Step:
    """Loss and gradient of one step as the trainer takes it: fp32 weights, autocast for bf16."""
    model = model.to(device)
    model.zero_grad()
    T = sum(LENGTHS)
    ids = torch.randint(0, 256, (T,), generator=torch.Generator().manual_seed(1)).to(device)
    with hk.backend(backend), torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        out = model(ids, cu_seqlens=cu_of(LENGTHS, device), max_seqlen=max(LENGTHS), max_chunks=max_chunks)
    loss = F.cross_entropy(out.logits.float(), ids.roll(-1))
    loss = loss + 0.5 * sum(hk.ratio_loss(r, n) for r, n in zip(out.routing, TARGETS, strict=False))
    loss.backward()
    return Step(loss.item(), torch.cat([p.grad.flatten().cpu().double() for p in model.parameters()]))


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def check_low_precision(ours: Step, plain: Step, exact: Step) -> None:
    """bf16 on our kernels may be 1.5 times as far from fp32 as bf16 on plain PyTorch is."""
    ours_off, plain_off = distance(ours.gradient, exact.gradient), distance(plain.gradient, exact.gradient)
    assert ours_off <= 1.5 * plain_off + 1e-3, f"gradient off by {ours_off:.3g}, with plain PyTorch by {plain_off:.3g}"
    assert plain_off < 0.1, f"bf16 itself is off by {plain_off:.3g}: the comparison says little"
    loss_off, plain_loss_off = abs(ours.loss - exact.loss), abs(plain.loss - exact.loss)
    assert loss_off <= 1.5 * plain_loss_off + 1e-2 * exact.loss, (
        f"loss off by {loss_off:.3g}, plain {plain_loss_off:.3g}"
    )
