"""What every table is made of: lines, comparisons, and which machine measured."""

from __future__ import annotations

from statistics import mean, stdev

KINDS = ("eager", "compile", "published")


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def best(seconds: dict[str, float], kind: str) -> float | None:
    return min((t for name, t in seconds.items() if name.startswith(kind)), default=None)


def of_copy(row: dict) -> float:
    """Share of the copy bandwidth of the same run, in percent."""
    s = row["seconds"]
    return 100 * (row["bytes"] / s[row["ours"]]) / (row["copy_bytes"] / s["copy"])


def against(row: dict, kind: str) -> str:
    t = best(row["seconds"], kind)
    return "" if t is None else f"{1e3 * t:.2f} ms ({t / row['seconds'][row['ours']]:.1f}x)"


def where(m: dict) -> str:
    return f"{m['cpu']} ({m['isa']}, {m['threads']} threads), torch {m['torch']}, {m['date']}: `{m['command']}`."


def mean_and_spread(values: list[float], digits: int, sign: str = "") -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{spread}"
