"""The table of benchmarks/results/agglutinative.json."""

from __future__ import annotations

from statistics import mean
from typing import Any

from .arms import ARMS

RATES = (
    "| text, steps | | seeds | bytes a chunk (target), worst off | on a character's first / last byte | word starts "
    "found, worst | p on / off | bits per byte |\n|---|---|--:|---|---|--:|---|--:|"
)
MORPHEMES = (
    "| text, steps | F1 with morphemes | begin / predict (worst) | white space / random / BPE | inside words: begin / "
    "predict (worst) | random / BPE |\n|---|---|---|---|---|---|"
)


def section(data: dict[str, Any]) -> str:
    """Rows of the same text, steps and arm in one line, in the order of `ARMS`: means, and the worst seed."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in sorted(data["rows"], key=lambda r: (r["text"] != "synthetic", r["text"], list(ARMS).index(r["arm"]))):
        groups.setdefault((r["text"], r["steps"], r["chars_per_chunk"], r["arm"]), []).append(r)
    rates, morphemes = [RATES], [MORPHEMES]
    for (text, steps, _, arm), rows in groups.items():
        off = max((r["bytes_per_chunk"] / r["target"] - 1 for r in rows), key=abs)
        cells = [f"{text}, {steps}", arm, str(len(rows))]
        cells += [f"{average(rows, 'bytes_per_chunk'):.2f} ({rows[0]['target']:.2f}), {100 * off:+.0f} %"]
        cells += [f"{share(rows, 'char_start_share')} / {share(rows, 'char_end_share')}"]
        cells += [f"{share(rows, 'word_starts_found')}, {share(rows, 'word_starts_found', min)}"]
        cells += [f"{average(rows, 'p_on'):.2f} / {average(rows, 'p_off'):.2f}", f"{average(rows, 'val_bpb'):.3f}"]
        rates.append("| " + " | ".join(cells) + " |")
        if "morphemes" in rows[0]:
            cells = [*cells[:2], *f1_cells(rows, "morphemes", ("white space", "random", "BPE"))]
            cells += f1_cells(rows, "morphemes_inside", ("random", "BPE"))
            morphemes.append("| " + " | ".join(cells) + " |")
    m = data["machine"]
    about = f"{m['cpu']} ({m['isa']}, {m['threads']} threads), torch {m['torch']}, {data['rows'][-1]['date']}; "
    about += "the command of each row is in `benchmarks/results/agglutinative.json`."
    return "\n".join([*rates, "", *(morphemes if len(morphemes) > 1 else []), "", about, ""])


def f1_cells(rows: list[dict[str, Any]], key: str, others: tuple[str, ...]) -> list[str]:
    """Ours in both readings, and those of baselines at our rate"""
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
