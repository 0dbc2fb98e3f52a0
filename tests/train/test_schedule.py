import math

import pytest

from hnet.config.run import check_restarts
from hnet.plateau import Plateau
from hnet.train.schedule import Schedule


def at(step, kind="wsd", **kw):
    return Schedule(kind, 100, **{"warmup_steps": 10, "decay_fraction": 0.2, **kw}).factor(step)


def test_warmup_and_decays():
    assert [at(s) for s in (0, 4, 9, 10, 79, 80)] == pytest.approx([0.1, 0.5, 1, 1, 1, 1])
    assert at(90) == pytest.approx(0.5)
    assert at(99) == pytest.approx(0.05)
    assert at(90, min_lr=0.1) == pytest.approx(0.55)
    assert at(90, decay_shape="inverse-sqrt") == pytest.approx(1 - math.sqrt(0.5))
    assert at(85, decay_shape="cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert at(55, "cosine") == pytest.approx(0.5, abs=0.01)
    assert at(99, "cosine", min_lr=0.1) == pytest.approx(0.1, abs=0.01)
    assert at(99, "constant") == 1
    assert at(0, "constant", warmup_steps=0) == 1


def test_restarts_by_plan_and_by_trigger():
    s = Schedule("restarts", 100, restart_at=[0, 20, 50], restart_min=[0.1, 0.1, 0.05])
    assert [s.factor(i) for i in (0, 10, 20, 50)] == pytest.approx([1, 0.55, 1, 1])
    assert s.factor(19) < 0.11
    s.restart(30)  # back to the peak, and down over what is left of the stage, not for one step
    assert s.factor(30) == 1
    assert s.factor(40) == pytest.approx(0.55)
    assert s.factor(31) > s.factor(39) > s.factor(49) > 0.1
    assert s.factor(50) == 1  # the next stage begins as planned
    assert s.factor(75) == pytest.approx(0.525)
    other = Schedule("restarts", 100, restart_at=[0, 20, 50], restart_min=[0.1, 0.1, 0.05])
    other.load_state_dict(s.state_dict())
    assert [other.factor(i) for i in range(100)] == [s.factor(i) for i in range(100)]


def test_drops_and_cuts():
    s = Schedule("plateau", 100, min_lr=0.2, plateau_factor=0.5)
    assert s.factor(50) == 1
    s.drop()
    assert s.factor(50) == 0.5
    s.drop()
    s.drop()
    assert s.factor(99) == 0.2
    s.cut = 0.5
    assert s.factor(99) == 0.1


def test_plateau_fires_exactly_when_the_inequality_says_so():
    p = Plateau(window=4, threshold=0.005)
    for loss in (2.0, 2.0, 1.99):
        p.observe(loss)
        assert not p.fires()  # too few
    p.observe(1.99)  # 2.0 -> 1.99: the improvement is the threshold itself, not below it
    assert (2.0 - 1.99) / 2.0 >= 0.005
    assert not p.fires()
    p.observe(1.9905)  # halves (2.0, 1.99) and (1.99, 1.9905): 0.24 %
    assert p.fires()
    p.clear()
    assert not p.fires()
    for loss in (2.0, 2.0, 2.1, 2.1):  # rising is no improvement either
        p.observe(loss)
    assert p.fires()
    p.observe(math.nan)  # not a loss
    assert list(p.losses) == [2.0, 2.0, 2.1, 2.1]
    q = Plateau(window=4, threshold=0.005)
    q.load_state_dict(p.state_dict())
    assert q.fires()


def test_bad_restarts():
    for stages, low in [([], []), ([0.1], [0.1]), ([0, 0.5, 0.5], [0, 0, 0]), ([0, 1.0], [0, 0])]:
        with pytest.raises(ValueError, match="restart_at must begin with 0 and rise"):
            check_restarts(stages, low)
    with pytest.raises(ValueError, match="restart_min must have a value"):
        check_restarts([0, 0.5], [0.1])
    with pytest.raises(ValueError, match="window must be at least 2"):
        Plateau(window=1)
