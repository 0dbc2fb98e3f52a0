"""`freeze`: parameters that stay as they are: no gradient, no state of the optimiser, no weight decay."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from torch import nn

from hnet.errors import UserError
from hnet.model.parameters import stage_of

# what a stage consists of, by the first part of a parameter's name inside it
PARTS = {
    "encoder": "encoder", "routing_module": "router", "residual_proj": "residual", "decoder": "decoder",
    "pad_dimension": "pad", "layers": "inner", "rmsnorm": "inner",
}  # fmt: skip


def part_of(name: str) -> str:
    """Of a parameter: embeddings, ngrams, lm_head; or a part of its stage: encoder, router, residual, decoder, pad (the
    channels that widen a stage), inner (the innermost network)."""
    inside = re.fullmatch(r"backbone\.(?:main_network\.)*(\w+).*", name)
    return PARTS[inside[1]] if inside else name.split(".")[0]


def names_of(name: str) -> list[str]:
    """All that `freeze` may call a parameter by, besides itself and the modules it is in."""
    part, stage = part_of(name), f"stage{stage_of(name)}"
    return [part, stage, f"{stage}.{part}"] if name.startswith("backbone.") else [part]


def matches(pattern: str, name: str) -> bool:
    return any(fnmatchcase(n, pattern) for n in [*names_of(name), name]) or fnmatchcase(name, pattern + ".*")


def freeze(model: nn.Module, patterns: list[str]) -> int:
    """Parameters that one of the patterns names get no gradient any more. Returns how many numbers stay as they are.

    patterns: names of parts ("router", "stage1", "stage0.router") or of parameters or modules, all with * and ?.

    Raises:
        UserError: a pattern that names nothing, or all of them together name everything.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        if not any(matches(pattern, name) for name in parameters):
            known = ", ".join(dict.fromkeys(n for name in parameters for n in names_of(name)))
            raise UserError(
                f"freeze must name parts of this model, got {pattern!r}; known are {known}; or parameters and modules "
                "by name, with * and ?, like backbone.encoder.layers.0"
            )
    frozen = [p for name, p in parameters.items() if any(matches(pattern, name) for pattern in patterns)]
    if len(frozen) == len(parameters):
        raise UserError(f"freeze must leave something to train, got {patterns}, which is every parameter")
    for p in frozen:
        p.requires_grad_(False)
    return sum(p.numel() for p in frozen)
