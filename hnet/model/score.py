"""How well text was predicted: sums over an evaluation, and the rates made of them."""

from __future__ import annotations

import math
from typing import NamedTuple


class Score(NamedTuple):
    nats: float  # sum over all targets
    targets: int  # symbols predicted: bytes, and an end for every document where the model predicts one
    num_bytes: int  # of them bytes of text
    positions: tuple[int, ...] = ()  # of every stage of an H-Net, context included

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


def bits_per_byte(nats: float, num_bytes: float) -> float:
    return nats / math.log(2) / max(num_bytes, 1)
