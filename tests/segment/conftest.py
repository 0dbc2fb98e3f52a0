import pytest
import torch

from hnet import HNetConfig, HNetForCausalLM

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
