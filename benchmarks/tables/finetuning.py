"""The table of benchmarks/results/finetuning.json."""

from __future__ import annotations

from typing import Any

from .markdown import line, where


def finetuning_section(data: dict[str, Any]) -> str:
    lines = [
        "| new text, steps | trained | | old text: before | after | new text: before | after | bytes a chunk |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in data["rows"]:
        cells = [f"{r['text']}, {r['steps']}", r["arm"], f"{r['trained'] / 1e6:.2f} of {r['parameters'] / 1e6:.2f} M"]
        cells += [f"{r[f'{text}_{when}']:.3f}" for text in ("old", "new") for when in ("before", "after")]
        lines.append(line([*cells, f"{r['bytes_per_chunk']:.2f}"]))
    return "\n".join([*lines, "", where(data["machine"]), ""])
