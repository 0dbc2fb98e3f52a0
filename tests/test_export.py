import dataclasses
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from hnet import HNetForCausalLM
from hnet.cli.main import main
from hnet.train.loop import Trainer

from .train.conftest import config  # noqa: F401


@pytest.fixture
def run(config):  # noqa: F811
    Trainer(dataclasses.replace(config, weight_ema=0.9, rate_control="bias")).train()
    return Path(config.out)


def test_export(run, tmp_path):
    latest = run / "checkpoints" / "step_00000008"
    for flags, source in [([], "model.safetensors"), (["--ema"], "ema.safetensors")]:
        out = tmp_path / f"out{len(flags)}"
        done = CliRunner().invoke(main, ["export", str(run), str(out), *flags])
        assert done.exit_code == 0, done.output
        assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors"}
        wanted = load_file(latest / source)
        model = HNetForCausalLM.from_pretrained(out)
        assert all(torch.equal(v, wanted[k]) for k, v in model.state_dict().items())
        assert model.config.routing_cfg.logit_bias is not None
    half = CliRunner().invoke(main, ["export", str(run), str(tmp_path / "half"), "--dtype", "bf16"])
    assert half.exit_code == 0, half.output
    kinds = {k: v.dtype for k, v in load_file(tmp_path / "half" / "model.safetensors").items()}
    assert kinds["lm_head.weight"] == torch.bfloat16
    assert kinds["backbone.residual_proj.weight"] == torch.float32


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    done = CliRunner().invoke(main, ["export", str(run), str(tmp_path / "full")])
    assert done.exit_code == 1
    assert "OUT must be a new or empty folder" in done.output
