"""That the benchmark of fine-tuning runs, keeps what it must, and tells what it measured."""

import json
from pathlib import Path

import pytest

from benchmarks.finetuning import main
from benchmarks.tables.finetuning import finetuning_section
from hnet.train.loop import Trainer

from .train.conftest import STDLIB, config  # noqa: F401 (a fixture)


def test_rows_and_table(config, tmp_path):  # noqa: F811
    config.ngrams, config.ngram_rows, config.steps, config.eval_every = [2], 50, 4, 4
    base = Trainer(config)
    last = base.train()["val_bpb"]
    results = tmp_path / "results.json"
    arms = ["everything", "only the inner network"]
    text = str(STDLIB / "pydoc_data" / "topics.py")
    command = [text, "--base", config.out, "--steps", "2", "--results", str(results), "--arms", *arms]
    main(command)
    main(command)  # both are there already
    whole, inner = json.loads(results.read_text())["rows"]
    for row in (whole, inner):
        assert row["old_before"] == pytest.approx(last, rel=1e-6)  # it starts where the base ended
        assert row["old_after"] != row["old_before"]
        assert row["new_after"] < row["new_before"]
    network = base.model.backbone.main_network.main_network
    assert inner["trained"] == sum(p.numel() for n, p in network.named_parameters()) + pad(base)
    assert whole["trained"] == whole["parameters"] == sum(p.numel() for p in base.model.parameters())
    table = finetuning_section(json.loads(results.read_text()))
    assert f"{whole['new_after']:.3f}" in table
    assert "only the inner network" in table
    assert Path(text).name in table
    assert str(STDLIB) not in table


def pad(trainer):
    widening = trainer.model.backbone.main_network.pad_dimension
    return 0 if widening is None else widening.numel()
