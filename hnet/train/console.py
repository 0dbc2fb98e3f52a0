"""What a person sees of a run: a live line on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

LOG_SECONDS = 15.0


class TrainConsole:
    def __init__(self, steps: int, done: int, *, quiet: bool = False, plain: bool = True) -> None:
        """plain: in a log, where no line can be live, print one every 15 s."""
        self.console = Console(highlight=False, quiet=quiet)
        self.steps, self.plain = steps, plain
        self.live = self.console.is_terminal
        self.progress = Progress(
            BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn(),
            TextColumn("ETA"), TimeRemainingColumn(), console=self.console, disable=not self.live,
        )  # fmt: skip
        self.task = self.progress.add_task("train", total=steps, completed=done, text="")
        self.begin, self.first, self.logged = time.monotonic(), done, 0.0

    def __enter__(self) -> TrainConsole:
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False)

    def show(self, picture: Text) -> None:
        """On a terminal only."""
        if self.live:
            self.progress.console.print(picture)

    def event(self, text: str) -> None:
        self.progress.console.print(text, markup=False, style="yellow")

    def update(self, row: dict[str, Any]) -> None:
        chunks = ", ".join(f"{v:.2f}" for k, v in row.items() if k.endswith("/bytes_per_chunk"))
        chunks = f"bytes/chunk {chunks}" if chunks else f"cutoff {row.get('cutoff')}"
        speed = row["bytes_per_second"] / 1e3
        text = f"loss {row['loss']:.3f}  bpb {row['bpb']:.3f}  {chunks}  {speed:.1f} kB/s"
        self.progress.update(self.task, completed=row["step"], text=text)
        now = time.monotonic()
        if self.plain and not self.live and (now - self.logged > LOG_SECONDS or row["step"] == self.steps):
            left = (now - self.begin) / max(row["step"] - self.first, 1) * (self.steps - row["step"])
            self.say(f"step {row['step']}/{self.steps}  {text}  ETA {int(left) // 60}:{int(left) % 60:02d}")
            self.logged = now
