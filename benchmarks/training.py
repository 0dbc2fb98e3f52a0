"""Longer experiments, minutes each, on the Python standard library: `python -m benchmarks.training NAME`.

    rate        does the realised bytes per chunk on held-out text meet the target? With and without rate control.
    curriculum  ChunkLM's frequency curriculum as it is shipped against full bandwidth from the start, at equal time,
                three seeds. `--seconds` of steps a run; epochs are as long as makes `--epochs` of them in that time;
                `--eval-bytes` are evaluated at the end of each.

Results go to benchmarks/results/training_NAME.json (or `--results FILE`) with machine, date and command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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
from .tables.experiments import curriculum_section, rate_section

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


def chunk_lm(out: Path, kind: str, seed: int, steps_per_epoch: int) -> ChunkLMTrainConfig:
    """A 1.9M-parameter ChunkLM whose curriculum and schedule are the defaults, but for their sizes: half the
    bins, so half of each cutoff."""
    return ChunkLMTrainConfig(
        data=[sysconfig.get_paths()["stdlib"]], pattern="*.py",
        exclude=["site-packages", "dist-packages", "test", "tests"], seq_len=512, kernel_len=64, chunk=8, width=256,
        n_layers=4, batch_size=16, accumulation=1, learning_rate=2e-3, dropout=0.0, curriculum=kind,
        cutoffs=[64, 128, 256, 0], steps_per_epoch=steps_per_epoch, epochs=1000, eval_bytes=1 << 10,
        log_every=1000, checkpoint_every=10**6, plots=False, sample_bytes=0, seed=seed, out=str(out),
    )  # fmt: skip


def seconds_per_step(out: Path, steps: int = 12) -> float:
    """At full bandwidth, the first few steps left out."""
    trainer = Trainer(chunk_lm(out, "none", 0, 1000), make_task=ChunkLMTask)
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        trainer.train_step()
        times.append(time.perf_counter() - begin)
    return sum(times[3:]) / len(times[3:])


def one_curriculum(c: ChunkLMTrainConfig, seconds: float, eval_bytes: int) -> dict:
    """A run that ends by the clock; the last stage of its learning rate ends there too."""
    trainer = Trainer(c, make_task=ChunkLMTask)
    launch = trainer.start_step

    def timed():
        spent = trainer.state.seconds
        left = (seconds - spent) / (spent / trainer.step) if trainer.step else c.steps
        trainer.schedule.steps = trainer.step + max(round(left), 1)
        trainer.stop = trainer.stop or spent >= seconds
        return launch()

    trainer.start_step = timed
    trainer.train()
    log = read_metrics(Path(c.out) / "metrics.jsonl")
    c.eval_bytes = eval_bytes  # at the end once, on more than along the way
    return {
        "curriculum": c.curriculum, "seed": c.seed, "seconds": trainer.state.seconds, "steps": trainer.step,
        "steps_per_epoch": c.steps_per_epoch, **trainer.evaluate(),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "curve": [[r["time"], r["val_bpb"], r.get("cutoff")] for r in log if "val_bpb" in r],
        "raises": [[r["step"], r["message"]] for r in log if r.get("event") == "cutoff_raised"],
        "last_lr": [r["lr"] for r in log if "lr" in r][-1] / c.learning_rate,
    }  # fmt: skip


def curriculum(out: Path, seconds: float, epochs: int, eval_bytes: int) -> list[dict]:
    """Either way gets the same time to train; the two take turns at being first."""
    steps_per_epoch = max(round(seconds / seconds_per_step(out / "speed") / epochs), 2)
    rows = []
    for seed in range(3):
        for kind in ("plateau", "none") if seed % 2 == 0 else ("none", "plateau"):
            c = chunk_lm(out / f"{kind}_{seed}", kind, seed, steps_per_epoch)
            rows.append(one_curriculum(c, seconds, eval_bytes))
            print({k: v for k, v in rows[-1].items() if k != "curve"}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("rate", "curriculum"))
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--eval-bytes", type=int, default=1 << 14)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    hk.keep_memory()
    command = f"python -m benchmarks.training {args.name}"
    with tempfile.TemporaryDirectory() as out:
        if args.name == "rate":
            rows = rate(Path(out))
        else:
            command += f" --seconds {args.seconds:g} --epochs {args.epochs} --eval-bytes {args.eval_bytes}"
            rows = curriculum(Path(out), args.seconds, args.epochs, args.eval_bytes)
    data = {"machine": machine() | {"command": command}, "rows": rows}
    path = args.results or RESULTS / f"training_{args.name}.json"
    path.write_text(json.dumps(data, indent=2) + "\n")
    section = rate_section if args.name == "rate" else curriculum_section
    print(section(data))


if __name__ == "__main__":
    main()
