"""Architectures from a few numbers: "m4 T4" with widths 256, 512 instead of the nested JSON."""

from __future__ import annotations

import math

from hnet.errors import UserError

from .model import AttnConfig, HNetConfig, parse_layout

HEAD_DIM = 64
OUTER_WINDOW = 1023


def from_shorthand(
    arch: str,
    d_model: list[int],
    *,
    heads: list[int] | None = None,
    windows: list[int] | None = None,
    d_intermediate: list[int] | None = None,
) -> HNetConfig:
    """An architecture from one layout a stage, outermost first.

    Args:
        arch: "m4 T4", "m4 T1m4 T26": the encoder of every stage, the last one the innermost network. A decoder mirrors
            its encoder ("T1m4" gives "m4T1"); "c2/c1T1" names both.
        d_model: width of every stage.
        heads: attention heads. Default: as many of 64 channels as fit.
        windows: attention window. Default: 1023 outside, all positions innermost.
        d_intermediate: SwiGLU width. Default: 8/3 of the width, rounded up to 128.

    Raises:
        ValueError: a layout that does not parse, lists of another length than the stages, no width or no head.
    """
    parts = arch.split()
    stages = len(parts)
    if not stages:
        raise UserError("arch must name at least one layout, like 'm4 T4', got ''")
    for name, values in (
        ("d_model", d_model), ("heads", heads), ("windows", windows), ("d_intermediate", d_intermediate)
    ):  # fmt: skip
        if values and len(values) != stages:
            raise UserError(
                f"{name} must have one value for each of the {stages} stages of arch {arch!r}, got {values}"
            )
    if not d_model:
        raise UserError(f"d_model must have one value for each of the {stages} stages of arch {arch!r}, got none")
    for name, values in (("d_model", d_model), ("heads", heads or [])):
        if min(values, default=1) < 1:
            raise UserError(f"{name} must hold integers >= 1, got {values}")
    layout: list = [parts[-1]]
    for part in reversed(parts[:-1]):
        encoder, _, decoder = part.partition("/")
        layout = [encoder, layout, decoder or mirrored(encoder)]
    heads = heads or [num_heads(d) for d in d_model]
    head_dims = [max(d // h, 1) for d, h in zip(d_model, heads, strict=True)]
    return HNetConfig(
        arch_layout=layout,
        d_model=list(d_model),
        d_intermediate=d_intermediate or [-(-8 * d // 3 // 128) * 128 for d in d_model],
        attn_cfg=AttnConfig(
            num_heads=heads,
            rotary_emb_dim=[max(h // 2 // 2 * 2, 2 if h > 1 else 0) for h in head_dims],
            window_size=windows or [OUTER_WINDOW] * (stages - 1) + [-1],
        ),
    )


def mirrored(layout: str) -> str:
    """ "T1m4" -> "m4T1" """
    return "".join(f"{letter}{count}" for letter, count in reversed(parse_layout(layout)))


def num_heads(d_model: int) -> int:
    """The number of heads that divides d_model with a head width nearest 64."""
    divisors = (h for h in range(1, d_model + 1) if d_model % h == 0)
    return min(divisors, key=lambda h: abs(math.log(d_model / h / HEAD_DIM)))


def lr_multipliers(config: HNetConfig, compression: list[float]) -> list[float]:
    """Learning-rate factor of every stage: sqrt(positions for each of the innermost x width ratio), innermost 1.

    A stage outside sees the product of the targets as many positions a step as the innermost, and a narrower stage
    takes larger steps (H-Net paper, section 2.3.3, with the innermost stage as the unit).
    """
    inner = config.num_stages - 1
    return [math.sqrt(math.prod(compression[s:]) * config.d_model[inner] / config.d_model[s]) for s in range(inner + 1)]


def targets(compression: list[float], stages_with_routing: int) -> list[float]:
    """Positions per chunk of every stage, from that itself ([3, 3]) or from bytes a unit at every stage, the bytes
    themselves included ([1, 3, 9]).

    Raises:
        ValueError: neither form fits the number of stages, or a target is not above 1.
    """
    found = list(compression)
    if len(found) == stages_with_routing + 1 and found[0] == 1:
        if not all(b > 0 for b in found):
            raise UserError(f"compression must be above 1 everywhere, got {compression}")
        found = [b / a for a, b in zip(found, found[1:], strict=False)]
    if len(found) != stages_with_routing:
        raise UserError(
            f"compression must be one target for each of the {stages_with_routing} stages with routing "
            f"(or 1 and the bytes a unit of every stage), got {compression!r}"
        )
    if not all(c > 1 for c in found):
        raise UserError(f"compression must be above 1 everywhere, got {compression}")
    return found
