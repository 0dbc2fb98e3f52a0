"""Markdown tables from benchmarks/results: `python -m benchmarks.table` rewrites them in README.md and docs.

A table stands between `<!-- benchmarks:NAME -->` and `<!-- end -->` and comes from results/NAME.json.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- benchmarks:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def best(seconds: dict[str, float], kind: str) -> float | None:
    return min((t for name, t in seconds.items() if name.startswith(kind)), default=None)


def op_table(rows: list[dict]) -> list[str]:
    lines = [
        "| op | T | dtype | | ours | of copy bandwidth | fastest eager | fastest torch.compile |",
        "|---|--:|---|---|--:|--:|--:|--:|",
    ]
    for r in rows:
        s, ours = r["seconds"], r["seconds"][r["ours"]]
        share = (r["bytes"] / ours) / (r["copy_bytes"] / s["copy"])
        cells = [r["op"], str(r["T"]), r["dtype"], r["direction"], f"{1e3 * ours:.2f} ms", f"{100 * share:.0f} %"]
        for kind in ("eager", "compile"):
            t = best(s, kind)
            cells.append("" if t is None else f"{1e3 * t:.2f} ms ({t / ours:.1f}x)")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def step_lines(rows: list[dict]) -> list[str]:
    lines = []
    for r in rows:
        s = r["seconds"]
        text = "; ".join(f"{name}: {1e3 * t:.0f} ms" for name, t in s.items())
        lines.append(f"{r['op'].capitalize()} of the {r['model']} model, {r['T']} bytes, {r['dtype']}: {text}.")
    return lines


def render(name: str) -> str:
    data = json.loads((RESULTS / f"{name}.json").read_text())
    m, rows = data["machine"], data["rows"]
    ops = [r for r in rows if "direction" in r]
    shape = ops[0]
    about = (
        f"{m['cpu']} ({m['isa']}, {m['threads']} threads), torch {m['torch']}, {m['date']}, memory {m['memory']}. "
        f"D = {shape['D']}, {shape['N']} ragged sequences, mean chunk about 5; medians, one run: "
        f"`{m['command']}`."
    )
    return "\n".join([*op_table(ops), "", about, "", *step_lines([r for r in rows if "direction" not in r]), ""])


def update(text: str) -> str:
    return MARK.sub(lambda m: m[1] + render(m[2]) + m[3], text)


def main() -> int:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        if (new := update(text)) != text:
            path.write_text(new)
            print(f"updated {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
