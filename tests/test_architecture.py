import math

import pytest

from hnet import HNetConfig
from hnet.config.architecture import from_shorthand, lr_multipliers, mirrored, num_heads, targets


def test_shorthand_makes_the_published_layout():
    published = HNetConfig.preset("hnet_2stage_L")
    made = from_shorthand("m4 T1m4 T26", [1024, 1024, 1536])
    assert made.arch_layout == published.arch_layout
    assert made.d_model == published.d_model
    assert made.d_intermediate[1:] == published.d_intermediate[1:]  # the published 8/3, rounded up to 128
    assert made.attn_cfg.window_size == published.attn_cfg.window_size
    assert made.attn_cfg.num_heads == [16, 16, 24]


def test_shorthand_details():
    c = from_shorthand("c2/c1T1 T2", [128, 192], heads=[4, 4], windows=[127, -1], d_intermediate=[384, 512])
    assert c.arch_layout == ["c2", ["T2"], "c1T1"]
    assert (c.attn_cfg.num_heads, c.attn_cfg.rotary_emb_dim) == ([4, 4], [16, 24])
    assert from_shorthand("T3", [256]).arch_layout == ["T3"]
    assert mirrored("T1m4c2") == "c2m4T1"
    assert [num_heads(d) for d in (64, 256, 320, 1024, 96)] == [1, 4, 5, 16, 2]


@pytest.mark.parametrize(
    ("arch", "widths", "message"),
    [
        ("m4 T4", [256], "d_model must have one value for each of the 2 stages"),
        ("m4 T4", [], "d_model must have one value for each of the 2 stages of arch 'm4 T4', got none"),
        ("m4 x4", [256, 256], "'x4' must be letters"),
        ("m4 T4", [512, 256], "must not decrease inwards"),
        ("", [256], "arch must name at least one layout"),
    ],
)
def test_bad_shorthand(arch, widths, message):
    with pytest.raises(ValueError, match=message):
        from_shorthand(arch, widths)


def test_multipliers_and_targets():
    c = from_shorthand("m4 T1m4 T26", [1024, 1024, 1536])
    assert lr_multipliers(c, [3, 3]) == pytest.approx([math.sqrt(9 * 1.5), math.sqrt(3 * 1.5), 1])
    assert targets([3.0, 3.0], 2) == [3, 3]
    assert targets([1, 3, 9], 2) == [3, 3]
    assert targets([1, 5], 1) == [5]
    for bad in ([1.0], [3.0, 1.0], [1, 9, 3]):
        with pytest.raises(ValueError, match="compression must be"):
            targets(bad, len(bad) - (bad[0] == 1 and len(bad) > 1))
