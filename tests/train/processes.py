"""Two real processes over gloo, for the tests: `run` starts them on a list of jobs, one trainer each, and this file is
also what they run. They leave their results in files, which `found` reads."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hnet.errors import RunFailed
from hnet.train.config import TrainConfig
from hnet.train.distributed import finish, named_state
from hnet.train.loop import Trainer
from hnet.train.shards import all_rows

from .conftest import fill, make_room
from .test_resume import NOT_EXACT

ROOT = Path(__file__).parents[2]
STEP = {"max_grad_norm": 0.05, "warmup_steps": 0, "schedule": "constant", "dtype": "fp32"}  # the norm is about 1
RUN = {"rate_control": "bias", "weight_ema": 0.9, "dropout": 0.1, "dtype": "fp32", "ratio_reduction": "global"}


# --- outside of them ------------------------------------------------------------------------------------------------


def run(folder: Path, jobs: list[dict], processes: int = 2) -> list[int]:
    """Exit codes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    shared |= {"WORLD_SIZE": str(processes), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.train.processes", str(folder / "jobs.json"), str(folder)]
    started = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)}, cwd=ROOT,
                         stdout=subprocess.DEVNULL)
        for r in range(processes)
    ]  # fmt: skip
    try:
        return [p.wait(timeout=600) for p in started]
    finally:
        for p in started:
            p.kill()


def job(name: str, config: TrainConfig, do: str, **more) -> dict:
    return {"name": name, "config": dataclasses.asdict(config), "do": do, **more}


def found(folder: Path, name: str, rank: int = 0) -> dict:
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=True)


# --- in the processes -----------------------------------------------------------------------------------------------


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    weights = {f"weight/{n}": p for n, p in trainer.model.named_parameters()}
    average = {} if trainer.ema is None else {f"ema/{n}": a for n, a in trainer.ema.named().items()}
    tensors = {**weights, **named_state(trainer.model, trainer.optimizers), **average}
    return {k: all_rows(v).detach().clone() for k, v in tensors.items()}


def work(jobs: str, results: str) -> None:
    for job in json.loads(Path(jobs).read_text()):
        error = ""
        try:
            do(job, results)
        except (RunFailed, OSError) as e:
            if "fails" not in job:
                raise
            error = f"{type(e).__name__}: {e}"
        if "fails" in job:
            (Path(results) / f"{job['name']}.{os.environ['RANK']}.error").write_text(error)


class Traffic(TorchDispatchMode):
    """Collectives of fsdp, by kind and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for kind in ("allgather_base", "reduce_scatter_base"):
            if kind in func._schema.name:
                self.counts[f"{kind} {tree_leaves(args)[0].dtype}"] += 1
        return func(*args, **(kwargs or {}))


def skipped(trainer: Trainer) -> bool:
    """Whether an update that is not finite, as taken on a GPU, leaves everything as it was."""
    before = state_of(trainer)
    for p in trainer.model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    trainer.optimizers.step_without_waiting(torch.tensor(False))
    trainer.optimizers.zero_grad()
    after = state_of(trainer)
    return all(torch.equal(v, after[k]) for k, v in before.items() if not k.startswith("step/"))


def do(job: dict, results: str) -> None:
    rank = int(os.environ["RANK"])
    if "out_by_process" in job:
        job["config"]["out"] = job["out_by_process"][rank]
    if "resume_by_process" in job:
        job["resume"] = job["resume_by_process"][rank]
    trainer = Trainer(TrainConfig(**job["config"]), resume=job.get("resume", False))
    launch, rows = trainer.start_step, []
    at = {int(step): what for step, what in job.get("at", {}).items()}

    def report(row, rows=rows, trainer=trainer):
        rows.append({k: v for k, v in row.items() if k not in NOT_EXACT})
        Trainer._report(trainer, row)

    def step(at=at, rank=rank, launch=launch, trainer=trainer):
        what = at.get(trainer.step)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "interrupt" and rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        if what == "raise" and rank == 1:
            raise ValueError("something is wrong on one process")
        if what == "fill" and rank == 0:
            fill(Path(job["disk"]), job["left"])
        if what == "make room" and rank == 0:
            make_room(Path(job["disk"]))
        if what == "roll back":
            trainer.state.roll_back(until=trainer.step)
        return launch()

    trainer.start_step, trainer._report = step, report
    found = {}
    if job["do"] == "step":
        with Traffic() as traffic:
            rows.append(trainer.train_step())
        found["traffic"] = dict(traffic.counts)
    elif job["do"] == "steps":
        rows += [trainer.train_step() for _ in range(4)]
    elif job["do"] == "train":
        trainer.train()
    if "fails" in job:  # perhaps on one process alone
        return
    bias = [s.logit_bias for s in trainer.task.compression.stages]
    found |= {"rows": rows, "bias": bias, "state": state_of(trainer)}
    if job["do"] == "steps":
        found["skipped"] = skipped(trainer)
    torch.save(found, Path(results) / f"{job['name']}.{rank}.pt")


if __name__ == "__main__":
    try:
        work(*sys.argv[1:])
    finally:
        finish()
