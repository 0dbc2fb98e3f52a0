"""How well text was predicted: sums over an evaluation, and the rates made of them."""

from __future__ import annotations

import math
from typing import NamedTuple

from .router_metrics import decisiveness


class Score(NamedTuple):
    nats: float  # sum over all targets
    targets: int  # symbols predicted: bytes, and an end for every document where the model predicts one
    num_bytes: int  # of them bytes of text
    positions: tuple[int, ...] = ()  # of every stage of an H-Net, context included
    routers: tuple[tuple[float, float, float], ...] = ()  # `RouterSums` of every stage with routing

    @property
    def ce(self) -> float:
        """Nats a predicted symbol."""
        return self.nats / max(self.targets, 1)

    @property
    def bpb(self) -> float:
        """Bits per byte of text: total nats / ln 2 / bytes, the nats of ends of documents included."""
        return bits_per_byte(self.nats, self.num_bytes)

    @property
    def bytes_per_chunk(self) -> list[float]:
        """Positions of the outermost stage (bytes, and ends of documents) for each chunk of every stage."""
        return [self.positions[0] / max(n, 1) for n in self.positions[1:]]

    @property
    def decisiveness(self) -> list[dict[str, float]]:
        """p_on, p_off, undecided and G_minus_F of every stage with routing."""
        stages = zip(self.positions, self.positions[1:], self.routers, strict=False)
        return [
            decisiveness(n, chunks, *sums) | {"G_minus_F": (sums[0] + sums[1] - chunks) / max(n, 1)}
            for n, chunks, sums in stages
        ]


def bits_per_byte(nats: float, num_bytes: float) -> float:
    return nats / math.log(2) / max(num_bytes, 1)
