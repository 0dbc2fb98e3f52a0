"""Flips: how many boundaries of the held-out text move from one evaluation to the next."""

from __future__ import annotations

from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hnet.device import World
from hnet_kernels import Routing

from .distributed import gather

LONGEST = 1 << 20  # positions that are looked at


class Flips:
    """flips = |A xor B| / |A or B| of every stage: A and B are the sets of bytes (positions of the outermost stage)
    where its chunks begin, in an evaluation and in the one before, over the first LONGEST positions of the text.
    First positions of sequences are in both. 0: nothing changed; 1: no boundary is where one was.

    `see` every pack of an evaluation, then `compare`. The last sets are kept in the checkpoint, as bits, 128 KB a
    stage at most, so that a resumed run goes on from them. `world`: its processes see packs rank, rank + size, ..., and
    all of them hold the sets of all. `due`: whether weights have moved since; set from outside, cleared by `compare`.
    """

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World(0, 1, 0)
        self.seen: list[Tensor] = []  # of this evaluation, (stages, positions) bool of every pack, on the device
        self.size = 0
        self.due = True
        self.last: np.ndarray | None = None  # (stages, positions) bool

    def see(self, routing: list[Routing]) -> None:
        """The stages of one pack, without a budget."""
        if self.size < LONGEST and routing:
            self.seen.append(chunk_starts(routing))
            self.size += self.seen[-1].shape[1]

    def compare(self) -> list[float] | None:
        """Flips of every stage since the last call; None at the first, or where the text is another by its length."""
        mine = [x.cpu().numpy() for x in self.seen]
        self.seen, self.size, self.due = [], 0, False
        by_rank = gather(mine, self.world)
        packs = [x for x in chain.from_iterable(zip_longest(*by_rank)) if x is not None]  # in the order of the text
        if not packs:
            return None
        before, self.last = self.last, np.concatenate(packs, axis=1)[:, :LONGEST]
        if before is None or before.shape != self.last.shape:
            return None
        changed, either = (before ^ self.last).sum(1), (before | self.last).sum(1)
        return (changed / np.maximum(either, 1)).tolist()

    def state_dict(self) -> dict[str, Any]:
        if self.last is None:
            return {}
        return {"positions": self.last.shape[1], "bits": torch.from_numpy(np.packbits(self.last, axis=1))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = None
        if state:
            self.last = np.unpackbits(state["bits"].numpy(), axis=1, count=state["positions"]).astype(bool)


def chunk_starts(routing: list[Routing]) -> Tensor:
    """(stages, T) bool: whether a chunk of a stage begins at a position of the outermost one."""
    masks = [routing[0].boundary_mask]
    start = routing[0].chunk_start.long()  # of every position of the next stage
    for r in routing[1:]:
        masks.append(torch.zeros_like(masks[0]).scatter(0, start, r.boundary_mask))
        start = start[r.chunk_start.long()]
    return torch.stack(masks)
