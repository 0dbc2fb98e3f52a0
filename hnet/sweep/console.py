"""What a person sees of a sweep: a live table on a terminal, a line for every trial in a log."""

from __future__ import annotations

import time
from typing import Any

from optuna.trial import TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from .report import bytes_per_chunk
from .search import Active, Search
from .study import METRICS, REASON, by_objective, real_trials

REFRESH = 1.0  # seconds
STYLES = {"running": "cyan", "best": "bold green", "pruned": "dim", "failed": "red"}


class SweepConsole:
    """say: a line that stays. show: the table as it is now."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.shown = 0.0

    def __enter__(self) -> SweepConsole:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def show(self, search: Search) -> None:
        if self.live is not None and (not search.active or time.monotonic() - self.shown > REFRESH):
            self.live.update(table(search, self.console.height - 6), refresh=True)
            self.shown = time.monotonic()


def table(search: Search, rows: int) -> Table:
    """Trials under way, then the best of those that are over, at most `rows`."""
    sweep, trials = search.sweep, real_trials(search.study)
    over = [t for t in trials if t.state.is_finished()]
    others = [t for t in reversed(over) if t.state != TrialState.COMPLETE]
    found = Table(title=f"{len(over)} of {sweep.wanted} trials over, objective {sweep.objective}", title_style="bold")
    for name in ("trial", "", *(p.name for p in sweep.parameters)):
        found.add_column(name, overflow="fold")
    for name in ("step", "objective", "val_bpb", "bytes/chunk", "minutes"):
        found.add_column(name, justify="right", no_wrap=True)
    lines = [_running(a) for a in search.active]
    lines += [_over(t, "best" if i == 0 else "complete") for i, t in enumerate(by_objective(sweep, over))]
    lines += [_over(t, "pruned" if t.state == TrialState.PRUNED else "failed") for t in others]
    for number, state, point, last in lines[: max(rows, 3)]:
        values = [_short(point.get(p.name)) for p in sweep.parameters]
        found.add_row(str(number), state, *values, *last, style=STYLES.get(state, ""))
    return found


def _running(a: Active) -> tuple[int, str, dict[str, Any], list[str]]:
    row = a.evaluations[max(a.evaluations)] if a.evaluations else {}
    step = f"{a.step}/{a.steps}" if a.steps else str(a.step)
    state = "stopping" if a.pruned else "running"
    return a.number, state, a.point, [step, *_numbers(a.value, row), f"{(time.monotonic() - a.begin) / 60:.1f}"]


def _over(t: Any, state: str) -> tuple[int, str, dict[str, Any], list[str]]:
    row, value = t.user_attrs.get(METRICS, {}), t.value if t.state != TrialState.FAIL else None
    shown = f"failed: {t.user_attrs[REASON][:60]}" if REASON in t.user_attrs else state
    minutes = t.user_attrs.get("seconds", 0) / 60
    return t.number, shown, t.params, [str(row.get("step", "")), *_numbers(value, row), f"{minutes:.1f}"]


def _numbers(value: float | None, row: dict[str, Any]) -> list[str]:
    return ["" if v is None else f"{v:.4f}" for v in (value, row.get("val_bpb"))] + [_short(bytes_per_chunk(row))]


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
