"""The table of benchmarks/results/agglutinative.json."""

from __future__ import annotations

from statistics import mean
from typing import Any

HEAD = (
    "| text, steps | arm | seeds | bytes a chunk (target), worst off | on a character's first / last byte | word "
    "starts found, worst | morphemes F1: chunks begin / predict (worst) | white space / random / BPE | inside words: "
    "begin / predict (worst) | random / BPE | p on / off | bits per byte |"
)


def section(data: dict[str, Any]) -> str:
    """Rows of the same text, steps and arm in one line, in the order they came: means, and the worst seed."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in data["rows"]:
        groups.setdefault((r["text"], r["steps"], r["chars_per_chunk"], r["arm"]), []).append(r)
    lines = [HEAD, "|---|---|--:|---|---|--:|--:|---|--:|---|---|--:|"]
    for (text, steps, _, arm), rows in groups.items():
        off = max((r["bytes_per_chunk"] / r["target"] - 1 for r in rows), key=abs)
        cells = [f"{text}, {steps}", arm, str(len(rows))]
        cells += [f"{average(rows, 'bytes_per_chunk'):.2f} ({rows[0]['target']:.2f}), {100 * off:+.0f} %"]
        cells += [f"{share(rows, 'char_start_share')} / {share(rows, 'char_end_share')}"]
        cells += [f"{share(rows, 'word_starts_found')}, {share(rows, 'word_starts_found', min)}"]
        cells += f1_cells(rows, "morphemes", ("white space", "random", "BPE"))
        cells += f1_cells(rows, "morphemes_inside", ("random", "BPE"))
        cells += [f"{average(rows, 'p_on'):.2f} / {average(rows, 'p_off'):.2f}", f"{average(rows, 'val_bpb'):.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    m = data["machine"]
    about = (
        f"{m['cpu']} ({m['isa']}, {m['threads']} threads), torch {m['torch']}, {data['rows'][-1]['date']}; the command"
    )
    return "\n".join([*lines, "", f"{about} of each row is in `benchmarks/results/agglutinative.json`.", ""])


def f1_cells(rows: list[dict[str, Any]], key: str, others: tuple[str, ...]) -> list[str]:
    """Ours in both readings, and those of baselines at our rate"""
    if key not in rows[0]:
        return ["", ""]
    begin, predicted = [f1(r[key]) for r in rows], [f1(r["ahead"][key]) for r in rows]
    beside = [mean(f1(r["baselines"][name][key]) for r in rows) for name in others]
    ours = f"{mean(begin):.2f} / {mean(predicted):.2f} ({min(predicted):.2f})"
    return [ours, " / ".join(f"{x:.2f}" for x in beside)]


def f1(agreement: dict[str, Any]) -> float:
    return agreement["f1"] or 0.0  # null: neither found nor there


def values(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [r[key] for r in rows if r[key] is not None]


def average(rows: list[dict[str, Any]], key: str) -> float:
    return mean(values(rows, key) or [float("nan")])


def share(rows: list[dict[str, Any]], key: str, how: Any = mean) -> str:
    found = values(rows, key)
    return f"{100 * how(found):.0f} %" if found else "-"
