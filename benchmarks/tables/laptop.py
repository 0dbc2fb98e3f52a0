"""The laptop's training step: how fast, how near to the machine's peak, and which part takes how much."""

from __future__ import annotations

from .markdown import line, where

PICTURE = "step.png"


def steps_of(data: dict) -> list[dict]:
    return sorted((r for r in data["rows"] if r["op"] == "laptop step"), key=lambda r: r["T"])


def told(row: dict) -> str:
    """One row in a line, the largest parts first."""
    t, parts = row["seconds"][row["ours"]], sorted(row["parts"].items(), key=lambda part: -part[1])
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in parts)
    return (
        f" = {row['text_bytes'] / t / 1e3:.1f} kB/s, {100 * row['of_peak']:.0f} % of the {row['peak_flops'] / 1e9:.0f} "
        f"GFLOP/s of a matrix product, {row['bytes_per_chunk']:.2f} bytes a chunk; {shares}"
    )


def laptop_step_section(data: dict) -> str:
    rows = steps_of(data)
    if not rows:
        return ""
    lines = [
        "| pack, bytes | dtype | a step | kB/s | MFLOP a byte | GFLOP/s | of a matrix product's | bytes a chunk | "
        "p on / off |",
        "|--:|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for r in rows:
        t = r["seconds"][r["ours"]]
        cells = [f"{r['T']:,}", r["dtype"], f"{1e3 * t:.0f} ms", f"{r['text_bytes'] / t / 1e3:.1f}"]
        cells += [f"{r['flops_per_byte'] / 1e6:.2f}", f"{r['flops_per_byte'] * r['text_bytes'] / t / 1e9:.0f}"]
        cells += [f"{100 * r['of_peak']:.0f} % of {r['peak_flops'] / 1e9:.0f}", f"{r['bytes_per_chunk']:.2f}"]
        lines.append(line([*cells, f"{r['p_on']:.2f} / {r['p_off']:.2f}"]))
    lines += ["", line(["part", *(f"of {r['T']:,} bytes" for r in rows)]), "|---|" + "--:|" * len(rows)]
    for part in sorted(rows[-1]["parts"], key=lambda part: -rows[-1]["parts"][part]):
        shares = [f"{100 * r['parts'][part]:.1f} % ({1e3 * r['parts'][part] * r['watched']:.1f} ms)" for r in rows]
        lines.append(line([part, *shares]))
    watched = [f"{1e3 * r['watched']:.0f} ms" for r in rows]
    lines.append(line(["all, the stopwatch included", *watched]))
    return "\n".join([*lines, "", f"![Shares of the step by part]({PICTURE})", "", where(data["machine"]), ""])
