"""report.md of a sweep, its pictures, and the winner as a config file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from hnet.disk import replacing
from hnet.errors import user_path
from hnet.plots.sweep import Axis, Point, pareto_front, plot_sweep

from .config import SweepConfig
from .parameters import Parameter, show
from .study import METRICS, REASON, by_objective, real_trials

REPORT, BEST = "report.md", "best.toml"


def write_report(sweep: SweepConfig, study: Study) -> list[Path]:
    """Returns the files written: report.md, and once a trial is complete best.toml and pictures."""
    trials = real_trials(study)
    ranked = by_objective(sweep, trials)
    points = [_point(t) for t in ranked]
    written: list[Path] = []
    if ranked:
        base = _base(sweep, ranked)
        written += plot_sweep(
            sweep.folder, [_axis(p) for p in sweep.parameters], points, objective=sweep.objective,
            minimize=sweep.direction == "minimize", base=None if base is None else base.number,
        )  # fmt: skip
        best = sweep.run_of(ranked[0].params, sweep.folder / "best", quiet=False)
        written.append(_write(sweep.folder / BEST, f"# trial {ranked[0].number} of {sweep.folder}\n{best.to_toml()}"))
    text = "\n\n".join(_sections(sweep, trials, ranked, points, written)) + "\n"
    return [_write(sweep.folder / REPORT, text), *written]


def _sections(
    sweep: SweepConfig, trials: list[FrozenTrial], ranked: list[FrozenTrial], points: list[Point], files: list[Path]
) -> Iterable[str]:
    count = {s: sum(t.state == s for t in trials) for s in TrialState}
    yield f"# Sweep {sweep.folder.name}"
    yield (
        f"{sweep.direction.capitalize()} `{sweep.objective}` at the {sweep.at} evaluation of every trial; sampler "
        f"{sweep.sampler}, pruner {sweep.pruner}. Of {sweep.wanted} trials: {count[TrialState.COMPLETE]} complete, "
        f"{count[TrialState.PRUNED]} pruned, {count[TrialState.FAIL]} failed, {count[TrialState.RUNNING]} unfinished, "
        f"{max(sweep.wanted - len(trials), 0)} not begun. Each is a run directory, `trials/NUMBER/`."
    )
    if ranked:
        yield from _best(sweep, ranked, points)
        yield from (f"![{f.stem}]({f.name})" for f in files if f.suffix == ".png")
        if (base := _base(sweep, ranked)) is not None:
            yield f"## Each choice alone\n\n{_effects(sweep, ranked, base)}"
        yield f"## Complete trials, the best first\n\n{_table(sweep, ranked)}"
    if pruned := [t for t in trials if t.state == TrialState.PRUNED]:
        yield f"## Pruned\n\nThe numbers are those of the evaluation at which they ended.\n\n{_table(sweep, pruned)}"
    if failed := [t for t in trials if t.state == TrialState.FAIL]:
        rows = [
            [f"{t.number:04d}", *_values(sweep, t), _cell(t.user_attrs.get(REASON, "no reason given"))] for t in failed
        ]
        yield f"## Failed\n\n{_markdown(['trial', *_names(sweep), 'reason'], rows)}"


def _best(sweep: SweepConfig, ranked: list[FrozenTrial], points: list[Point]) -> Iterable[str]:
    best, point = ranked[0], points[0]
    told = ", ".join(f"{name} {value}" for name, value in zip(_names(sweep), _values(sweep, best), strict=True))
    bpb = "" if point.bpb is None else f", {point.bpb:.4f} held-out bits per byte"
    chunk = "" if point.bytes_per_chunk is None else f", {point.bytes_per_chunk:.2f} bytes a chunk"
    yield f"**Best: trial {best.number}**, objective {best.value:.5g}{bpb}{chunk}: {told}."
    yield f"```sh\nhnet train {sweep.folder / BEST}\n```"
    front = pareto_front([p for p in points if p.bpb is not None and p.bytes_per_chunk is not None])
    if len(front) > 1:
        told = ", ".join(f"{p.number} ({p.bytes_per_chunk:.2f} bytes, {p.bpb:.4f} bits)" for p in reversed(front))
        yield f"Pareto front of compression and bits per byte, by trial: {told}."
    if all("seed" not in p.names() for p in sweep.parameters):
        yield (
            "Every trial had the same seed. How much seeds differ is not known from this sweep: vary `seed` for the "
            "configurations that matter before believing small differences."
        )


def _effects(sweep: SweepConfig, ranked: list[FrozenTrial], base: FrozenTrial) -> str:
    rows = []
    for p in sweep.parameters:
        for label in p.choices:
            if label == base.params[p.name]:
                rows.append([p.name, f"{_cell(label)} (base)", *_numbers(base), ""])
            elif t := next((t for t in ranked if t.params[p.name] == label), None):
                rows.append([p.name, _cell(label), *_numbers(t), f"{(t.value or 0.0) - (base.value or 0.0):+.4f}"])
            else:
                rows.append([p.name, _cell(label), *[""] * 5, "no result"])
    return _markdown(
        ["parameter", "choice", "objective", "val_bpb", "bytes/chunk", "step", "minutes", "difference"], rows
    )


def _table(sweep: SweepConfig, trials: list[FrozenTrial]) -> str:
    header = ["trial", "objective", "val_bpb", "bytes/chunk", "step", "minutes", *_names(sweep)]
    return _markdown(header, [[f"{t.number:04d}", *_numbers(t), *_values(sweep, t)] for t in trials])


def _numbers(t: FrozenTrial) -> list[str]:
    p, row = _point(t), t.user_attrs.get(METRICS, {})
    bpb = "" if p.bpb is None else f"{p.bpb:.4f}"
    chunk = "" if p.bytes_per_chunk is None else f"{p.bytes_per_chunk:.2f}"
    minutes = f"{t.user_attrs.get('seconds', 0) / 60:.1f}"
    return [f"{t.value:.5g}" if t.value is not None else "", bpb, chunk, str(row.get("step", "")), minutes]


def _names(sweep: SweepConfig) -> list[str]:
    return [p.name for p in sweep.parameters]


def _values(sweep: SweepConfig, t: FrozenTrial) -> list[str]:
    found = [t.params.get(p.name, "") for p in sweep.parameters]
    return [_cell(f"{v:.4g}" if isinstance(v, float) else show(v)) for v in found]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def _base(sweep: SweepConfig, complete: list[FrozenTrial]) -> FrozenTrial | None:
    """The trial that one_at_a_time compares with, once it is complete."""
    if sweep.sampler != "one_at_a_time":
        return None
    point = sweep.base_point()
    return next((t for t in complete if t.params == point), None)


def _point(t: FrozenTrial) -> Point:
    row: dict[str, Any] = t.user_attrs.get(METRICS, {})
    return Point(t.number, t.value or 0.0, t.params, row.get("val_bpb"), bytes_per_chunk(row))


def bytes_per_chunk(row: dict[str, Any]) -> float | None:
    """Of the innermost stage with routing, held out."""
    found = [v for k, v in sorted(row.items()) if k.endswith("/val_bytes_per_chunk")]
    return found[-1] if found else None


def _axis(p: Parameter) -> Axis:
    return Axis(p.name, list(p.choices), p.low, p.high, p.log, p.step)


def _write(path: Path, text: str) -> Path:
    with user_path(path, "write"), replacing(path) as partial:
        partial.write_text(text)
    return path
