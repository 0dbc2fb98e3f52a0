"""torchrun starts all processes again when one of them dies, and the run ends with the bits of one that was left alone.
This file is also what those processes run: `hnet train`, in which one kills itself at a chosen call of a function."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from hnet.cli.main import main
from hnet.device import World
from hnet.metrics_log import read_metrics
from hnet.train.checkpoint import latest_checkpoint, load_trainer, load_weights
from hnet.train.distributed import meeting_place

from .conftest import tiny
from .test_resume import NOT_EXACT, equal

ROOT = Path(__file__).parents[2]


def work(config: str, victim: int, kill_at: int, notes: str) -> None:
    calls, first = 0, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    rank = int(os.environ["RANK"])

    def count(frame, event, argument):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            Path(notes, "killed").write_text(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            os.kill(os.getpid(), signal.SIGKILL)

    if first and rank == victim:
        sys.setprofile(count)
    try:
        main(["train", config, "--resume", "auto"])
    finally:
        sys.setprofile(None)
        Path(notes, f"calls.{rank}").write_text(json.dumps(calls))


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])


def torchrun(folder: Path, parallel: str, victim: int = 0, kill_at: int = 0) -> Path:
    """The run's folder."""
    folder.mkdir()
    config = dataclasses.replace(
        tiny(folder / "run"), parallel=parallel, checkpoint_every=3, weight_ema=0.9, rate_control="bias", dropout=0.1
    )
    (folder / "config.toml").write_text(config.to_toml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", "-m", "tests.train.test_elastic"]
    command += [str(folder / "config.toml"), str(victim), str(kill_at), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("w") as output:
        code = subprocess.run(
            command, env=environment, cwd=ROOT, timeout=600, check=False, stdout=output, stderr=subprocess.STDOUT
        ).returncode
    assert code == 0, (folder / "output.txt").read_text()[-2000:]
    return folder / "run"


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def straight(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    return request.param, torchrun(folder / "straight", request.param), folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_a_run_that_lost_a_process_ends_as_one_that_did_not(straight, seed, tmp_path):
    parallel, run, folder = straight
    draw = random.Random(f"{parallel} {seed}")
    total = json.loads((folder / "straight" / "calls.0").read_text())
    other = torchrun(tmp_path / "disturbed", parallel, draw.randrange(2), round(total * draw.uniform(0.1, 0.9)))
    assert (tmp_path / "disturbed" / "killed").exists()
    a, b = (latest_checkpoint(r / "checkpoints") for r in (run, other))
    assert a.name == b.name == "step_00000008"
    equal(load_weights(a), load_weights(b), "weights")
    first, second = load_trainer(a), load_trainer(b)
    del first["seconds"], second["seconds"]
    equal(first, second, "trainer")
    assert rows(run) == rows(other)


def rows(run: Path) -> list[dict]:
    all_rows = [r for r in read_metrics(run / "metrics.jsonl") if "event" not in r]
    return [{k: v for k, v in r.items() if k not in NOT_EXACT} for r in all_rows]


def test_processes_that_start_again_do_not_find_the_addresses_of_the_dead(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)  # torchrun's, which outlives them
    for name, value in dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port, GROUP_WORLD_SIZE=1).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        first, second = (meeting_place(World(rank, 2, rank)) for rank in (0, 1))
        assert not second.check(["address of 0"])
        first.set("address of 0", count)
        assert second.get("address of 0") == count.encode()
