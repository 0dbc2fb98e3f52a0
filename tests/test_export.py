import dataclasses
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from hnet import HNetConfig, HNetForCausalLM
from hnet.chunk_lm import ChunkLM
from hnet.chunk_lm.config import ChunkLMConfig
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


def test_a_chunk_lm_that_was_written_wrong_is_an_error(tmp_path, monkeypatch):
    lm, save = ChunkLM(ChunkLMConfig()), ChunkLM.save_pretrained
    lm.save_pretrained(tmp_path / "ours")
    good = CliRunner().invoke(main, ["export", str(tmp_path / "ours"), str(tmp_path / "good")])
    assert good.exit_code == 0, good.output

    def spoilt(self, out):
        with torch.no_grad():
            self.head.weight[3, 5] += 0.01
        save(self, out)
        with torch.no_grad():
            self.head.weight[3, 5] -= 0.02

    monkeypatch.setattr(ChunkLM, "save_pretrained", spoilt)
    done = CliRunner().invoke(main, ["export", str(tmp_path / "ours"), str(tmp_path / "bad")])
    assert done.exit_code == 1
    assert "does not hold the model that was to be written" in done.output


@pytest.mark.slow
def test_a_program_computes_what_the_model_does(tmp_path):
    """Two stages with routing, also where the text is shorter than the program: what follows is never looked at."""
    wide = HNetConfig.from_dict(
        {"arch_layout": ["m1", ["t1", ["T1"], "c1"], "c1"], "d_model": [64, 64, 96], "d_intermediate": [0, 0, 96],
         "ssm_cfg": {"d_state": 8},
         "attn_cfg": {"num_heads": [4] * 3, "rotary_emb_dim": [8] * 3, "window_size": [5] * 3}},
    )  # fmt: skip
    torch.manual_seed(0)
    HNetForCausalLM(wide).save_pretrained(tmp_path / "ours")
    command = ["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--format", "pt2", "--length", "50"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    program = torch.export.load(tmp_path / "out" / "model.pt2")
    assert not any("hnet" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    model = HNetForCausalLM.from_pretrained(tmp_path / "out").eval()
    for length in (50, 23):
        ids = torch.randint(0, 256, (1, length))
        with torch.no_grad():
            logits, prob, inner = program.module()(torch.nn.functional.pad(ids, (0, 50 - length), value=7))
            out = model(ids)
        torch.testing.assert_close(logits[:, :length], out.logits, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(prob[:length], out.routing[0].boundary_prob, rtol=1e-4, atol=2e-5)
        chunks = len(out.routing[1].boundary_prob)
        torch.testing.assert_close(inner[:chunks], out.routing[1].boundary_prob, rtol=1e-4, atol=2e-5)
