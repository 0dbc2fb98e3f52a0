"""Whether documents of one pack see each other, asked of the model and the loader themselves: change one document, the
logits of the others must not move. Works for any model that takes a pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hnet.config import BOS, EOS

from .findings import Finding

Forward = Callable[[Tensor, Tensor], Tensor]  # input_ids (T,) int64, cu_seqlens (N+1,) int32 -> logits (T, vocab)
MOVED = 1e-2  # of the logits' standard deviation; rounding, with other shapes inside, is a hundredth of it
OTHERS = "a pack of other documents, or the loop that really trains, shows that they do"


class Leak(NamedTuple):
    moved: float  # largest change of another document's logit, in standard deviations of the logits
    document: int  # that was changed
    joined: int  # beginnings of documents inside sequences: the loader does not part them


@torch.no_grad()
def find_leak(forward: Forward, input_ids: Tensor, cu_seqlens: Tensor) -> Leak:
    """
    Args:
        forward: the model as it is trained, from what the loader hands it.
        input_ids: (T,) int64, a pack of two documents or more.
        cu_seqlens: (N+1,) int32, where they begin, as the loader says.

    Raises:
        ValueError: a pack in which nothing tells documents apart: one sequence and one BOS.
    """
    starts = _starts(input_ids, cu_seqlens)
    joined = len(set(starts) - set(cu_seqlens.tolist()))
    if len(starts) < 3:
        raise ValueError(
            f"the pack must hold two documents or more, got {len(starts) - 1} in {len(input_ids)} positions"
        )
    before = forward(input_ids, cu_seqlens).float()
    worst = Leak(0.0, 0, joined)
    for k in {0, (len(starts) - 1) // 2}:
        a, b = starts[k], starts[k + 1]
        apart = torch.full_like(before, torch.inf)
        for factor in (7, 11):  # rounding may turn a boundary that is one by a hair, but not the same one twice
            changed = input_ids.clone()
            text = (changed[a:b] != BOS) & (changed[a:b] != EOS)
            changed[a:b] = torch.where(text, 32 + (changed[a:b] * factor + 13) % 90, changed[a:b])
            apart = torch.minimum(apart, (forward(changed, cu_seqlens).float() - before).abs())
        apart[a:b] = 0
        moved = float(apart.max() / before.std())
        if not moved <= worst.moved:
            worst = Leak(moved, k, joined)
    return worst


def _starts(input_ids: Tensor, cu_seqlens: Tensor) -> list[int]:
    """Beginnings of documents and the end: where sequences begin, and every BOS."""
    begins = set(torch.nonzero(input_ids == BOS).flatten().tolist())
    return sorted(begins | {int(x) for x in cu_seqlens.tolist()} | {0, len(input_ids)})


def leak(forward: Forward, input_ids: Tensor, cu_seqlens: Tensor) -> list[Finding]:
    """`find_leak` as a finding: critical, or "ok" with what was measured."""
    found = find_leak(forward, input_ids, cu_seqlens)
    count = len(_starts(input_ids, cu_seqlens)) - 1
    why = [
        f"Document {found.document} of a pack of {count} was changed; a logit of another moved by {found.moved:.2g} "
        "standard deviations of the logits."
    ]
    if found.joined:
        why.append(f"{found.joined} documents begin inside a sequence of cu_seqlens: the loader does not part them.")
    if found.moved <= MOVED and not found.joined:
        return [
            Finding("ok", "leak", "Documents of a pack do not see each other", why, confidence="high", refute=OTHERS)
        ]
    change = ["pass cu_seqlens of every pack to the model, with a sequence for each document"]
    return [Finding("critical", "leak", "Packed documents see each other", why, change, confidence="high")]
