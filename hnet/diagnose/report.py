"""All rules over a log, and the report for a terminal and for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from .analyses import OF_A_LOG
from .findings import SEVERITIES, Finding, by_severity
from .runs import Log
from .summary import summary, unexamined

COLORS = {"critical": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}
SCHEMA = 1  # of the JSON, docs/diagnose.md


@dataclass
class Report:
    """What is known of one run. findings: worst first; summary and unexamined: see `hnet.diagnose.summary`."""

    log: Log
    findings: list[Finding]
    summary: dict[str, Any]
    unexamined: list[dict[str, str]]
    generation: list[dict[str, Any]] | None = None  # rows of `hnet.diagnose.generation.samples`

    @property
    def worst(self) -> str:
        return self.findings[0].severity if self.findings else "ok"

    def to_dict(self) -> dict[str, Any]:
        """What --json prints of it; docs/diagnose.md describes the keys."""
        return {
            "schema": SCHEMA,
            "path": str(self.log.path),
            "kind": self.log.kind,
            "columns": sorted(self.log.columns),
            "counts": {s: sum(f.severity == s for f in self.findings) for s in SEVERITIES},
            "summary": self.summary,
            "findings": [f.to_dict() for f in self.findings],
            "unexamined": self.unexamined,
            "generation": self.generation,
        }


def diagnose(log: Log) -> list[Finding]:
    """Every finding on a log, the worst first."""
    return by_severity([f for analysis in OF_A_LOG for f in analysis(log)])


def examine(log: Log, more: list[Finding] | None = None, generation: list[dict[str, Any]] | None = None) -> Report:
    """`diagnose` with all around it. more, generation: findings and rows of what a checkpoint wrote."""
    left = unexamined(log)
    if generation is None:
        left.append(
            {"what": "what the model writes", "why": "not asked for; --generate lets the run's checkpoint write"}
        )
    return Report(log, by_severity(diagnose(log) + (more or [])), summary(log), left, generation)


def headline(report: Report) -> str:
    log = report.log
    if not len(log.step):
        seen = "config alone"
    else:
        seen = f"{len(log.step)} rows, steps {log.step.min():.0f} to {log.last_step}"
    counts = [
        f"{n} {s}{'s' * (n > 1 and s in ('warning', 'note'))}"
        for s in SEVERITIES
        if (n := sum(f.severity == s for f in report.findings))
    ]
    return f"{log.path}: {seen}; " + (", ".join(counts) or "nothing wrong found")


def print_report(console: Console, report: Report) -> None:
    console.print(Text(headline(report), style="bold"))
    if numbers := in_a_line(report.summary):
        console.print(Text(numbers, style="dim"))
    for known in examined(report.summary):
        console.print(Text(known, style="dim"))
    for f in report.findings:
        line = Text.assemble((f"{f.severity:<9}", COLORS[f.severity]), (f.title, "bold"), (where(f), "dim"))
        console.print(line)
        for text in f.evidence:
            console.print(_indented(text))
        for text in f.advice:
            console.print(_indented(text, "-> ", "green"))
        console.print(_indented(f"{f.confidence} confidence; wrong if: {f.refute}", style="dim"))
    if report.unexamined:
        console.print(Text("Not examined:", style="bold"))
        for u in report.unexamined:
            console.print(_indented(f"{u['what']}: {u['why']}", style="dim"))


def in_a_line(found: dict[str, Any]) -> str:
    """The summary's most telling numbers."""
    parts = []
    if loss := found.get("loss"):
        fell = f" ({-loss['reduction_percent']:+.1f} %)" if loss["reduction_percent"] is not None else ""
        parts.append(f"{loss['name']} {loss['first']:.4g} -> {loss['last']:.4g}{fell}, best {loss['best']:.4g}")
        if "perplexity" in loss:
            parts.append(f"perplexity {loss['perplexity']:.4g}")
    if norm := next(iter(found.get("grad_norm", {}).values()), None):
        parts.append(
            f"gradient norm at most {norm['largest']:,.4g}, median {norm['median']:.3g}, final {norm['final']:.3g}"
        )
    if speed := found.get("throughput"):
        parts.append(f"{speed['median']:,.{0 if speed['median'] >= 1000 else 1}f} {speed['unit']}")
    if "tokens_per_parameter" in found:
        parts.append(f"{found['tokens_per_parameter']:.3g} tokens per parameter")
    return "; ".join(parts)


def examined(found: dict[str, Any]) -> list[str]:
    """Sentences on the model and the text as they were found, where they were."""
    lines = []
    if a := found.get("architecture"):
        sizes = ", ".join(f"{n:,}" for n in a["parameters_by_stage"])
        windows = ", ".join("none" if w is None else "all" if w < 0 else str(w) for w in a["windows"])
        lines.append(
            f"checkpoint: layout {a['layout']}, widths {a['d_model']}, layers {a['layers']}, windows {windows}, "
            f"parameters by stage {sizes}"
        )
        for i, r in enumerate(a["routers"]):
            seen = (
                f"; F {r['F']:.3f}, p {r['p_on']:.2f} on boundaries and {r['p_off']:.2f} elsewhere" if "F" in r else ""
            )
            lines.append(
                f"router of stage {i}: drift from the identity {r['drift_q']:.3f} (q) and {r['drift_k']:.3f} (k), "
                f"effective rank {r['rank_q']:.1f} and {r['rank_k']:.1f} of {r['width']}{seen}"
            )
    if d := found.get("data"):
        held = d.get("held_out")
        lines.append(
            f"text: {d['bytes']:,} bytes in {d['documents']:,} documents, median {d['document_bytes']['median']:,.0f}; "
            f"{d['invalid_bytes']:,} of {d['examined_bytes']:,} bytes no UTF-8; "
            f"{100 * d['duplicate_share']:.2g} % of them are copies, {100 * d['near_duplicate_share']:.2g} % nearly"
            + (f"; {100 * held['overlap_share']:.2g} % of the held-out text trained on" if held else "")
        )
    return lines


def _indented(text: str, mark: str = "", style: str = "") -> Any:
    from rich.padding import Padding

    return Padding(Text(mark + text, style=style), (0, 0, 0, 9))


def where(f: Finding) -> str:
    return "" if f.steps is None else f"  (steps {f.steps[0]}-{f.steps[1]})"
