"""The clock and the bookkeeping of the benchmarks; a card with a known clock stands in for a GPU."""

import types

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Pass


class Card:
    """Time passes, in ms, only in `work`, and memory is what `work` says."""

    def __init__(self):
        self.now, self.allocated, self.peak = 0.0, 1000, 1000

    def work(self, ms, peak=0):
        self.now += ms
        self.peak = max(self.peak, self.allocated + peak)

    def reset_peak(self):
        self.peak = self.allocated


@pytest.fixture
def card(monkeypatch):
    card = Card()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = card.now

        def elapsed_time(self, other):
            return other.at - self.at

    class Sweep:
        def add_(self, _):
            card.now += 100.0  # must be in nobody's time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: card.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: card.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", card.reset_peak)
    monkeypatch.setattr(harness, "cache_sweep", lambda device: Sweep())
    return card


def test_passes_on_a_card(card):
    fast = Pass(lambda i: card.work(2.0 + i % 2, 50), lambda i, out: card.work(4.0, 70))
    slow = Pass(lambda i: card.work(10.0), lambda i, out: card.work(20.0, 900))
    laps = harness.race_passes({"fast": fast, "slow": slow}, 3, "cuda")
    assert laps["fast"] == pytest.approx((2e-3, 4e-3, 6e-3, 70))
    assert laps["slow"] == pytest.approx((10e-3, 20e-3, 30e-3, 900))


def test_race_on_a_card(card):
    seconds = harness.race({"a": lambda i: card.work(3.0), "b": lambda i: card.work(5.0)}, 5, "cuda")
    assert seconds == pytest.approx({"a": 3e-3, "b": 5e-3})


def test_backward_gets_what_its_forward_gave():
    given = []
    run = Pass(lambda i: ("out", i), lambda i, out: given.append((i, out)))
    laps = harness.race_passes({"ours": run}, 2, "cpu")
    assert all(out == ("out", i) for i, out in given)
    assert laps["ours"].peak_bytes is None
    assert laps["ours"].both >= laps["ours"].forward > 0


def test_copies_move_the_bytes_they_stand_for():
    copy = harness.copy_pass(8000, 24000, "cpu")
    assert copy.forward(0).nbytes == 4000  # as many read
    assert copy.backward(0, None).nbytes == 12000


def test_results_say_where_they_come_from(monkeypatch):
    card = types.SimpleNamespace(name="Some GPU", total_memory=10, multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(harness, "driver_version", lambda: "1.2")
    pytest.importorskip("triton")
    machine = harness.machine("cuda")
    assert (machine["gpu"], machine["driver"], machine["multiprocessors"]) == ("Some GPU", "1.2", 3)
    assert {"cuda", "triton", "torch", "python", "date", "command"} <= set(machine)
    assert "gpu" not in harness.machine("cpu")


def test_driver_version_of_a_machine_without_a_driver(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert harness.driver_version.__wrapped__() == "unknown"
