"""What fine-tuning brings, and what it costs the old text: `python -m benchmarks.finetuning FILE --base runs/demo`.

The base is a run, of `hnet demo` for instance, and what it holds out is the old text. Each of the `ARMS` trains on FILE
for `--steps` steps; before and after, held-out bits per byte of both texts. Rows are added to `--results` as runs end;
one that is there already is not run again. `python -m benchmarks.table` puts them into docs/finetuning.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

import hnet_kernels as hk
from hnet.config.keys import read_toml
from hnet.data.corpus import Corpus
from hnet.data.sources import open_data
from hnet.train.config import TrainConfig
from hnet.train.evaluation import evaluate_hnet
from hnet.train.loop import Trainer

from .harness import machine

RESULTS = Path(__file__).parent / "results" / "finetuning.json"
KEEP_CHUNKS = ["embeddings", "ngrams", "encoder", "router"]  # all that decides where chunks begin
# with frozen routers nothing should move the rate or teach
STILL: dict[str, Any] = {"rate_control": "none", "entropy_weight": [0.0], "surprisal_weight": [0.0]}
ARMS: dict[str, dict[str, Any]] = {
    "everything": {},
    "what decides on chunks frozen": {"freeze": KEEP_CHUNKS, **STILL},
    "only the inner network": {"freeze": [*KEEP_CHUNKS, "residual", "decoder", "lm_head"], **STILL},
    "adapters of rank 8 on blocks": {"lora_rank": 8},
    "everything, from scratch": {"init_from": ""},
}
KEY = ("text", "arm", "steps", "seed")


def configuration(base: TrainConfig, run: str, arm: str, text: str, steps: int, seed: int, out: str) -> TrainConfig:
    """The base's run on another text, from its weights, at a third of its rate; from scratch, at its own."""
    rate = base.learning_rate * (1.0 if arm.endswith("from scratch") else 0.3)
    keys = vars(base) | {
        "init_from": run, "data": [text], "val_data": [], "pattern": "*", "exclude": [], "documents": "file",
        "learning_rate": rate, "steps": steps, "epochs": 0.0, "warmup_steps": min(30, steps), "eval_every": steps,
        "checkpoint_every": steps, "plots": False, "sample_bytes": 0, "seed": seed, "out": out, "device": "cpu",
    }  # fmt: skip
    return TrainConfig(**keys | ARMS[arm])


def bits_per_byte(trainer: Trainer, old: Corpus, base: TrainConfig) -> float:
    """Of the old text, as the base's run evaluates."""
    how: dict[str, Any] = {"seq_len": base.seq_len, "batch_bytes": base.batch_bytes, "max_bytes": base.eval_bytes}
    return evaluate_hnet(trainer.model, old, trainer.autocast, **how).bpb


def run(config: TrainConfig, old: Corpus, base: TrainConfig) -> dict[str, Any]:
    """
    Raises:
        SystemExit: stopped before the last step.
    """
    trainer = Trainer(config)
    parameters = list(trainer.model.parameters())
    row = {
        "old_before": bits_per_byte(trainer, old, base),
        "new_before": trainer.evaluate()["val_bpb"],
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
    }
    result = trainer.train()
    if trainer.step < config.steps:
        raise SystemExit(f"stopped at step {trainer.step} of {config.steps}: no row")
    return row | {
        "old_after": bits_per_byte(trainer, old, base),
        "new_after": result["val_bpb"],
        "bytes_per_chunk": result["stage0/val_bytes_per_chunk"],
    }


def main(argv: list[str] | None = None) -> None:
    a = arguments().parse_args(argv)
    base = TrainConfig(**read_toml(a.base / "config.toml", TrainConfig))
    _, old = open_data(base, lambda _: None)
    for arm in a.arms:
        key = dict(zip(KEY, (Path(a.text).name, arm, a.steps, a.seed), strict=True))
        rows = json.loads(a.results.read_text())["rows"] if a.results.exists() else []
        if any(key == {k: r[k] for k in KEY} for r in rows):
            continue
        with tempfile.TemporaryDirectory() as folder:
            config = configuration(base, str(a.base), arm, a.text, a.steps, a.seed, folder + "/run")
            row = key | {"base_steps": base.steps} | run(config, old, base)
        row["date"] = datetime.date.today().isoformat()
        here = machine() | {"command": "python -m benchmarks.finetuning FILE --base RUN"}
        a.results.write_text(json.dumps({"machine": here, "rows": [*rows, row]}, indent=1) + "\n")
        print(json.dumps(row), flush=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", metavar="FILE")
    parser.add_argument("--base", type=Path, default=Path("runs/demo"), help="a run, with its config.toml")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    hk.keep_memory()
    main()
