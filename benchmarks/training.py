"""Longer experiments, minutes each, on the Python standard library: `python -m benchmarks.training NAME`.

    rate        does the realised bytes per chunk on held-out text meet the target? With and without rate control.
    curriculum  ChunkLM's frequency curriculum against full bandwidth from the start, at equal wall-clock.

Results go to benchmarks/results/training_NAME.json with machine, date and command.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import hnet_kernels as hk
from hnet.chunk_lm.task import ChunkLMTask
from hnet.chunk_lm.train_config import ChunkLMTrainConfig
from hnet.cli.demo import config as demo_config
from hnet.metrics_log import read_metrics
from hnet.train.loop import Trainer

from .harness import machine

RESULTS = Path(__file__).parent / "results"


def rate(out: Path) -> list[dict]:
    """The demo's model and settings, 600 steps, for each target; evaluated on 256 KiB of held-out files."""
    rows = []
    for target in (3.0, 5.0, 8.0):
        for control in ("bias", "none"):
            run = out / f"{target:g}_{control}"
            c = dataclasses.replace(
                demo_config(str(run), 600), compression=[target], rate_control=control, ratio_weight="auto",
                eval_bytes=1 << 18, plots=False, sample_bytes=0,
            )  # fmt: skip
            begin = time.perf_counter()
            result = Trainer(c).train()
            realised = result["stage0/val_bytes_per_chunk"]
            rows.append(
                {
                    "target": target, "rate_control": control, "realised": realised, "off": realised / target - 1,
                    "val_bpb": result["val_bpb"], "seconds": time.perf_counter() - begin,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def curriculum(out: Path, seconds: float = 120.0) -> list[dict]:
    """A 1.5M-parameter ChunkLM, constant rate but for the last fifth; each way gets the same time to train."""
    rows = []
    for kind in ("plateau", "none"):
        run = out / kind
        c = ChunkLMTrainConfig(
            data=[sysconfig.get_paths()["stdlib"]], pattern="*.py",
            exclude=["site-packages", "dist-packages", "test", "tests"], seq_len=512, kernel_len=64, chunk=8, width=256,
            n_layers=4, batch_size=16, accumulation=1, steps_per_epoch=100, epochs=1000, learning_rate=2e-3,
            dropout=0.0, schedule="constant", warmup_steps=50, curriculum=kind, cutoffs=[64, 128, 256, 0],
            min_epoch_before_raise=1, plateau_threshold=0.02, eval_every=100, eval_bytes=1 << 14,
            checkpoint_every=10**6, plots=False, sample_bytes=0, out=str(run),
        )  # fmt: skip
        trainer = Trainer(c, make_task=ChunkLMTask)
        launch = trainer.start_step

        def timed(trainer=trainer, launch=launch):
            left = 1 - trainer.state.seconds / seconds
            trainer.schedule.cut = min(1.0, max(left, 0.02) / 0.2)  # linear decay by the clock
            trainer.stop = trainer.stop or left <= 0
            return launch()

        trainer.start_step = timed
        trainer.train()
        final = trainer.evaluate()
        log = read_metrics(run / "metrics.jsonl")
        rows.append(
            {
                "curriculum": kind, "seconds": trainer.state.seconds, "steps": trainer.step, **final,
                "parameters": sum(p.numel() for p in trainer.model.parameters()),
                "curve": [[r["time"], r["val_bpb"], r.get("cutoff")] for r in log if "val_bpb" in r],
                "raises": [[r["step"], r["message"]] for r in log if r.get("event") == "cutoff_raised"],
            }
        )  # fmt: skip
        print({k: v for k, v in rows[-1].items() if k != "curve"}, flush=True)
    return rows


def main() -> None:
    known = {"rate": rate, "curriculum": curriculum}
    if len(sys.argv) != 2 or sys.argv[1] not in known:
        raise SystemExit(f"usage: python -m benchmarks.training {'|'.join(known)}")
    name = sys.argv[1]
    hk.keep_memory()
    with tempfile.TemporaryDirectory() as out:
        rows = known[name](Path(out))
    about = machine() | {"command": f"python -m benchmarks.training {name}"}
    (RESULTS / f"training_{name}.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
