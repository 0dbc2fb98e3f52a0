"""The held-out loss of a log against that of its checkpoint."""

import math

import pytest
import torch

from hnet import HNetConfig, HNetForCausalLM
from hnet.data.corpus import Corpus
from hnet.diagnose.checkpoint import Material
from hnet.diagnose.reproduce import reproduced
from hnet.diagnose.runs import read_log
from hnet.train.config import TrainConfig

from .logs import healthy_rows, write_run


@pytest.mark.parametrize(("logged", "told"), [(math.log(256), False), (4.0, True)])
def test_the_checkpoint_has_it(logged, told, tmp_path):
    """A model whose weights are zero finds every byte as likely as any other."""
    model = HNetForCausalLM(HNetConfig.preset("tiny")).eval()
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    rows = healthy_rows()
    rows[-1]["val_ce"] = logged
    log = read_log(write_run(tmp_path / "a", rows))
    config = TrainConfig(data=["nowhere"], preset="tiny", seq_len=128, batch_bytes=512, eval_bytes=1024)
    val = Corpus.of([bytes(range(32, 127)) * 4] * 4)
    found = reproduced(log, Material(model, b"", b"", 400, config, None, val))
    assert [f.name for f in found] == ["not_reproduced"] * told
    assert reproduced(log, Material(model, b"", b"", 399, config, None, val)) == []  # no evaluation at that step
