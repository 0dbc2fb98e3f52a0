"""Two cards over NCCL against one process on one card."""

import dataclasses

import pytest
import torch

from hnet.train.loop import Trainer

from ..train.conftest import tiny
from ..train.processes import STEP, found, job, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices, one a process, for NCCL"),
]
CHANGES = {
    "batch": {},
    "accumulated": {"accumulation": 2, "recompute": True},
    "bf16": {"dtype": "bf16"},
    "muon": {"optimizer": "muon"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_two_cards_step_as_one(tmp_path, change):
    base = dataclasses.replace(
        tiny(tmp_path / "run"), **{**STEP, **CHANGES[change]}, device="cuda", tf32=False, compile=False
    )
    jobs = [
        job(p, dataclasses.replace(base, parallel=p, out=str(tmp_path / p)), "step") for p in ("ddp", "fsdp")
    ]  # fmt: skip
    assert run(tmp_path, jobs) == [0, 0]
    alone = Trainer(dataclasses.replace(base, accumulation=2 * base.accumulation, out=str(tmp_path / "x"))).train_step()
    for p in ("ddp", "fsdp"):
        row = found(tmp_path, p)["rows"][0]
        for name in ("loss", "ce", "grad_norm"):
            assert row[name] == pytest.approx(alone[name], rel=1e-2 if change == "bf16" else 1e-4)
