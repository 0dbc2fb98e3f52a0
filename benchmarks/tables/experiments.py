"""Longer experiments (training.py, learning/decisive.py) and ChunkLM."""

from __future__ import annotations

from statistics import mean

from .markdown import line, mean_and_spread, where


def chunk_lm_section(data: dict) -> str:
    lines = ["| windows x bytes | | ms a step |", "|--:|---|--:|"]
    for r in data["rows"]:
        if r.get("model") == "ChunkLM" and r["op"] == "training step":
            for name, t in r["seconds"].items():
                lines.append(line([f"{r['B']} x {r['T']}", name, f"{1e3 * t:.0f}"]))
    return "\n".join([*lines, "", where(data["machine"]), ""])


def rate_section(data: dict) -> str:
    lines = [
        "| target | rate control | bytes per chunk, held out | off | held-out bits per byte |",
        "|--:|---|--:|--:|--:|",
    ]
    for r in data["rows"]:
        cells = [f"{r['target']:g}", r["rate_control"], f"{r['realised']:.2f}", f"{100 * r['off']:+.1f} %"]
        lines.append(line([*cells, f"{r['val_bpb']:.3f}"]))
    return "\n".join([*lines, "", where(data["machine"]), ""])


def curriculum_section(data: dict) -> str:
    """Mean and spread (standard deviation) over the seeds, and of the differences between runs of the same seed."""
    runs = {kind: [r for r in data["rows"] if r["curriculum"] == kind] for kind in ("plateau", "none")}
    lines = ["| curriculum | seconds in steps | steps | raises | held-out bits per byte |", "|---|--:|--:|---|--:|"]
    for kind, rows in runs.items():
        raises = "; ".join(", ".join(f"{step}" for step, _ in r["raises"]) or "-" for r in rows)
        name = "plateau" if kind == "plateau" else "none: full bandwidth"
        steps = mean_and_spread([r["steps"] for r in rows], 0)
        bpb = mean_and_spread([r["val_bpb"] for r in rows], 3)
        lines.append(line([name, f"{rows[0]['seconds']:.0f}", steps, raises if kind == "plateau" else "-", bpb]))
    if len(runs["none"]) > 1:
        full = {r["seed"]: r["val_bpb"] for r in runs["none"]}
        gains = [r["val_bpb"] - full[r["seed"]] for r in runs["plateau"]]
        lines.append(line([f"difference, {len(gains)} seeds", "", "", "", mean_and_spread(gains, 3, "+")]))
    return "\n".join([*lines, "", where(data["machine"]), ""])


def decisive_section(data: dict) -> str:
    """The rows of the same data, target and arm in one line; of where boundaries are, the mean and the worst seed."""
    groups: dict[tuple, list[dict]] = {}
    for r in data["rows"]:
        groups.setdefault((r["data"], r["boundaries_at"], r["steps"], r["target"], r["arm"]), []).append(r)
    lines = [
        "| data, steps | N | | seeds | held-out nats a symbol | bytes a chunk | F / G | p on / off, worst seed | at "
        "spaces or word starts, worst seed | spaces / word starts / second letters / inside words / other |",
        "|---|--:|---|--:|---|--:|---|---|--:|---|",
    ]
    for (name, at, steps, target, arm), rows in sorted(groups.items(), key=lambda g: (order(g[0][0]), g[0][3])):
        where = [[r["boundaries"][k] for k in r["boundaries"]] for r in rows]
        values = [r["val_ce"] for r in rows]
        spread = f" ({min(values):.3f} to {max(values):.3f})" if len(rows) > 1 else ""
        weights = [
            f"{k.partition('_')[0]} {v[0]:g}" for k, v in rows[0]["settings"].items() if "weight" in k and any(v)
        ]
        cells = [f"{name}{'' if at == 'any' else ', ' + at}, {steps}", f"{target:g}"]
        start = rows[0]["settings"].get("entropy_start", 0.3)
        early = f" from {100 * start:g} %" if start != 0.3 else ""
        held = ", share held" if rows[0]["settings"].get("surprisal_gain") else ""
        cells += [(" + ".join(weights) or arm) + early + held, str(len(rows))]
        cells += [f"{mean(values):.3f}{spread}", f"{mean(r['bytes_per_chunk'] for r in rows):.2f}"]
        cells += [f"{mean(r['F'] for r in rows):.3f} / {mean(r['G'] for r in rows):.3f}"]
        cells += [f"{min(r['p_on'] for r in rows):.2f} / {max(r['p_off'] for r in rows):.2f}"]
        cells += [f"{100 * min(w[0] + w[1] for w in where):.0f} %"]
        cells += [" / ".join(f"{mean(column):.2f}" for column in zip(*where, strict=True))]
        lines.append(line(cells))
    m = data["machine"]
    about = f"{m['cpu']} ({m['isa']}, 1 thread), torch {m['torch']}, {rows[0]['date']}; each row's command is in "
    return "\n".join([*lines, "", about + "`benchmarks/results/decisive.json`.", ""])


def order(name: str) -> int:
    known = ["tinyshakespeare", "tinyshakespeare-ngrams", "python", "telugu"]
    return known.index(name) if name in known else len(known)
