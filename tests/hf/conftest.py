import pytest
import torch

from hnet import HNetConfig, HNetForCausalLM


@pytest.fixture(scope="session")
def native() -> HNetForCausalLM:
    """Two stages of routing, other widths, boundaries between characters, a bias, n-grams, attention windows."""
    config = HNetConfig.from_dict(
        {
            "arch_layout": ["c1t1", ["T1", ["t1m1"], "m1"], "t1"],
            "d_model": [64, 64, 96],
            "d_intermediate": [0, 96, 96],
            "ssm_cfg": {"d_state": 8},
            "attn_cfg": {"num_heads": [4, 4, 4], "rotary_emb_dim": [8, 8, 8], "window_size": [5, -1, -1]},
            "routing_cfg": {"boundaries": "char-end", "logit_bias": [0.25, -0.5]},
            "ngram_cfg": {"sizes": [2, 3], "rows": 50},
        }
    )
    torch.manual_seed(0)
    model = HNetForCausalLM(config).eval()
    with torch.no_grad():  # as after training: routers that decide, n-grams that say something
        for stage in model.stages():
            if not stage.innermost:
                stage.routing_module.q_proj_layer.weight.add_(torch.randn(64, 64) * 0.3)
        model.ngrams.weight.normal_(std=0.5)
    return model


@pytest.fixture(scope="session")
def texts() -> list[bytes]:
    bos = b"\xfe"
    return [bos + b"The chunks of this line", bos + "日本語".encode(), bos, bos + bytes(range(40))]
