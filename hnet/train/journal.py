"""What a run writes beside its checkpoints: config.toml, metrics.jsonl, samples, plots, and what a person sees."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.text import Text

from hnet.config.run import RunConfig
from hnet.errors import user_path
from hnet.events import Event

from .console import TrainConsole
from .metrics import MetricsFile, truncate_metrics


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
                (self.out / "samples").mkdir(parents=True, exist_ok=True)
                (self.out / "config.toml").write_text(c.to_toml())
            path = self.out / "metrics.jsonl"
            truncate_metrics(path, self.done)
            self.metrics = MetricsFile(path, tensorboard=c.tensorboard, wandb=c.wandb, config=dataclasses.asdict(c))
        self.console.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.console.__exit__(*exc)
        if self.metrics is not None:
            self.metrics.close()

    def say(self, text: str) -> None:
        self.console.say(text)

    def row(self, row: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self.metrics is not None:
            self.metrics.write(row)

    def event(self, step: int, event: Event) -> None:
        self.console.event(event.line or f"step {step}: {event.message}")
        self.row({"step": step, "event": event.name, "message": event.message})

    def sample(self, step: int, text: str, picture: Text) -> None:
        """A text to keep and, on a terminal, one to look at."""
        (self.out / "samples" / f"step_{step:08d}.txt").write_text(text)
        self.console.show(picture)

    def plots(self) -> None:
        from hnet.plots.run import plot_run  # matplotlib takes a second to import

        try:
            plot_run(self.out)
        except ImportError as e:
            self.say(f"no plots: {e}")
