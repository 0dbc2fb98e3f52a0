import numpy as np
import pytest
import torch

from hnet import HNetConfig, HNetForCausalLM
from hnet.segment import Segmentation, Stage

TWO_STAGES = {
    "arch_layout": ["c1", ["c1", ["C1"], "c1"], "c1"],
    "d_model": [32, 32, 48],
    "d_intermediate": [0, 0, 64],
    "vocab_size": 256,
    "ssm_cfg": {"chunk_size": 16, "d_conv": 4, "d_state": 16, "expand": 2},
    "attn_cfg": {"num_heads": [2, 2, 2], "rotary_emb_dim": [8, 8, 8], "window_size": [-1, -1, -1]},
    "tie_embeddings": False,
}


@pytest.fixture(scope="session")
def two_stages():
    """Untrained, of two stages that begin chunks here and there."""
    torch.manual_seed(0)
    return HNetForCausalLM(HNetConfig.from_dict(TWO_STAGES)).eval()


def made_up(text: str | bytes, *starts: dict[int, float], loss=None) -> Segmentation:
    """A segmentation without a model: per stage, outermost first, where chunks begin, and how surely."""
    text = text.encode() if isinstance(text, str) else text
    stages, offsets = [], np.arange(len(text))
    for stage in starts:
        p = np.array([stage.get(int(i), 0.125) for i in offsets], dtype=np.float32)
        begins = np.array(sorted(stage), dtype=np.int64)
        stages.append(Stage(offsets, p, begins))
        offsets = begins
    loss = np.linspace(0, 4, len(text)) if loss is None else loss
    return Segmentation(text, np.asarray(loss, dtype=np.float32), tuple(stages))
