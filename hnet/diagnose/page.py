"""A report as files: Markdown, JSON, the plots, and one HTML page with all of it inside."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path

from hnet.errors import user_path

from .checkpoint import Material
from .figures import plot_chunks, plot_log
from .findings import Finding
from .markdown import to_markdown
from .report import Report, examined, headline, in_a_line, where

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
article { border-left: 5px solid #888; padding: 0.2rem 1rem; margin: 1rem 0; background: #f7f7f7 }
.critical { border-color: #b00020 } .warning { border-color: #e69f00 } .note { border-color: #0072b2 }
.ok { border-color: #009e73 } code { background: #e8e8e8; padding: 0.1em 0.3em; overflow-wrap: anywhere }
h3 { margin: 0.3rem 0 } p { margin: 0.3rem 0 } .quiet { color: #555; font-size: 0.9em } img { max-width: 100% }
"""


def write_report(out: Path, report: Report, material: Material | None = None) -> list[Path]:
    """report.html, report.md, report.json and the plots below `out`; returns the files written, the page first."""
    with user_path(out, "write"):
        out.mkdir(parents=True, exist_ok=True)
    plots = plot_log(report.log, out) + (plot_chunks(material, out) if material else [])
    texts = {
        "report.html": to_html(report, plots),
        "report.md": to_markdown(report, plots),
        "report.json": json.dumps(report.to_dict(), indent=2) + "\n",
    }
    for name, text in texts.items():
        with user_path(out / name, "write"):
            (out / name).write_text(text)
    return [*(out / name for name in texts), *plots]


def to_html(report: Report, plots: list[Path]) -> str:
    """One page that needs nothing else: style and plots are inside, and no script."""
    parts = [f"<h1>{escape(headline(report))}</h1>", f"<p>{escape(in_a_line(report.summary))}</p>"]
    parts += [f"<p>{escape(line)}</p>" for line in examined(report.summary)]
    todo = [f for f in report.findings if f.severity in ("critical", "warning")]
    if todo:
        items = "".join(f"<li><b>{escape(f.title)}</b>: {_advice(f)}</li>" for f in todo)
        parts.append(f"<h2>What to do now</h2><ol>{items}</ol>")
    parts.append("<h2>Findings</h2>")
    parts += [_finding(f) for f in report.findings] or ["<p>None.</p>"]
    if report.unexamined:
        items = "".join(f"<li>{escape(u['what'])}: {escape(u['why'])}</li>" for u in report.unexamined)
        parts.append(f"<h2>Not examined</h2><ul>{items}</ul>")
    for p in plots:
        data = base64.b64encode(p.read_bytes()).decode()
        name = escape(p.stem.replace("_", " "))
        parts.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{data}">')
    head = f'<meta charset="utf-8"><title>{escape(report.log.path.name)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _advice(f: Finding) -> str:
    first = (f.advice or ["see below"])[0]
    return f"<code>{escape(first)}</code>" if f.keys or f.sampling else escape(first)


def _finding(f: Finding) -> str:
    evidence = "".join(f"<p>{escape(e)}</p>" for e in f.evidence)
    flags = len(f.advice) - len(f.change)
    items = [f"<code>{escape(a)}</code>" if i < flags else escape(a) for i, a in enumerate(f.advice)]
    todo = f"<ul>{''.join(f'<li>{i}</li>' for i in items)}</ul>" if items else ""
    quiet = f"{f.name}, {f.confidence} confidence. Wrong if: {f.refute}."
    return (
        f'<article class="{f.severity}" id="{f.name}{"" if f.stage is None else f.stage}"><h3>{f.severity}: '
        f'{escape(f.title)}{escape(where(f))}</h3>{evidence}{todo}<p class="quiet">{escape(quiet)}</p></article>'
    )
