"""The documented history: each cause its authors blamed, those they missed, and what they took wrongly."""

import json

import pytest

from hnet.config import toml
from hnet.diagnose.report import examine
from hnet.diagnose.runs import read_log

from . import history


def examined(folder, shape, config=None, **made):
    path = folder / shape
    path.write_text(history.SHAPES[shape](history.rows(**made)))
    (folder / "config.toml").write_text(toml.dumps(history.CONFIG if config is None else config))
    report = examine(read_log(path))
    return report, {f.name: f for f in reversed(report.findings)}


@pytest.mark.parametrize("shape", history.SHAPES)
def test_every_cause_in_every_shape(shape, tmp_path):
    report, found = examined(tmp_path, shape)
    words = {name: " ".join(f.evidence) for name, f in found.items()}
    assert found["lr_multipliers"].keys == {"lr_multipliers": [2.0, 1.5, 1.0]}
    assert "3/1.7/0.9" in words["lr_multipliers"]
    assert "3.3 times" in words["lr_multipliers"]
    assert found["warmup"].keys == {"warmup_steps": 5000}
    assert "2000 of 100000 steps (2.0 %)" in words["warmup"]
    f = found["grad_explosion"]
    assert f.severity == "critical"
    assert "1,810 at step 14000" in words["grad_explosion"]
    assert f.keys["learning_rate"] == 2e-4
    assert "32,800 of 100,000 steps (33 %)" in words["unfinished"]
    assert found["clip_tight"].keys == {"clipping": "adaptive", "max_grad_norm": 5.0}
    assert "every 100 steps" in words["grad_sawtooth"]
    assert found["leak"].confidence == "low"
    assert "1.0079" in words["ratio_blind"] or "1.007" in words["ratio_blind"]
    assert (
        found["sampling"]
        .advice[0]
        .startswith("hnet generate --temperature 0.8 --top-p 0.9 --max-new-bytes 2048 --repetition-penalty 1.1")
    )
    assert "stage_norms" in found
    s = report.summary
    assert s["loss"]["name"] == "ce"
    assert s["grad_norm"]["all"]["largest"] == 1810
    assert s["grad_norm"]["all"]["final"] == 0.17
    assert s["last_step"] == 32_800
    assert any("documents of a pack" in u["what"] for u in report.unexamined)


def test_the_numbers_of_the_summary(tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text("".join(json.dumps({"step": r["step"], "loss": r["loss"]}) + "\n" for r in history.rows()))
    loss = examine(read_log(path)).summary["loss"]
    assert (round(loss["first"], 2), round(loss["last"], 2), round(loss["reduction_percent"], 1)) == (5.77, 0.84, 85.4)
    assert loss["perplexity"] == pytest.approx(2.316, abs=1e-3)


@pytest.mark.parametrize("burst_at", [500, 1_500, 3_000, 32_000])
def test_wherever_the_burst_is(burst_at, tmp_path):
    _, found = examined(tmp_path, "train.log", burst_at=burst_at, sawtooth=False)
    assert f"1,810 at step {burst_at}" in " ".join(found["grad_explosion"].evidence)
    assert found["warmup"].keys == {"warmup_steps": 5000}
    assert "itself is not short" not in " ".join(found["warmup"].change)
    assert "grad_sawtooth" not in found


def test_the_config_of_another_trainer(tmp_path):
    """Its own names in YAML, W&B's nesting, multipliers as a mapping."""
    log = tmp_path / "train.log"
    log.write_text(history.text(history.rows()))
    (tmp_path / "config.yaml").write_text(
        "wandb_version: 1\nmodel_size:\n  desc: null\n  value: 1.6B\nmax_steps:\n  value: 100000\nbase_lr:\n"
        "  value: 0.0003\n"
        "lr_mult:\n  value: [3.0, 1.7, 0.9]\nwarmup_iters:\n  value: 2000\ngrad_clip:\n  value: 1.0\n"
        "pack: \n  value: true\n"
    )
    found = {f.name: f for f in examine(read_log(log)).findings}
    wanted = {"lr_multipliers", "warmup", "grad_explosion", "unfinished", "clip_tight", "grad_sawtooth", "leak"}
    assert wanted <= found.keys()
    (tmp_path / "config.yaml").unlink()
    other = tmp_path / "settings.json"
    other.write_text(json.dumps({
        "model": {"name": "hnet-1.6B"},
        "optim": {"peak_lr": 3e-4, "clip_grad": 1.0, "lr_mults": {"s0": 3, "s1": 1.7, "s2": 0.9}},
        "total_steps": 100000, "num_warmup_steps": 2000, "sample_packing": True, "cu_seqlens": False,
    }))  # fmt: skip
    found = {f.name: f for f in examine(read_log(log, other)).findings}
    assert wanted <= found.keys()
    assert (found["leak"].severity, found["leak"].confidence) == ("critical", "high")


def test_a_config_printed_before_the_first_step(tmp_path):
    log = tmp_path / "train.log"
    log.write_text(
        "Model has 1.6B parameters\nmax_steps: 100000\nNamespace(base_lr=3e-4, warmup_steps=2000, grad_clip=1.0, "
        "lr_multipliers=[3.0, 1.7, 0.9], packing=True)\n" + history.text(history.rows())
    )
    found = {f.name for f in examine(read_log(log)).findings}
    assert {"lr_multipliers", "warmup", "grad_explosion", "unfinished", "clip_tight", "grad_sawtooth", "leak"} <= found


def test_no_config_but_steps_that_name_their_number(tmp_path):
    log = tmp_path / "train.log"
    log.write_text(history.text(history.rows()).replace(" | loss", "/100000 | loss"))
    found = {f.name: f for f in examine(read_log(log)).findings}
    assert {"lr_multipliers", "grad_explosion", "unfinished", "grad_sawtooth", "ratio_blind"} <= found.keys()


def test_the_same_model_of_a_laptops_size_may_warm_up_for_2_percent(tmp_path):
    small = history.CONFIG | {"preset": "small", "lr_multipliers": [2.0, 1.0]}
    _, found = examined(tmp_path, "train.log", small, burst_at=-1, sawtooth=False)
    assert "warmup" not in found
    assert "grad_explosion" not in found
    assert "lr_multipliers" not in found
