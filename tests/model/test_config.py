import json

import pytest

from hnet import HNetConfig

GOOD = {
    "arch_layout": ["m1T1", ["T2"], "c2"],
    "d_model": [64, 96],
    "d_intermediate": [128, 256],
    "vocab_size": 256,
    "ssm_cfg": {"chunk_size": 32, "d_conv": 4, "d_state": 16, "expand": 2},
    "attn_cfg": {"num_heads": [2, 4], "rotary_emb_dim": [16, 16], "window_size": [31, -1]},
    "tie_embeddings": False,
}


def test_round_trip(tmp_path):
    config = HNetConfig.from_dict(GOOD)
    config.to_json(tmp_path / "c.json")
    assert HNetConfig.from_json(tmp_path / "c.json") == config
    assert HNetConfig.from_dict(config.to_dict()) == config


def test_published_presets_have_only_published_keys():
    for name in HNetConfig.presets():
        if name.startswith("hnet_"):
            assert set(HNetConfig.preset(name).to_dict()) == set(GOOD)


def test_presets():
    assert {"hnet_1stage_L", "hnet_1stage_XL", "hnet_2stage_L", "hnet_2stage_XL"} <= set(HNetConfig.presets())
    assert {"hnet_2stage_XL_chinese", "hnet_2stage_XL_code", "tiny", "small", "laptop"} <= set(HNetConfig.presets())
    c = HNetConfig.preset("hnet_2stage_L")
    assert (c.num_stages, c.d_model) == (3, [1024, 1024, 1536])
    assert c.layouts(1) == ["T1m4", "m4T1"]
    assert c.layouts(2) == ["T26"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch_layout": ["m1", "T2", "m1"]}, "arch_layout must nest"),
        ({"arch_layout": ["m1", ["T2"]]}, "arch_layout must nest"),
        ({"arch_layout": ["m1", ["T"], "m1"]}, "'T' must be letters of mMtTcC each followed by a count"),
        ({"arch_layout": ["x1", ["T2"], "m1"]}, "'x1' must be letters"),
        ({"arch_layout": ["m1", ["T1", ["T2"], "T1"], "m1"]}, "d_model must list one value for each of the 3 stages"),
        ({"d_model": [64]}, "d_model must list one value for each of the 2 stages of arch_layout, got [64]"),
        ({"d_model": [96, 64]}, "d_model must not decrease inwards"),
        ({"d_intermediate": [128]}, "d_intermediate must list one value"),
        ({"d_intermediate": [0, 256]}, "d_intermediate of stage 0 is 0 but its layout has SwiGLU"),
        (
            {"attn_cfg": {"num_heads": [2], "rotary_emb_dim": [16, 16], "window_size": [1, 1]}},
            "attn_cfg.num_heads must list",
        ),
        (
            {"attn_cfg": {"num_heads": [3, 4], "rotary_emb_dim": [16, 16], "window_size": [1, 1]}},
            "3 heads do not divide",
        ),
        ({"attn_cfg": {"num_heads": [2, 4], "rotary_emb_dim": [16, 15], "window_size": [1, 1]}}, "must be even"),
        ({"ssm_cfg": {"d_sate": 3}}, "ssm_cfg: unknown key 'd_sate'"),
        ({"colour": 1}, "config: unknown key 'colour'"),
        ({"vocab_size": 0}, "vocab_size must be an integer >= 1"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError) as e:
        HNetConfig.from_dict({**GOOD, **change})
    assert message in str(e.value)


def test_missing_key_unknown_preset_and_bad_files(tmp_path):
    with pytest.raises(ValueError, match="config: missing d_model"):
        HNetConfig.from_dict({k: v for k, v in GOOD.items() if k != "d_model"})
    with pytest.raises(ValueError, match="unknown preset 'hnet_3stage'; there are hnet_1stage_L"):
        HNetConfig.preset("hnet_3stage")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        HNetConfig.from_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad.json is not JSON: Expecting"):
        HNetConfig.from_json(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="must be a JSON object"):
        HNetConfig.from_json(tmp_path / "list.json")
