"""A run's held-out lines at every evaluation, beside the loss, as one HTML page that needs nothing else."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hnet.errors import MissingPath
from hnet.metrics_log import read_metrics

from .frame import begin, end, for_script

HELD_OUT = "held_out.jsonl"  # as hnet.train writes it
MOST = 200  # evaluations; of more, so many spread evenly

HEADER = """<p id="summary" aria-live="polite"></p>
<div id="controls">
<label for="evaluation">Evaluation <input type="range" id="evaluation" min="0" max="{last}" value="{last}"></label>
<button type="button" id="play">Play</button>
<label for="stage">Chunks of <select id="stage"></select></label>
<button type="button" id="theme">Light or dark</button>
</div>
<div id="chart"></div>
</header>
<main id="text"></main>
<noscript>This page draws its lines with JavaScript.</noscript>
<script type="application/json" id="data">{data}</script>
"""


def timeline(run: str | Path) -> str:
    """The page of a run directory.

    Raises:
        MissingPath: it keeps no held-out lines.
    """
    run = Path(run)
    if not (run / HELD_OUT).is_file():
        raise MissingPath(f"{run} holds no {HELD_OUT}: a run of an H-Net writes it at every evaluation")
    kept = {row["step"]: row["lines"] for row in read_metrics(run / HELD_OUT) if row.get("lines")}
    if not kept:
        raise MissingPath(f"{run / HELD_OUT} has no whole evaluation")
    rows = {r["step"]: r for r in read_metrics(run / "metrics.jsonl") if "val_bpb" in r}
    steps = sorted(kept)
    chosen = np.linspace(0, len(steps) - 1, min(MOST, len(steps))).round().astype(int)
    evaluations = [_evaluation(s, kept[s], rows.get(s, {})) for s in (steps[i] for i in chosen)]
    stages = max(len(line["starts"]) for line in kept[steps[-1]])
    data = for_script({"stages": stages, "evaluations": evaluations})
    header = HEADER.format(last=len(evaluations) - 1, data=data)
    return begin(str(run), "timeline") + header + end("timeline.js")


def _evaluation(step: int, lines: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """What timeline.js reads: its head has the form."""
    wanted = [k for k in row if k == "val_bpb" or k.endswith(("val_bytes_per_chunk", "flips"))]
    numbers = {k.removeprefix("val_"): row[k] for k in wanted}
    shown = [[_chunks(line["text"].encode(), starts) for starts in line["starts"]] for line in lines]
    return {"step": step, "numbers": numbers, "lines": shown}


def _chunks(text: bytes, starts: list[int]) -> list[list[Any]]:
    edges = sorted({0, *starts, len(text)})
    begun = set(starts)
    out: list[list[Any]] = []
    for a, b in pairwise(edges):
        for k, (part, is_hex) in enumerate(_parts(text, a, b)):
            out.append([a if k == 0 else -1, part, int(is_hex), int(k == 0 and a in begun)])
    return out


def _parts(text: bytes, a: int, b: int) -> list[tuple[str, bool]]:
    """Whole characters as text, bytes of one that the chunk shares with another as hex."""
    left, right = a, b
    while left < b and text[left] & 0xC0 == 0x80:
        left += 1
    while right > left and right < len(text) and text[right] & 0xC0 == 0x80:
        right -= 1
    cut = [(_hex(text[a:left]), True), (text[left:right].decode(), False), (_hex(text[right:b]), True)]
    return [(part, is_hex) for part, is_hex in cut if part]


def _hex(data: bytes) -> str:
    return "·".join(f"{byte:02X}" for byte in data)
