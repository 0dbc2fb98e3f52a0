from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hnet_kernels as hk

from . import harness

ROWS: list[dict] = []


def pytest_addoption(parser):
    group = parser.getgroup("hnet benchmarks")
    group.addoption("--smoke", action="store_true", help="tiny shapes and few rounds: does every benchmark run?")
    group.addoption("--results", metavar="NAME", help="write benchmarks/results/NAME.json")
    group.addoption("--rounds", type=int, default=21, help="timed rounds of every race (default 21)")


@pytest.fixture(scope="session", autouse=True)
def kept_memory():
    assert hk.keep_memory()


@pytest.fixture
def smoke(request) -> bool:
    return request.config.getoption("--smoke")


@pytest.fixture
def rounds(request, smoke) -> int:
    return 2 if smoke else request.config.getoption("--rounds")


@pytest.fixture
def keep_row():
    """keep_row(seconds, ours=, **labels): puts one row into the results and prints it."""

    def keep(seconds, *, ours: str, bytes: int | None = None, **labels):
        row = {**labels, "ours": ours, "bytes": bytes, "seconds": seconds}
        ROWS.append(row)
        print_row(row)

    return keep


@pytest.fixture
def race(benchmark, rounds, keep_row):
    """race(contenders, ours=, bytes=, **labels): times all contenders, reports ours, keeps the row."""

    def run(contenders, *, ours: str, bytes: int | None = None, **labels):
        torch._dynamo.reset()
        seconds = harness.race(contenders, rounds)
        keep_row(seconds, ours=ours, bytes=bytes, **labels)
        benchmark.extra_info.update({f"{n} (ms)": round(1e3 * s, 3) for n, s in seconds.items()})
        benchmark.pedantic(contenders[ours], args=(0,), rounds=rounds, iterations=1)
        return seconds

    return run


def print_row(row: dict) -> None:
    s, ours = row["seconds"], row["seconds"][row["ours"]]
    others = {n: t for n, t in s.items() if n not in (row["ours"], "copy")}
    label = " ".join(str(v) for k, v in row.items() if k not in ("ours", "bytes", "seconds", "copy_bytes"))
    text = f"\n{label}: ours {1e3 * ours:.2f} ms"
    if row["bytes"] and "copy" in s:
        rate, copy = row["bytes"] / ours / 1e9, row["copy_bytes"] / s["copy"] / 1e9
        text += f" = {rate:.1f} GB/s, {100 * rate / copy:.0f} % of copy"
    for name, t in sorted(others.items(), key=lambda kv: kv[1]):
        text += f"; {name} {1e3 * t:.2f} ms (x{t / ours:.2f})"
    print(text)


def pytest_sessionfinish(session):
    name = session.config.getoption("--results", None)
    if name and ROWS and session.exitstatus == 0:
        path = harness.RESULTS / (Path(name).stem + ".json")
        harness.save(path, ROWS)
        print(f"\nwrote {path}")
