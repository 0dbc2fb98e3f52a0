"""Random numbers that are a function of a seed and of how many bytes were drawn before: SplitMix64.

No state, so that neither neighbours nor the device nor the order of requests change what a seed gives.
"""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
BLOCK = 16  # bytes to come whose numbers are made together


class Noise:
    """Exponentially distributed numbers > 0: the byte of largest probability / noise is a draw.

    Args:
        seed: from 0 to 2^64 - 1.
    """

    def __init__(self, seed: int) -> None:
        self.start = splitmix64(np.array([seed], dtype=np.uint64) + GOLDEN)
        self.first, self.block = 0, np.zeros((0, 256))

    def of(self, drawn: int) -> np.ndarray:
        """(256,) fp64 for the byte after `drawn` others."""
        if not self.first <= drawn < self.first + len(self.block):
            self.first = drawn
            count = np.arange(drawn * 256 + 1, (drawn + BLOCK) * 256 + 1, dtype=np.uint64)
            z = splitmix64(self.start + GOLDEN * count)
            # 52 bits and a half are exact in fp64, so that none is 0 or 1
            self.block = -np.log(((z >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52).reshape(BLOCK, 256)
        return self.block[drawn - self.first]


def splitmix64(z: np.ndarray) -> np.ndarray:
    """The finisher of SplitMix64 on uint64, whose products wrap around."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
