"""How the cost of a stage's round trip grows with positions, width, sequences and chunk length: the slope of log
seconds over log size, from the least squares of five sizes. What is linear has slope 1, what does not depend on a size
slope 0.
"""

import math

import pytest
import torch

from . import harness, stage
from .shapes import SMOKE, Shape
from .test_round_trip import Inputs

BASE = Shape(16384, 512, 4, 16)
SIZES = {
    "T": (4096, 8192, 16384, 32768, 65536),
    "D": (128, 256, 512, 1024, 2048),
    "N": (1, 8, 64, 512, 4096),
    "chunk": (2, 8, 32, 128, 512),
}
MOST = {"T": 1.05, "D": 1.05, "N": 0.05, "chunk": 0.05}  # slopes that a linear op may have


def slope(sizes: tuple[int, ...], seconds: list[float]) -> float:
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


@pytest.mark.parametrize("name", SIZES)
def test_scaling(rounds, keep_row, smoke, name):
    base, sizes = (SMOKE, (64, 128)) if smoke else (BASE, SIZES[name])
    contenders = {}
    for size in sizes:
        run = Inputs(base._replace(**{name: size}), torch.float32, "cpu").passes(stage.ours)
        contenders[str(size)] = lambda i, run=run: run.backward(i, run.forward(i))
    seconds = harness.race(contenders, max(rounds // 2, 2))
    found = slope(sizes, [seconds[str(s)] for s in sizes])
    shape = {k: v for k, v in base._asdict().items() if k != name}
    keep_row(
        seconds, ours=str(sizes[-1]), op=f"round trip over {name}", slope=found, most=MOST[name], dtype="float32",
        **shape,
    )  # fmt: skip


def test_slope_is_that_of_a_power():
    assert slope((1, 2, 8), [5 * s**1.3 for s in (1, 2, 8)]) == pytest.approx(1.3)
