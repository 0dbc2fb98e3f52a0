"""Ours beside a peer and torch.compile, with the projections that all of them need and without."""

from __future__ import annotations

from .markdown import line, where

ALONE = "projections alone"


def peers_table(rows: list[dict]) -> list[str]:
    peer = rows[0]["peer"]
    lines = [line(["", "", "ours", "torch.compile", peer, "the projections alone"]), "|---|---|--:|--:|--:|--:|"]
    for r in rows:
        s = r["seconds"]
        cells = ["projections included" if r["projections"] else "without", r["direction"], f"{1e3 * s['ours']:.1f} ms"]
        cells += [f"{1e3 * s[name]:.1f} ms ({s[name] / s['ours']:.2f}x)" for name in ("torch.compile", peer)]
        lines.append(line([*cells, f"{1e3 * s[ALONE]:.1f} ms" if ALONE in s else ""]))
    return lines


def peers_section(data: dict) -> str:
    rows = [r for r in data["rows"] if r["op"] == "peers" and r["device"] == "cpu"]
    return "\n".join([*peers_table(rows), "", where(data["machine"]), ""]) if rows else ""
