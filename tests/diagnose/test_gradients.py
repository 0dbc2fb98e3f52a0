"""Saw-teeth of any period are found, and nothing else is taken for one."""

import numpy as np
import pytest

from hnet.diagnose.gradients import find_sawtooth


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
