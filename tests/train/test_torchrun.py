"""`hnet train` under torchrun."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hnet import HNetForCausalLM
from hnet.train.checkpoint import latest_checkpoint

from .processes import ROOT


@pytest.mark.slow
def test_torchrun(config):
    config = dataclasses.replace(config, parallel="fsdp", steps=2)
    path = Path(config.out).parent / "config.toml"
    path.write_text(config.to_toml())
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hnet", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *command, str(path)], env=environment, cwd=ROOT, timeout=600)
    assert result.returncode == 0
    HNetForCausalLM.from_pretrained(latest_checkpoint(Path(config.out) / "checkpoints"))
