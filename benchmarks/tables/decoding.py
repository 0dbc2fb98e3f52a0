"""Bytes a second of `generate` and of reading prompts, and a decoding step."""

from __future__ import annotations

from .markdown import where


def decode_lines(rows: list[dict]) -> list[str]:
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


def decoding_section(data: dict) -> str:
    rows = [r for r in data["rows"] if r["op"] in ("decoding", "prefill")]
    return (
        "\n".join([*(x for one in decode_lines(rows) for x in (one, "")), where(data["machine"]), ""]) if rows else ""
    )
