"""A trial in a process of its own: `python -m hnet.sweep.worker FOLDER THREADS`.

An ordinary run, which goes on from its checkpoint where there is one. Its end is one file, outcome.json: {"finished":
step} or {"failed": reason}; without that file it is not over. When the sweep is gone, which is when its standard input
ends, it saves and stops.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch

from hnet.config.keys import read_toml
from hnet.disk import replacing
from hnet.errors import UserError
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer

OUTCOME = "outcome.json"


def train(folder: Path) -> None:
    """The run whose config.toml is in `folder`, to its end or to where it is stopped."""
    outcome: dict[str, Any] | None = None
    try:
        config = TrainConfig(**read_toml(folder / "config.toml", TrainConfig))
        trainer = Trainer(config, resume="auto")
        if not over(trainer):  # killed after its last checkpoint, before its outcome
            trainer.train()
        if over(trainer):
            outcome = {"finished": trainer.step}
    except UserError as e:
        outcome = {"failed": " ".join(str(e).split())}
    except Exception as e:
        traceback.print_exc()
        outcome = {"failed": " ".join(f"{type(e).__name__}: {e}".split())[:1000]}
    if outcome is not None:
        with replacing(folder / OUTCOME) as partial:
            partial.write_text(json.dumps(outcome) + "\n")


def over(trainer: Trainer) -> bool:
    """At its last step, or stopped early for good."""
    return trainer.step >= trainer.config.steps or trainer.stopping.stop


def read_outcome(folder: Path) -> dict[str, Any] | None:
    """What `train` left; None while the run is not over."""
    path = folder / OUTCOME
    return json.loads(path.read_text()) if path.is_file() else None


def stop_with_the_sweep() -> None:
    """Whoever started this holds the other end of standard input, and lets go of it however it dies."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    threading.Thread(target=stop_with_the_sweep, daemon=True).start()
    train(folder)


if __name__ == "__main__":
    main()
