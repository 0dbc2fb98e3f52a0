"""Plots of benchmarks/results/cpu.json for README and docs/benchmarks.md: `python -m benchmarks.plots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hnet.plots.run import STAGE_COLORS, STYLE

from .tables import files, laptop
from .tables.markdown import best

DOCS = files.ROOT / "docs"


def draw_speed(rows: list[dict[str, Any]], path: Path) -> None:
    """Of every op, forward and backward in bf16: how many times longer the fastest of others take."""
    own = [r for r in rows if r.get("direction") in ("forward+backward", "both") and r["dtype"] == "bfloat16"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.55 * len(own) + 1.2), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for i, (kind, name) in enumerate((("compile", "torch.compile"), ("eager", "eager PyTorch"))):
            times = [best(r["seconds"], kind) for r in own]
            ratios = [0.0 if t is None else t / r["seconds"][r["ours"]] for t, r in zip(times, own, strict=True)]
            bars = axes.barh(
                [y + 0.36 * (i - 0.5) for y in range(len(own))], ratios, 0.34, color=STAGE_COLORS[i], label=name
            )
            axes.bar_label(bars, [f"{x:.1f}x" if x else "" for x in ratios], padding=3, fontsize=9)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(own)), [r["op"] for r in own])
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlabel("time of the fastest other form / ours (forward and backward, bf16)")
        axes.legend(loc="lower right")
        figure.savefig(path, metadata={"Software": None})


def draw_scaling(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for every size that grows: seconds of a round trip against it, both logarithmic."""
    own = [r for r in rows if "slope" in r]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.8), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(own), squeeze=False)[0]
        for axes, r in zip(panels, own, strict=True):
            sizes, ms = [int(n) for n in r["seconds"]], [1e3 * t for t in r["seconds"].values()]
            axes.loglog(sizes, ms, "o-", color=STAGE_COLORS[0])
            axes.set_xlabel(r["op"].removeprefix("round trip over "))
            axes.set_title(f"slope {r['slope']:.2f}", fontsize=11)
            low, high = (f(t for r in own for t in r["seconds"].values()) for f in (min, max))
            axes.set_ylim(0.7e3 * low, 1.4e3 * high)
            axes.minorticks_off()
            axes.set_xticks(sizes[::2], [str(n) for n in sizes[::2]])
            ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200) if 700 * low < t < 1400 * high]
            axes.set_yticks(ticks, [str(t) for t in ticks])
        panels[0].set_ylabel("ms, forward and backward")
        figure.savefig(path, metadata={"Software": None})


def draw_step(rows: list[dict[str, Any]], path: Path) -> None:
    """The parts of the laptop's training step: their shares, for every size of a pack, the largest above."""
    own = laptop.steps_of({"rows": rows})
    parts = sorted(own[-1]["parts"], key=lambda part: -own[-1]["parts"][part])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.4 * len(parts) + 0.9), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        height = 0.8 / len(own)
        for i, row in enumerate(own):
            places = [y + height * (i - (len(own) - 1) / 2) for y in range(len(parts))]
            shares = [100 * row["parts"][part] for part in parts]
            bars = axes.barh(places, shares, 0.9 * height, color=STAGE_COLORS[i], label=f"packs of {row['T']:,} bytes")
            axes.bar_label(bars, [f"{x:.0f}" for x in shares], padding=3, fontsize=9)
        axes.set_yticks(range(len(parts)), parts)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlabel("% of a training step")
        axes.legend(loc="lower right")
        figure.savefig(path, metadata={"Software": None})


def main() -> None:
    rows = files.load("cpu")["rows"]
    for draw, name in ((draw_speed, "speed.png"), (draw_scaling, "scaling.png")):
        draw(rows, DOCS / name)
        print(f"drew docs/{name}")
    if laptop.steps_of({"rows": rows}):
        draw_step(rows, DOCS / laptop.PICTURE)
        print(f"drew docs/{laptop.PICTURE}")


if __name__ == "__main__":
    main()
