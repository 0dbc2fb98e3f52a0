from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hnet_kernels as hk

from . import harness
from .tables.laptop import told

ROWS: list[dict] = []


def pytest_addoption(parser):
    group = parser.getgroup("hnet benchmarks")
    group.addoption("--smoke", action="store_true", help="tiny shapes and few rounds: does every benchmark run?")
    group.addoption("--results", metavar="NAME", help="write benchmarks/results/NAME.json; 'card': named after the GPU")
    group.addoption("--add", action="store_true", help="keep that file's rows of other benchmarks; write row by row")
    group.addoption("--full", action="store_true", help="what takes minutes too, and 21 rounds instead of 7")
    group.addoption("--rounds", type=int, help="timed rounds of every race (default 7; 21 on a GPU or with --full)")
    group.addoption(
        "--compile", choices=("none", "some", "all"), default="some",
        help="race torch.compile: on a CPU with the forms of baselines.COMPILED (default), with none, with all (as "
        "with --full: minutes); on a GPU on the shapes of shapes.COMPILED, on none, on all",
    )  # fmt: skip


def pytest_collection_modifyitems(config, items):
    every = config.getoption("--full") or config.getoption("--smoke")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("long") and not every:
            item.add_marker(pytest.mark.skip(reason="takes minutes: --full"))


@pytest.fixture(scope="session", autouse=True)
def kept_memory():
    assert hk.keep_memory()


@pytest.fixture(autouse=True)
def own_graphs():
    """What a benchmark compiles is its own: no other has used up the variants of a function."""
    torch._dynamo.reset()


@pytest.fixture
def smoke(request) -> bool:
    return request.config.getoption("--smoke")


@pytest.fixture
def rounds(request, smoke) -> int:
    if smoke:
        return 2
    every = request.config.getoption("--full") or torch.cuda.is_available()
    return request.config.getoption("--rounds") or (21 if every else 7)


@pytest.fixture
def say(request):
    """say(text): a line for whoever watches, past pytest's capture"""

    def print_now(text: str) -> None:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{text}", flush=True)

    return print_now


@pytest.fixture
def keep_row(request, say):
    """keep_row(seconds, ours=, **labels): puts one row into the results and prints it."""

    def keep(seconds, *, ours: str, bytes: int | None = None, **labels):
        row = {**labels, "ours": ours, "bytes": bytes, "seconds": seconds}
        ROWS.append(row)
        say(line_of(row))
        if (path := results_path(request.config)) is None:
            return
        if request.config.getoption("--add"):
            harness.add(path, [row], device_of([row]))
        else:  # a run cut short leaves what it measured
            harness.save(unfinished(path), ROWS, device_of(ROWS))

    return keep


@pytest.fixture
def race(benchmark, rounds, keep_row):
    """race(contenders, ours=, bytes=, **labels): times all contenders, reports ours, keeps the row."""

    def run(contenders, *, ours: str, bytes: int | None = None, **labels):
        seconds = harness.race(contenders, rounds)
        keep_row(seconds, ours=ours, bytes=bytes, **labels)
        benchmark.extra_info.update({f"{n} (ms)": round(1e3 * s, 3) for n, s in seconds.items()})
        benchmark.pedantic(contenders[ours], args=(0,), rounds=rounds, iterations=1)
        return seconds

    return run


@pytest.fixture
def race_passes(benchmark, rounds, keep_row):
    """race_passes(contenders, device, forward_bytes=, backward_bytes=, **labels): keeps a row for forward, backward and
    both, each with a copy of as many bytes."""

    def run(contenders, device: str, *, forward_bytes: int, backward_bytes: int, **labels):
        copy = harness.copy_pass(forward_bytes, backward_bytes, device)
        laps = harness.race_passes({**contenders, "copy": copy}, rounds, device)
        counted = {"forward": forward_bytes, "backward": backward_bytes, "both": forward_bytes + backward_bytes}
        allocating = {name: lap for name, lap in laps.items() if name not in ("copy", "graph")}
        peaks = {name: lap.peak_bytes for name, lap in allocating.items() if lap.peak_bytes is not None}
        for direction, size in counted.items():
            keep_row(
                {name: getattr(lap, direction) for name, lap in laps.items()}, ours="ours", bytes=size,
                direction=direction, device=device, copy_bytes=size, peak_bytes=peaks, **labels,
            )  # fmt: skip
        ours = contenders["ours"]

        def once():
            ours.backward(0, ours.forward(0))
            harness.synchronize(device)

        benchmark.extra_info.update({f"{n} (ms)": round(1e3 * lap.both, 3) for n, lap in laps.items()})
        benchmark.pedantic(once, rounds=2, iterations=1)
        return laps

    return run


def line_of(row: dict) -> str:
    s, ours = row["seconds"], row["seconds"][row["ours"]]
    others = {n: t for n, t in s.items() if n not in (row["ours"], "copy")}
    label = " ".join(str(row[name]) for name in harness.LABELS if name in row)
    text = f"{label}: ours {1e3 * ours:.3g} ms"
    if row["bytes"] and "copy" in s:
        rate, copy = row["bytes"] / ours / 1e9, row["copy_bytes"] / s["copy"] / 1e9
        text += f" = {rate:.1f} GB/s, {100 * rate / copy:.0f} % of copy"
    for name, t in sorted(others.items(), key=lambda kv: kv[1]):
        text += f"; {name} {1e3 * t:.3g} ms (x{t / ours:.2f})"
    if "parts" in row:
        text += told(row)
    if "slope" in row:
        text += f"; slope {row['slope']:.2f}, at most {row['most']:g} expected"
    return text


def device_of(rows: list[dict]) -> str:
    return "cuda" if any(r.get("device") == "cuda" for r in rows) else "cpu"


def results_path(config) -> Path | None:
    name = config.getoption("--results", None)
    if name == "card":
        name = harness.slug(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if name is None else harness.RESULTS / (Path(name).stem + ".json")


def unfinished(path: Path) -> Path:
    return path.with_suffix(".unfinished.json")


def pytest_sessionfinish(session):
    path = results_path(session.config)
    if path is None or not ROWS or session.config.getoption("--add"):
        return
    if session.exitstatus == 0:
        harness.save(path, ROWS, device_of(ROWS))
        unfinished(path).unlink(missing_ok=True)
        print(f"\nwrote {path}")
    else:
        print(f"\nnot all benchmarks passed: what was measured is in {unfinished(path)}")
