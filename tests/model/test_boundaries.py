"""Boundaries kept to characters, the logit bias, dropout and recomputation."""

from dataclasses import replace

import pytest
import torch

from hnet import HNetConfig, HNetForCausalLM
from hnet.config import RoutingConfig

TEXT = "naïve façade — తెలుగు 😀 abc\n" * 3
BOS = 254


def model(boundaries="any", bias=None, name="tiny"):
    torch.manual_seed(0)
    return HNetForCausalLM(replace(HNetConfig.preset(name), routing_cfg=RoutingConfig(boundaries, bias))).eval()


def character_edges(boundaries):
    """Positions, BOS first, of the first or last byte of each character; by Python's own UTF-8."""
    edges, offset = {0}, 0
    for character in TEXT:
        size = len(character.encode())
        edges.add(1 + offset if boundaries == "char-start" else offset + size)
        offset += size
    return edges


@pytest.mark.parametrize("boundaries", ["char-start", "char-end"])
@pytest.mark.parametrize("bias", [0.0, 5.0])
def test_boundaries_keep_to_characters(boundaries, bias):
    m = model(boundaries, [bias])
    ids = torch.tensor([BOS, *TEXT.encode()])
    two = torch.cat([ids, ids[:20]])
    cu = torch.tensor([0, len(ids), len(two)], dtype=torch.int32)
    out = m(two, cu)
    found = set(out.routing[0].boundary_mask[: len(ids)].nonzero().flatten().tolist())
    edges = character_edges(boundaries)
    assert found <= edges
    assert found == edges if bias == 5 else len(found) < len(edges)
    free = model("any", [bias])(two, cu).routing[0].boundary_mask[: len(ids)].nonzero().flatten().tolist()
    assert not set(free) <= edges  # so the rule did something

    # byte by byte it is the same
    cache = m.allocate_cache(1, len(ids))
    start = 31  # inside a character
    m.prefill(ids[:start], torch.tensor([0, start], dtype=torch.int32), cache)
    for t in range(start, len(ids)):
        logits, masks = m.step(ids[t : t + 1], cache)
        assert bool(masks[0]) == (t in found)
        torch.testing.assert_close(logits[0], out.logits[t], atol=1e-5, rtol=1e-4)


def test_logit_bias_moves_the_rate_and_is_saved(tmp_path):
    ids = torch.tensor([[BOS, *TEXT.encode()]])
    rates = [model(bias=[b])(ids).routing[0].boundary_mask.float().mean().item() for b in (-2.0, 0.0, 2.0)]
    assert rates[0] < rates[1] < rates[2]
    torch.testing.assert_close(model(bias=[0.0])(ids).logits, model()(ids).logits)
    m = model()
    assert "routing_cfg" not in m.config.to_dict()
    next(m.stages()).set_logit_bias(-1.25)
    m.save_pretrained(tmp_path)
    again = HNetForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.routing_cfg.logit_bias == [-1.25]
    torch.testing.assert_close(again(ids).logits, m(ids).logits)
    assert m.state_dict().keys() == model().state_dict().keys()  # the published names
    assert m.cast(torch.bfloat16).backbone.logit_bias.dtype == torch.float32


def test_bad_routing_config():
    with pytest.raises(ValueError, match="routing_cfg.boundaries must be one of any, char-start, char-end, got 'word'"):
        model("word")
    with pytest.raises(ValueError, match="one number for each of the 1 stages"):
        model("any", [0.0, 1.0])


def test_dropout_and_recompute():
    ids = torch.tensor([[BOS, *TEXT.encode()]])
    m = model().train()
    plain = m(ids).logits
    plain.square().mean().backward()
    wanted = {n: p.grad.clone() for n, p in m.named_parameters()}
    m.zero_grad()
    for stage in (m.backbone.encoder, m.backbone.main_network.main_network, m.backbone.decoder):
        stage.recompute = True
    m(ids).logits.square().mean().backward()
    for n, p in m.named_parameters():
        torch.testing.assert_close(p.grad, wanted[n], msg=n)
    m.set_dropout(0.5)
    assert not torch.equal(m(ids).logits, m(ids).logits)
    assert torch.equal(m.eval()(ids).logits, plain)
