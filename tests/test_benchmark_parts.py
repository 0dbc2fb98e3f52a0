"""The parts of a training step: who has the stopwatch, that shares add up to 1, and that looking changes nothing."""

import pytest
import torch

import hnet_kernels as hk
from benchmarks import laptop
from benchmarks.conftest import line_of
from benchmarks.parts import HEAD, PARTS, REST, ROUTING, Stopwatch, watch_steps, watched
from benchmarks.tables.laptop import laptop_step_section


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def passes(clock: Clock, forward: float, backward: float):
    """The identity, which takes so many seconds of the clock forward and backward"""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            clock.now += forward
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            clock.now += backward
            return dy.clone()

    return Slow.apply


def test_every_moment_has_one_part():
    clock = Clock()
    watch = Stopwatch(clock)
    clock.now = 1
    watch.enter(ROUTING)
    clock.now = 3
    watch.enter("norms")
    clock.now = 7
    watch.leave()
    clock.now = 15
    watch.leave()
    clock.now = 31
    watch.enter(ROUTING)
    watch.leave()
    shares = watch.shares()
    assert watch.seconds[ROUTING] == 2 + 8
    assert watch.seconds["norms"] == 4
    assert watch.seconds[REST] == 1 + 16
    assert sum(shares.values()) == pytest.approx(1)


def test_backward_goes_to_who_made_the_node():
    """A network inside another, and one that is called twice."""
    clock = Clock()
    outer, inner, twice = passes(clock, 1, 10), passes(clock, 2, 20), passes(clock, 4, 40)
    x = torch.zeros(3, requires_grad=True)
    watch = Stopwatch(clock)
    for _ in range(2):  # of the graph of the step before nothing is left
        y = passes(clock, 0.5, 5)(x)
        watch.enter(ROUTING)
        y = outer(y)
        watch.enter("attention")
        y = inner(y)
        watch.leave()
        y = outer(y)
        watch.leave()
        for _ in range(2):
            watch.enter(HEAD)
            y = twice(y)
            watch.leave()
        loss = y.sum()
        clock.now += 0.25
        watch.follow(loss)
        clock.now += 0.125
        loss.backward()
        clock.now += 0.0625
        assert watch.part == REST
    watch.shares()
    half = {part: seconds / 2 for part, seconds in watch.seconds.items() if seconds}
    assert half == {
        ROUTING: 2 + 20, "attention": 2 + 20, HEAD: 8 + 80, REST: 0.5 + 5 + 0.25 + 0.125 + 0.0625,
    }  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The laptop's layers on little data."""
    patch = pytest.MonkeyPatch()
    patch.setitem(laptop.TINY, "preset", "laptop")
    out = tmp_path_factory.mktemp("laptop")
    yield out, laptop.learnt(out, smoke=True)
    patch.undo()


def test_shares_of_a_step_and_the_same_step(settings):
    out, state = settings
    seen, plain = (laptop.trainer(out, 512, state, smoke=True) for _ in range(2))
    assert seen.step == plain.step == state["step"]
    before, reading = hk.cross_entropy, seen.model.ngrams.before_reading
    found = watch_steps(seen, 2)
    assert tuple(found.shares) == PARTS
    assert sum(found.shares.values()) == pytest.approx(1)
    assert all(share > 0 for share in found.shares.values())
    assert found.shares[REST] < 0.5
    for _ in range(2):
        plain.train_step()
    for (name, a), b in zip(seen.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert hk.cross_entropy is before
    assert seen.model.ngrams.before_reading == reading
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in seen.model.modules())
    assert "loss" not in vars(seen.task)


def test_a_step_that_fails_leaves_nothing_behind(settings):
    made = laptop.trainer(settings[0], 512, settings[1], smoke=True)
    with pytest.raises(ZeroDivisionError), watched(made, Stopwatch()):
        raise ZeroDivisionError
    assert not any(m._forward_hooks for m in made.model.modules())


def test_a_step_is_measured(settings):
    made = laptop.trainer(settings[0], 512, settings[1], smoke=True)
    step = laptop.measure(made, rounds=2, steps=2, sides=(32,))
    assert made.step == settings[1]["step"] + 2 * (2 + 2)
    assert step.bytes == 512
    assert 1 < step.bytes_per_chunk < 512
    assert step.of_peak == pytest.approx(step.flops_per_byte * step.bytes / step.seconds / step.peak_flops)


def row(positions: int, seconds: float, **changes) -> dict:
    parts = dict.fromkeys(PARTS, 0.05) | {"attention": 0.55}
    return {
        "op": "laptop step", "model": "laptop", "dtype": "bfloat16", "T": positions, "L": 512, "ours": "ours",
        "bytes": None, "seconds": {"ours": seconds}, "text_bytes": positions - 48, "flops_per_byte": 4e6,
        "peak_flops": 4e11, "of_peak": 0.4, "bytes_per_chunk": 4.1, "p_on": 0.62, "p_off": 0.26, "parts": parts,
        "watched": seconds * 1.2, **changes,
    }  # fmt: skip


def test_tables_and_picture(tmp_path):
    machine = dict.fromkeys(("cpu", "isa", "threads", "torch", "date", "command"), "x")
    data = {"machine": machine, "rows": [row(16384, 0.4), row(2048, 0.05), {"op": "other"}]}
    text = laptop_step_section(data)
    assert "| 2,048 | bfloat16 | 50 ms | 40.0 | 4.00 | 160 | 40 % of 400 | 4.10 | 0.62 / 0.26 |" in text
    assert text.index("| 2,048 |") < text.index("| 16,384 |")
    assert "| attention | 55.0 % (33.0 ms) | 55.0 % (264.0 ms) |" in text
    assert text.index("| attention") < text.index("| norms")
    assert laptop_step_section({"machine": machine, "rows": [{"op": "other"}]}) == ""
    from benchmarks.plots import draw_step  # needs matplotlib, which a GPU machine lacks

    draw_step(data["rows"], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    told = line_of(row(2048, 0.05))
    assert (
        "ours 50 ms = 40.0 kB/s, 40 % of the 400 GFLOP/s of a matrix product, 4.10 bytes a chunk; attention 55 %"
        in told
    )
