import dataclasses

import pytest

from hnet import HNetForCausalLM
from hnet.model.cost import stage_costs
from hnet.train.dry_run import curve, report
from hnet.train.loop import Trainer
from hnet.train.schedule import Schedule


def test_dry_run(config):
    text = report(config)
    for word in ("held out", "passes over the data", "stage 1", "MFLOP a byte", "MiB weights", "wsd, peak 0.001"):
        assert word in text
    with pytest.raises(ValueError, match="fewer than one batch"):
        report(dataclasses.replace(config, batch_bytes=10**9))
    assert curve(Schedule("wsd", 100, warmup_steps=20, decay_fraction=0.5), 100, 10) == "▃▇████▆▅▃▁"


def test_rows_have_speed_and_cost(config):
    trainer, seen = Trainer(dataclasses.replace(config, batch_bytes=1024, accumulation=2)), []
    forward = trainer.replica.forward
    trainer.replica.forward = lambda *a, **k: seen.append((k["cu_seqlens"], forward(*a, **k))) or seen[-1][1]
    row = trainer.train_step()
    outer, inner = stage_costs(HNetForCausalLM(config.model()))
    flops = sum(outer.of(cu.diff()) + inner.of(out.routing[0].cu_chunks.diff()) for cu, out in seen).item()
    assert len(seen) == 2
    assert row["flops_per_byte"] == pytest.approx(flops / row["bytes"], rel=1e-6)
    assert row["flops_per_second"] == pytest.approx(row["flops_per_byte"] * row["bytes_per_second"])
    assert "mfu" not in row  # a CPU has no peak in the table
    assert 0 <= row["data_wait_share"] < 1


def test_dry_run_of_fine_tuning(config, tmp_path):
    model = HNetForCausalLM(config.model())
    model.save_pretrained(tmp_path / "base")
    text = report(dataclasses.replace(config, preset="", init_from=str(tmp_path / "base"), freeze=["inner"]))
    inner = sum(p.numel() for p in model.backbone.main_network.main_network.parameters())
    assert f"start      the weights {tmp_path / 'base' / 'model.safetensors'}" in text
    assert f"frozen     {inner / 1e6:,.2f} M parameters" in text
