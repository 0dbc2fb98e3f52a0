"""What the GPU kernels should cost, beside what was measured."""

from __future__ import annotations

from .files import gpu_results
from .markdown import line


def predicted_section(data: dict) -> str:
    """With a column for every GPU whose replays of the same shape have been measured."""
    rows, m = data["rows"], data["machine"]
    cards = gpu_results()
    head = ["op", "", "least MB", "MB as written", "launches", "registers x warps", "warps on an SM", "predicted µs"]
    head += [f"measured µs, {card['machine']['gpu']}" for card in cards]
    lines = [line(head), "|---|---|" + "--:|" * (len(head) - 2)]
    for r in rows:
        launches = r["launches"]
        cells = [
            r["op"],
            r["direction"],
            f"{r['minimal_bytes'] / 1e6:.0f}",
            f"{r['bytes'] / 1e6:.0f}",
            str(len(launches)),
        ]
        cells += [", ".join(f"{x['registers']} x {x['warps']}" for x in launches)]
        cells += [", ".join(str(x["resident"]) for x in launches), f"{1e6 * r['seconds']:.0f}"]
        lines.append(line([*cells, *(replay_of(r, card["rows"]) for card in cards)]))
    shape = rows[0]
    about = (
        f"**Predicted{'' if cards else ', none of it measured'}**, at T = {shape['T']}, D = {shape['D']}, mean chunk "
        f"{shape['chunk']}, {shape['dtype']}, {shape['N']} sequences, a budget, a gradient to come: from the bytes as "
        f"written, at {m['share']:g} of the {m['bandwidth'] / 1e12:g} TB/s that a copy moves on an H200, and at least "
        f"{1e6 * m['least']:g} µs a launch. As written: every tensor that a launch reads or writes, once. Registers of "
        f"a thread x warps of a block, and how many warps fit on a multiprocessor, of 64: as compiled for "
        f"{m['target']} by Triton {m['triton']}."
    )
    if any(r["op"] == "mamba2" for r in rows):
        about += " The products of a mamba2 layer take time besides."
    return "\n".join([*lines, "", about, ""])


def replay_of(row: dict, measured: list[dict]) -> str:
    same = [
        r for r in measured
        if r["op"] == f"{row['op']}, replayed" and all(r[k] == row[k] for k in ("direction", "T", "D", "chunk"))
    ]  # fmt: skip
    return f"{1e6 * same[0]['seconds'][same[0]['ours']]:.0f}" if same else ""
