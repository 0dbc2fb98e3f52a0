"""What a run writes beside its checkpoints: config.toml, metrics.jsonl, samples, plots, and what a person sees."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from hnet.config.run import RunConfig
from hnet.disk import full_disk, replacing
from hnet.errors import user_path
from hnet.events import Event

from .branches import HELD_OUT, METRICS, SAMPLES, Abandoned
from .console import TrainConsole
from .metrics import MetricsFile


class Journal:
    """Open inside `with`. `main`: this process writes and talks, others do neither. `done`: steps before."""

    def __init__(self, config: RunConfig, done: int, *, main: bool, plain: bool) -> None:
        self.config, self.done, self.main = config, done, main
        self.out = Path(config.out)
        self.console = TrainConsole(config.steps, done, quiet=not main, plain=plain)
        self.metrics: MetricsFile | None = None

    def __enter__(self) -> Journal:
        c = self.config
        if self.main:
            with user_path(self.out, "write"):
                (self.out / SAMPLES).mkdir(parents=True, exist_ok=True)
                with replacing(self.out / "config.toml") as partial:
                    partial.write_text(c.to_toml())
                self.metrics = MetricsFile(
                    self.out / METRICS, done=self.done, tensorboard=c.tensorboard, wandb=c.wandb,
                    config=dataclasses.asdict(c),
                )  # fmt: skip
        self.console.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.console.__exit__(*exc)
        if self.metrics is not None:
            self.metrics.close()
            if lost := len(self.metrics.waiting):
                self.say(f"{lost} rows of {self.out / METRICS} are lost: the disk is full")

    def say(self, text: str) -> None:
        self.console.say(text)

    def row(self, row: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self.metrics is not None:
            full = bool(self.metrics.waiting)
            if not self.metrics.write(row) and not full:
                self.event(row["step"], Event("disk_full", f"no room for {METRICS}: its rows wait until there is"))

    def event(self, step: int, event: Event) -> None:
        if not event.quiet:
            self.console.event(event.line or f"step {step}: {event.message}")
        self.row({"step": step, "event": event.name, "message": event.message})

    def abandoned(self, left: Abandoned | None) -> None:
        """Say what was moved aside; an event only where checkpoints were, not after a crash."""
        if left is not None:
            message = f"going on from step {self.done}; later {left}"
            if left.checkpoints:
                self.event(self.done, Event("abandoned", message, line=message))
            else:
                self.say(message)

    def sample(self, step: int, text: str, picture: Text) -> None:
        """A text to keep and, on a terminal, one to look at."""
        try:
            with replacing(self.out / SAMPLES / f"step_{step:08d}.txt") as partial:
                partial.write_text(text)
        except OSError as e:
            if not full_disk(e):
                raise
            self.event(step, Event("disk_full", f"no room for the sample of step {step}"))
        self.console.show(picture)

    def held_out(self, step: int, lines: Sequence[dict[str, Any]]) -> None:
        """Keep where boundaries of held-out lines are at an evaluation."""
        if not self.main or not lines:
            return
        try:
            with (self.out / HELD_OUT).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "lines": lines}, ensure_ascii=False) + "\n")
        except OSError as e:
            if not full_disk(e):
                raise
            self.event(step, Event("disk_full", f"no room for the held-out lines of step {step}"))

    def plots(self) -> None:
        from hnet.plots.run import plot_run  # matplotlib takes a second to import

        try:
            plot_run(self.out)
        except ImportError as e:
            self.say(f"no plots: {e}")
        except OSError as e:
            if not full_disk(e):
                raise
            self.say("no plots: the disk is full")
