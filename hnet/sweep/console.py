"""What a person sees of a sweep: a live table on a terminal, a line for every trial in a log."""

from __future__ import annotations

import time
from typing import Any

from optuna.trial import TrialState
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from .report import bytes_per_chunk
from .search import Active, Search, describe
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
    title = f"{len(over)} of {sweep.wanted} trials over, objective {sweep.objective}"
    found = Table(title=title, title_style="bold", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    base = sweep.base_point() if sweep.sampler == "one_at_a_time" else None
    names = [p.name for p in sweep.parameters] if base is None else ["changed"]
    look: dict[str, Any] = {"no_wrap": True, "vertical": "bottom"}
    found.add_column("trial", min_width=5, **look)
    found.add_column("state", min_width=8, **look)
    for name in names:
        found.add_column(name.replace("_", "\n"), **look)
    for name, width in (("step", 5), ("objective", 9), ("val\nbpb", 6), ("bytes/\nchunk", 6), ("minutes", 7)):
        found.add_column(name, justify="right", min_width=width, **look)
    lines = [_running(a) for a in search.active]
    lines += [_over(t, "best" if i == 0 else "complete") for i, t in enumerate(by_objective(sweep, over))]
    lines += [_over(t, "pruned" if t.state == TrialState.PRUNED else "failed") for t in others]
    for number, state, point, last in lines[: max(rows, 3)]:
        if base is None:
            values = [_short(point.get(name)) for name in names]
        else:
            values = [describe({k: v for k, v in point.items() if v != base[k]}) or "nothing: the base"]
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
