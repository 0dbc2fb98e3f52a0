"""A report as Markdown: what to do now first, then why."""

from __future__ import annotations

from pathlib import Path

from .findings import Finding
from .report import Report, examined, headline, in_a_line, where


def to_markdown(report: Report, plots: list[Path]) -> str:
    """plots: files beside the page."""
    lines = [f"# {headline(report)}", "", in_a_line(report.summary), "", "## What to do now", ""]
    todo = [f for f in report.findings if f.severity in ("critical", "warning")]
    lines += [f"{i}. **{f.title}**: {_first(f)}" for i, f in enumerate(todo, 1)] or ["Nothing."]
    if found := examined(report.summary):
        lines += ["", "## Model and text", "", *(f"- {line}" for line in found)]
    lines += ["", "## Findings", ""]
    for f in report.findings:
        lines += [f"### {f.severity}: {f.title}{where(f)}", "", *f.evidence, ""]
        lines += [f"- {c}" for c in f.advice]
        lines += ["", f"`{f.name}`, {f.confidence} confidence. Wrong if: {f.refute}.", ""]
    if report.unexamined:
        lines += ["## Not examined", "", *(f"- {u['what']}: {u['why']}" for u in report.unexamined), ""]
    if plots:
        lines += ["## Plots", "", *(f"![{p.stem.replace('_', ' ')}]({p.name})" for p in plots)]
    return "\n".join(lines).rstrip() + "\n"


def _first(f: Finding) -> str:
    return f"`{f.advice[0]}`" if f.keys or f.sampling else (f.advice or ["see below"])[0]
