"""Saw-teeth of any period are found, and nothing else is taken for one."""

import numpy as np
import pytest

from hnet.diagnose.gradients import find_sawtooth

from .logs import after, findings, healthy_rows, write_run


@pytest.mark.parametrize("period", [8, 12.5, 30, 100])
@pytest.mark.parametrize("growth", [0.5, 1.0])  # of a norm of noise, of a gradient that stays the same
def test_found(period, growth):
    rng, at = np.random.default_rng(0), np.arange(1200.0)
    g = (at % period + 1) ** growth * np.exp(0.25 * rng.standard_normal(1200) - at / 800)
    tooth = find_sawtooth(10 * at, g)
    assert tooth is not None
    assert tooth.period == pytest.approx(10 * period, rel=0.04)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [200, 1000])
def test_not_found(seed, n):
    rng = np.random.default_rng(seed)
    noise, at = rng.standard_normal(n), np.arange(n, dtype=float)
    waves = {
        "walk": np.cumsum(noise) / 10, "noise": 0.3 * noise, "sine": 0.5 * np.sin(at / 7) + 0.05 * noise,
        "falling": -at / 100 + 0.1 * noise, "bursts": 3.0 * (rng.random(n) < 0.03),
    }  # fmt: skip
    assert [name for name, v in waves.items() if find_sawtooth(at, np.exp(v))] == []


def clipped_in_place(every, limit=1.0, n=360, zeroing=True, seed=0):
    """Norms before clipping of gradients of much the same direction; what was clipped stays until the next zeroing."""
    rng = np.random.default_rng(seed)
    kept, norms = np.zeros(64), []
    for s in range(n):
        own = rng.standard_normal(64) / 8
        own[0] = 1.2
        total = kept + own * (0.4 + np.exp(-s / 60))
        norms.append(np.linalg.norm(total))
        kept = total * min(1.0, limit / norms[-1])
        if zeroing and s % every == every - 1:
            kept = np.zeros(64)
    return np.array(norms)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("every", "limit"), [(2, 1.0), (6, 1.0), (12, 0.6), (30, 1.0)])
def test_found_where_gradients_are_clipped_in_place(every, limit, seed):
    g = clipped_in_place(every, limit, seed=seed)
    tooth = find_sawtooth(np.arange(len(g), dtype=float), g)
    assert tooth is not None
    assert tooth.period == every
    assert find_sawtooth(np.arange(len(g), dtype=float), clipped_in_place(1, limit, seed=seed)) is None


@pytest.mark.parametrize("seed", range(3))
def test_not_found_in_batches_that_come_in_turns(seed):
    """A spike every 12th step, or a norm that goes up and down in 12, are of the data."""
    rng, at = np.random.default_rng(seed), np.arange(240.0)
    noise = 0.1 * rng.standard_normal(240)
    assert find_sawtooth(at, np.exp(noise + (at % 12 == 5))) is None
    assert find_sawtooth(at, np.exp(noise + 0.6 * np.sin(at * 2 * np.pi / 12))) is None


@pytest.mark.parametrize(("zeroing", "factor"), [(False, 1), (True, 5)])
def test_never_zeroed_and_clipped_in_place(zeroing, factor, tmp_path):
    """No period then: the norm stays just above the limit. One that is clipped because it is large goes its own way."""
    rows = healthy_rows()
    for r, g in zip(after(rows, 0), factor * clipped_in_place(1, zeroing=zeroing, n=400), strict=True):
        r["grad_norm"] = float(g)
    f = findings(write_run(tmp_path / "a", rows))["clip_tight"]
    assert ("never zeroed" in " ".join(f.evidence)) is not zeroing
