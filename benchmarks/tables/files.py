"""Where results are, and reading them."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def gpu_results() -> list[dict]:
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json")) if ".unfinished" not in p.name]
    return [data for data in found if "gpu" in data["machine"]]
