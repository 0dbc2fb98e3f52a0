"""A sweep as PNG files: parallel coordinates, bits per byte against compression, and what each choice alone changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hnet.disk import replacing
from hnet.errors import user_path

from .run import BLUE, RED, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY = "#888888"
LONGEST = 24  # letters of a label


class Axis(NamedTuple):
    """A parameter. ticks: labels of its choices, empty for a range from low to high (step: between its values)."""

    name: str
    ticks: list[str]
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    step: float | None = None

    def place(self, value: Any) -> float:
        """From 0 (bottom) to 1."""
        if self.ticks:
            return (self.ticks.index(value) + 0.5) / len(self.ticks)
        low, high, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return (v - low) / (high - low)


class Point(NamedTuple):
    """A complete trial."""

    number: int
    value: float  # objective
    at: dict[str, Any]  # by parameter
    bpb: float | None
    bytes_per_chunk: float | None


def plot_sweep(
    folder: Path, axes: list[Axis], points: list[Point], *, objective: str, minimize: bool, base: int | None = None
) -> list[Path]:
    """Draw complete trials, of which there is at least one, into `folder`.

    base: the trial that one_at_a_time compares with.

    Returns the files written: parallel.png, compression.png if there are such metrics, effects.png with a base.
    """
    import matplotlib

    ranked = sorted(points, key=lambda p: p.value if minimize else -p.value)
    placed = [p for p in ranked if p.bpb is not None and p.bytes_per_chunk is not None]
    written = []
    with matplotlib.rc_context(STYLE):
        width = max(6.5, 1.9 * (len(axes) + 1))
        written.append(_save(folder / "parallel.png", (width, 4.6), lambda f: _parallel(f, axes, ranked, objective)))
        if placed:
            written.append(_save(folder / "compression.png", (7, 4.6), lambda f: _compression(f, placed)))
        if base is not None and any(p.number == base for p in points):
            rows = sum(len(a.ticks) for a in axes) + len(axes)
            size = (8, 1.2 + 0.24 * rows)
            written.append(_save(folder / "effects.png", size, lambda f: _effects(f, axes, points, objective, base)))
    return written


def pareto_front(points: list[Point]) -> list[Point]:
    """Those that no other beats in both: fewer bits per byte, more bytes a chunk. The most bytes a chunk first."""
    front: list[Point] = []
    for p in sorted(points, key=lambda p: (-(p.bytes_per_chunk or 0), p.bpb or 0)):
        if not front or (p.bpb or 0) < (front[-1].bpb or 0):
            front.append(p)
    return front


def _save(path: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    with user_path(path, "write"), replacing(path) as unfinished:
        figure.savefig(unfinished, format="png")
    return path


def _parallel(figure: Figure, axes: list[Axis], ranked: list[Point], objective: str) -> None:
    """A line for each trial, the better the darker; the best one thick. The last axis is the objective."""
    from matplotlib import colormaps

    ax = figure.subplots()
    low, high = min(p.value for p in ranked), max(p.value for p in ranked)
    last = Axis("objective", [], low, high if high > low else low + 1)
    columns = [*axes, last]
    for rank, p in reversed(list(enumerate(ranked))):
        at = [a.place(p.at[a.name]) for a in axes] + [last.place(p.value)]
        shade = RED if rank == 0 else colormaps["Blues_r"](0.1 + 0.65 * rank / max(len(ranked) - 1, 1))
        ax.plot(range(len(columns)), at, color=shade, linewidth=2.4 if rank == 0 else 1.1, alpha=0.9, clip_on=False)
    for x, a in enumerate(columns):
        ax.axvline(x, color="#333333", linewidth=0.8, zorder=0)
        for y, text in _ticks(a):
            ax.text(
                x + 0.03, y, text, fontsize=8, va="center", zorder=9, clip_on=False,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
            )  # fmt: skip
    ax.set_xticks(range(len(columns)), [a.name.replace("_", "\n") if len(a.name) > 10 else a.name for a in columns])
    ax.tick_params(axis="x", length=0)
    ax.set_yticks([])
    ax.set_xlim(-0.05, len(columns) - 0.6)
    ax.set_ylim(-0.02, 1.02)
    ax.grid(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    told = f"{len(ranked)} trials, the better the darker; the thick line is trial {ranked[0].number}, the best"
    ax.set_title(f"{told}\n{objective}", fontsize=10)


def _ticks(a: Axis) -> list[tuple[float, str]]:
    if a.ticks:
        return [(a.place(t), shorten(t)) for t in a.ticks]
    if a.log:
        values = [a.low * (a.high / a.low) ** (i / 4) for i in range(5)]
    elif a.step is not None and (count := round((a.high - a.low) / a.step)) <= 8:
        values = [a.low + i * a.step for i in range(count + 1)]
    else:
        values = [a.low + (a.high - a.low) * i / 4 for i in range(5)]
    return [(a.place(v), f"{v:.2g}" if a.log else f"{v:.4g}") for v in values]


def _compression(figure: Figure, ranked: list[Point]) -> None:
    ax = figure.subplots()
    front = pareto_front(ranked)
    names = {p.number for p in front} | {ranked[0].number}
    x, y = [p.bytes_per_chunk or 0 for p in front], [p.bpb or 0 for p in front]
    ax.plot(x, y, color=GREY, linewidth=1.0, zorder=1, drawstyle="steps-post")
    others = [p for p in ranked if p not in front]
    for group, color, label in ((others, "#9ecae1", "complete trials"), (front, BLUE, "Pareto front")):
        if group:
            x, y = [p.bytes_per_chunk or 0 for p in group], [p.bpb or 0 for p in group]
            ax.scatter(x, y, color=color, s=34, label=label, zorder=2)
    best = ranked[0]
    ax.scatter(
        [best.bytes_per_chunk or 0], [best.bpb or 0], facecolor="none", edgecolor=RED, s=130, linewidth=1.8, zorder=3,
        label="best objective",
    )  # fmt: skip
    for p in ranked:
        if p.number in names:
            at = (p.bytes_per_chunk or 0, p.bpb or 0)
            ax.annotate(f"{p.number}", at, xytext=(6, 5), textcoords="offset points", fontsize=8, zorder=4)
    ax.margins(0.08)
    ax.set_xlabel("bytes per chunk, held out (further right: the inner network is cheaper)")
    ax.set_ylabel("held-out bits per byte")
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)


def _effects(figure: Figure, axes: list[Axis], points: list[Point], objective: str, base: int) -> None:
    """A row for every choice, against the base."""
    ax = figure.subplots()
    origin = next(p for p in points if p.number == base)
    y, names = 0.0, []
    ax.axvline(origin.value, color=GREY, linewidth=1.0, zorder=0)
    for a in axes:
        ax.text(0.0, y, a.name, fontsize=9, weight="bold", va="center", transform=ax.get_yaxis_transform())
        y -= 1
        for tick in a.ticks:
            own = origin.at[a.name] == tick
            found = [p for p in points if p.at[a.name] == tick and (own or p.number != base)]
            value = origin.value if own else found[0].value if found else None
            if value is not None:
                ax.plot([origin.value, value], [y, y], color=GREY if own else BLUE, linewidth=1.2, zorder=1)
                ax.scatter(
                    [value], [y], color="white" if own else BLUE, edgecolor=GREY if own else BLUE, s=36, zorder=2
                )
            names.append((y, shorten(tick, 46) + (" (base)" if own else "" if found else " (no result)")))
            y -= 1
    ax.set_yticks([at for at, _ in names], [name for _, name in names], fontsize=8)
    ax.set_ylim(y + 0.4, 0.6)
    ax.margins(x=0.08)
    ax.set_xlabel(objective, fontsize=9)
    ax.set_title("each choice alone, the rest as in the base", fontsize=10)


def shorten(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
