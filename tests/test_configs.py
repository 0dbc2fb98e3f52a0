"""Every file of configs/ is a whole configuration; the small ones train."""

import random
from pathlib import Path

import pytest

from hnet.cli.demo import config as demo_config
from hnet.config.keys import read_toml
from hnet.data.streaming import parse_entry
from hnet.model.cost import plan
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))
NAMES = [p.stem for p in CONFIGS]
PAPER = {"paper_1stage_L": 679, "paper_2stage_L": 874, "paper_2stage_XL": 1603}  # M parameters


def load(name):
    return TrainConfig(**read_toml(CONFIGS[NAMES.index(name)], TrainConfig))


def test_all_are_here():
    assert sorted([*PAPER, "laptop", "agglutinative", "bytes_raw"]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_valid_and_planned(name):
    c = load(name).validate()
    micro = c.batch_bytes // c.accumulation
    assert c.batch_bytes % (8 * c.accumulation) == 0  # so that eight processes can share it
    found = plan(c.model(), c.compression, c.seq_len, micro, c.optimizer == "muon", True)
    assert len(found.stages) == len(c.compression) + 1
    parameters = sum(s.parameters for s in found.stages) / 1e6
    assert round(parameters) == PAPER[name] if name in PAPER else parameters < 20
    assert max(c.warmup, c.ratio_warmup, c.eval_every, c.checkpoint_every) <= c.steps


@pytest.mark.parametrize("name", PAPER)
def test_recipe_of_the_paper(name):
    c = load(name).validate()
    repository, options = parse_entry(c.data[0])
    assert (repository, options["name"]) == ("HuggingFaceFW/fineweb-edu", "sample-100BT")
    assert c.batch_bytes == 256 * c.seq_len == 256 * 8192
    assert (c.warmup_fraction, c.decay_fraction, c.decay_shape) == (0.1, 0.2, "inverse-sqrt")
    assert (c.ratio_weight, c.weight_decay, c.dtype, c.recompute) == (0.03, 0.1, "bf16", True)
    assert c.learning_rate == (5e-4 if name.endswith("XL") else 6.25e-4)
    assert c.compression == ([6.0] if "1stage" in name else [3.0, 3.0])


def test_laptop_is_the_demo():
    ours, demo = load("laptop"), demo_config("runs/demo", 1000)
    for c in (ours, demo):
        c.data, c.pattern, c.exclude, c.out = [], "*", [], ""
    assert ours == demo


def corpus(name, folder):
    """A little of what the config is for."""
    draw = random.Random(0)
    if name == "bytes_raw":
        for i in range(4):
            (folder / f"chromosome{i}").write_text("".join(draw.choices("ACGT", k=4000)))
        return
    words = ["పోయి", "మీ", "పనులు", "చేసుకోండిరా"] if name == "agglutinative" else ["for", "x", "in", "range"]
    for part in ("train", "dev"):
        lines = (" ".join(draw.choices(words, k=8)) for _ in range(80))
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", ["laptop", "agglutinative", "bytes_raw"])
def test_small_ones_train(name, tmp_path):
    c = load(name)
    corpus(name, tmp_path)
    c.data, c.out = [str(tmp_path)], str(tmp_path / "run")
    c.steps, c.batch_bytes, c.accumulation, c.seq_len, c.eval_bytes, c.plots, c.sample_bytes = (
        2,
        512,
        2,
        128,
        512,
        False,
        8,
    )
    c.eval_every = c.checkpoint_every = 2
    c.warmup_steps = min(c.warmup_steps, 1)
    if c.arch:
        c.d_model = [64, 128]
    result = Trainer(c).train()
    assert 0 < result["val_bpb"] < 16
    assert result["stage0/val_bytes_per_chunk"] >= 1
    assert (tmp_path / "run" / "checkpoints" / "step_00000002" / "model.safetensors").is_file()
