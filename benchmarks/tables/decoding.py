"""Bytes a second of `generate` and of reading prompts, and a decoding step."""

from __future__ import annotations

from .markdown import line, where


def decode_lines(rows: list[dict]) -> list[str]:
    """A line for each row, as the tables of a GPU have them."""
    lines = []
    for r in rows:
        if "D" in r:
            text = ", ".join(f"{name} {1e6 * t:.0f} us" for name, t in r["seconds"].items())
            lines.append(f"{r['op'].capitalize()} of {r['B']} sequences, D = {r['D']}: {text}.")
        elif r["op"] == "prefill":
            text = ", ".join(f"{name} {r['B'] * r['length'] / t:.0f} bytes/s" for name, t in r["seconds"].items())
            lines.append(f"Prefill, {r['B']} x {r['length']} bytes, with {r['model']}, {r['dtype']}: {text}.")
        else:
            text = ", ".join(f"{name} {r['B'] / t:.0f} bytes/s" for name, t in r["seconds"].items())
            lines.append(f"{r['op'].capitalize()} {r['B']} sequences with {r['model']}, {r['dtype']}: {text}.")
    return lines


def rate_table(rows: list[dict]) -> list[str]:
    """Bytes a second: a line for each model and way, a column for each number of sequences."""
    columns = sorted({r["B"] for r in rows})
    cells: dict[tuple[str, str], dict[int, float]] = {}
    for r in rows:
        for name, t in r["seconds"].items():
            key = (f"{r['op']}, {r['model']}, {r['dtype']}", name)
            cells.setdefault(key, {})[r["B"]] = r["B"] * r.get("length", 1) / t
    table = [
        line(["", "", *(f"{B} texts" if B > 1 else "1 text" for B in columns)]),
        line(["---"] * 2 + ["--:"] * len(columns)),
    ]
    for (label, name), found in cells.items():
        table.append(line([label, name, *(f"{found[B]:,.0f}" if B in found else "" for B in columns)]))
    return table


def weights_lines(rows: list[dict]) -> list[str]:
    """Weights read a second, beside a plain product of a large matrix with a vector."""
    lines = []
    for r in rows:
        t, plain = r["seconds"]["ours"], r["seconds"]["plain product"]
        lines.append(
            f"{r['model']}, {r['dtype']}, {r['B']} at once: {r['B'] / t:.1f} bytes/s, {r['bytes'] / t / 1e9:.1f} GB/s "
            f"of weights, {100 * plain / t:.0f} % of a plain product with a vector."
        )
    return lines


def context_lines(rows: list[dict]) -> list[str]:
    return [
        f"{r['model']}, {r['dtype']}, {r['B']} at once: "
        + ", ".join(f"{name} {r['B'] / t:,.0f} bytes/s" for name, t in r["seconds"].items())
        + "."
        for r in rows
    ]


def decoding_section(data: dict) -> str:
    def of(*ops: str) -> list[dict]:
        return [r for r in data["rows"] if r["op"] in ops]

    rates = of("decoding", "prefill")
    if not rates:
        return ""
    paragraphs = [*weights_lines(of("weights of a step")), *context_lines(of("context"))]
    blank = [x for one in paragraphs for x in (one, "")]
    return "\n".join([*rate_table(rates), "", *blank, where(data["machine"]), ""])
