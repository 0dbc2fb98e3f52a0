"""All rules over a log, and the report for people, programs and files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from hnet.errors import user_path
from hnet.plots.run import plot_rows

from . import architecture, configuration, data, router, schedule, training
from .findings import Finding, by_severity
from .runs import Log

RULES = (
    *training.RULES,
    *architecture.RULES,
    *router.RULES,
    *schedule.RULES,
    *data.RULES,
)
CONFIG_RULES = configuration.RULES
COLORS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def diagnose(log: Log) -> list[Finding]:
    """Every finding, errors first. Configuration rules run only where there is a config."""
    rules = (*RULES, *CONFIG_RULES) if log.config else RULES
    return by_severity([f for rule in rules for f in rule(log)])


def to_dict(log: Log, findings: list[Finding]) -> dict[str, Any]:
    """What --json prints for one log."""
    return {
        "path": str(log.path),
        "kind": log.kind,
        "rows": len(log.step),
        "last_step": log.last_step,
        "columns": sorted(log.columns),
        "errors": sum(f.severity == "error" for f in findings),
        "findings": [dataclasses.asdict(f) for f in findings],
    }


def headline(log: Log, findings: list[Finding]) -> str:
    if log.kind == "config":
        seen = "config alone"
    else:
        seen = f"{len(log.step)} rows, steps {log.step.min():.0f} to {log.last_step}"
    counts = [f"{n} {s}{'s' * (n > 1)}" for s in COLORS if (n := sum(f.severity == s for f in findings))]
    return f"{log.path}: {seen}; " + (", ".join(counts) or "nothing wrong found")


def print_report(console: Console, log: Log, findings: list[Finding]) -> None:
    console.print(Text(headline(log, findings), style="bold"))
    for f in findings:
        line = Text.assemble((f"{f.severity:<8}", COLORS[f.severity]), (f.title, "bold"), (_where(f), "dim"))
        console.print(line)
        for text in f.evidence:
            console.print(_indented(text))
        for text in f.change:
            console.print(_indented(text, "-> ", "green"))


def _indented(text: str, mark: str = "", style: str = "") -> Any:
    from rich.padding import Padding

    return Padding(Text(mark + text, style=style), (0, 0, 0, 8))


def _where(f: Finding) -> str:
    return "" if f.steps is None else f"  (steps {f.steps[0]}-{f.steps[1]})"


def write_report(out: Path, log: Log, findings: list[Finding]) -> list[Path]:
    """report.md and the plots below `out`; returns the files written."""
    with user_path(out, "write"):
        out.mkdir(parents=True, exist_ok=True)
    plots = plot_rows(log.rows, out)
    lines = [f"# {headline(log, findings)}", ""]
    for f in findings:
        lines += [f"## {f.severity}: {f.title}{_where(f)}", "", *f.evidence, ""]
        lines += [f"- {c}" for c in f.change] + [""]
    lines += [f"![{p.stem.replace('_', ' ')}]({p.name})" for p in plots]
    report = out / "report.md"
    report.write_text("\n".join(lines).rstrip() + "\n")
    return [report, *plots]
