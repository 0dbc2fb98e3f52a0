"""The clock and the bookkeeping of the benchmarks; a card with a known clock stands in for a GPU."""

import json
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


def measured(op, seconds, **labels):
    return {"op": op, "T": 10, "direction": "forward", **labels, "ours": "ours", "seconds": {"ours": seconds}}


def test_rows_are_added_to_those_of_other_benchmarks(tmp_path, monkeypatch):
    here = {"gpu": "Some GPU", "torch": "2", "triton": "3", "date": "today", "command": "pytest a"}
    monkeypatch.setattr(harness, "machine", lambda device: dict(here))
    path = tmp_path / "some-gpu.json"
    harness.add(path, [measured("route", 1.0), measured("pool", 2.0)], "cuda")
    here["command"] = "pytest b"
    harness.add(path, [measured("route", 3.0), measured("route", 4.0, T=20)], "cuda")
    harness.add(path, [measured("pool", 2.5, direction="backward")], "cuda")
    found = json.loads(path.read_text())
    seconds = [(r["op"], r["T"], r["direction"], r["seconds"]["ours"]) for r in found["rows"]]
    assert seconds == [
        ("pool", 10, "forward", 2.0), ("route", 10, "forward", 3.0), ("route", 20, "forward", 4.0),
        ("pool", 10, "backward", 2.5),
    ]  # fmt: skip
    assert found["machine"]["command"] == "pytest a; pytest b"
    here["torch"] = "2.1"  # numbers of another version stand in no table with these
    harness.add(path, [measured("ema", 5.0)], "cuda")
    assert [r["op"] for r in json.loads(path.read_text())["rows"]] == ["ema"]


def test_driver_version_of_a_machine_without_a_driver(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert harness.driver_version.__wrapped__() == "unknown"
