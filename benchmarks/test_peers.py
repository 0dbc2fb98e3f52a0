"""Peers side by side: routing, pooling, dechunking with a residual and the ratio loss, forward and backward, of
8 x 2048 x 1024 in fp32, by ours, by our fastest plain PyTorch under torch.compile, and by h-net-dynamic-chunking; with
the two projections that make q and k (most of the time of all of them, so measured alone too), and without."""

from collections.abc import Callable

import pytest
import torch

from . import peers, stage
from .harness import race_passes
from .peers import Inputs

SHAPE, TINY = (8, 2048, 1024), (4, 64, 64)
ON = [pytest.param("cpu", id="cpu", marks=pytest.mark.long), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]


def require(say: Callable[[str], None]) -> None:
    if not peers.installed():
        say(f"left out: {peers.MISSING}")
        pytest.skip(peers.MISSING)


@pytest.fixture
def installed(say):
    require(say)


def agree(x: Inputs, projections: bool) -> None:
    """Ours and the peer's, on the same weights: result, ratio loss, every gradient. P of first chunks is 1 - 1e-4 in
    ours, 1 in theirs: that is how far apart they may be."""
    mine, theirs = peers.ours(x, projections), peers.peer(x, projections)
    results = [form.run() for form in (mine, theirs)]
    dout = (x.dout, x.dratio)
    found = [torch.autograd.grad(out, form.leaves, dout) for form, out in zip((mine, theirs), results, strict=True)]
    for what, a, b in zip(
        ("out", "ratio loss", "dx", "dresidual", "dq, dk"),
        (*results[0], *peers.together(x, found[0])),
        (*results[1], *found[1]),
        strict=True,
    ):
        off = (a.float() - b.float()).abs().max() / b.float().abs().max()
        assert off < 3e-4, f"{what}: {off:.1e} apart"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("projections", [True, False], ids=["projected", "alone"])
def test_both_compute_the_same(projections):
    agree(peers.inputs(*TINY), projections)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("projections", [True, False], ids=["projected", "alone"])
def test_peers(keep_row, rounds, smoke, projections, device):
    shape = TINY if smoke else SHAPE
    x = peers.inputs(*shape, device)
    agree(x, projections)
    racers = {
        "ours": peers.ours(x, projections).passes(x),
        "torch.compile": peers.plain(x, projections).passes(x),
        peers.name(): peers.peer(x, projections).passes(x),
    }
    if projections:
        racers["projections alone"] = peers.projections_alone(x)
    laps = race_passes(racers, rounds, device, warmup=2)
    for direction in ("forward", "backward", "both"):
        keep_row(
            {name: getattr(lap, direction) for name, lap in laps.items()}, ours="ours", op="peers", direction=direction,
            projections=projections, device=device, dtype="float32", N=shape[0], L=shape[1], D=shape[2],
            T=shape[0] * shape[1], peer=peers.name(), target=stage.TARGET,
        )  # fmt: skip
