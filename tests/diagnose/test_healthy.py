"""Runs really trained, with nothing wrong: no finding is critical."""

import dataclasses

import pytest

from hnet.chunk_lm.task import ChunkLMTask
from hnet.chunk_lm.train_config import ChunkLMTrainConfig
from hnet.diagnose.report import examine
from hnet.diagnose.runs import read_log
from hnet.train.loop import Trainer
from tests.train.conftest import STDLIB, tiny

LAPTOP = {
    "optimizer": "muon", "learning_rate": 1e-2, "ngrams": [2, 3], "ngram_rows": 1024, "rate_control": "bias",
    "surprisal_weight": [0.1], "entropy_weight": [0.2], "decay_fraction": 0.4,
}  # fmt: skip
TWO_STAGES = {"arch": "c1 c1 T1", "d_model": [32, 64, 96], "compression": [3.0, 2.0], "lr_multipliers": [2.0, 1.5, 1.0]}
CHARACTERS = {"boundaries": "char-start", "learning_rate": 3e-3}


def finish(config, task=None):
    Trainer(config, make_task=task).train()
    report = examine(read_log(config.out))
    assert report.summary["last_step"] == 80
    assert report.summary["loss"]["last"] < report.summary["loss"]["first"]
    assert [(f.name, f.evidence) for f in report.findings if f.severity == "critical"] == []


@pytest.mark.slow
@pytest.mark.parametrize("keys", [LAPTOP, TWO_STAGES, CHARACTERS], ids=["laptop", "two stages", "char-start"])
def test_an_hnet(keys, tmp_path):
    base = {"steps": 80, "warmup_steps": 8, "eval_every": 20, "batch_bytes": 1024, "ratio_weight": "auto"}
    finish(dataclasses.replace(tiny(tmp_path / "run"), **base | keys))


@pytest.mark.slow
def test_a_chunk_lm(tmp_path):
    config = ChunkLMTrainConfig(
        data=[str(STDLIB / "email")], pattern="*.py", device="cpu", width=32, n_layers=1, seq_len=64, kernel_len=16,
        chunk=4, steps=80, warmup_steps=8, eval_every=20, eval_bytes=1024, sample_bytes=0, plots=False,
        out=str(tmp_path / "run"),
    )  # fmt: skip
    finish(config, ChunkLMTask)
