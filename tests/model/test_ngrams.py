"""Embeddings of n-grams: the hash, where sequences begin, decoding, files, and what a config may say."""

import dataclasses

import pytest
import torch

from hnet import HNetConfig, HNetForCausalLM
from hnet.config import NgramConfig
from hnet.model.cost import stage_costs
from hnet.model.ngrams import NgramEmbeddings
from hnet.train.config import TrainConfig
from hnet.train.optim import decays, muon_parameters


def make(preset: str = "tiny", sizes=(2, 3, 5), rows: int = 50) -> HNetForCausalLM:
    torch.manual_seed(0)
    config = dataclasses.replace(HNetConfig.preset(preset), ngram_cfg=NgramConfig(list(sizes), rows))
    model = HNetForCausalLM(config).eval()
    assert not model.ngrams.weight.any()
    with torch.no_grad():
        model.ngrams.weight.normal_()
    return model


def cu(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def rows_of(recent: list[int], sizes: list[int], rows: int) -> list[int]:
    """In Python's integers, which do not overflow"""
    found = []
    for i, n in enumerate(sizes):
        code = sum(byte * 257**k for k, byte in enumerate(reversed(recent[-n:])))
        found.append(((code % (2**31 - 1)) * 1640531527 >> 16) % rows + i * rows)
    return found


def test_the_hash():
    sizes = [2, 3, 8]
    module = NgramEmbeddings(NgramConfig(sizes, 1000), 256, 4)
    recent = torch.randint(256, (200, 8), generator=torch.Generator().manual_seed(0))
    recent[0] = 255
    assert module.index(recent).tolist() == [rows_of(r, sizes, 1000) for r in recent.tolist()]
    with torch.no_grad():
        module.weight.normal_()
    want = torch.stack([module.weight[torch.tensor(rows_of(r, sizes, 1000))].sum(0) for r in recent.tolist()])
    assert torch.allclose(module(recent), want, atol=1e-6)


def test_dropout_drops_whole_rows_in_training():
    module = NgramEmbeddings(NgramConfig([2, 4], 5), 256, 16)
    with torch.no_grad():
        module.weight.normal_()
    recent = torch.randint(256, (2000, 4))
    whole = module(recent)
    module.dropout = 0.25
    rows = module.weight.detach()[module.index(recent)] / 0.75
    torch.manual_seed(0)
    found = module(recent).detach()
    choices = torch.stack([torch.zeros_like(found), rows[:, 0], rows[:, 1], rows.sum(1)])
    off = (found - choices).abs().amax(-1)
    assert off.amin(0).max() < 1e-5
    share = off.argmin(0).bincount(minlength=4) / 2000
    assert torch.allclose(share, torch.tensor([0.0625, 0.1875, 0.1875, 0.5625]), atol=0.03)
    module.eval()
    assert torch.equal(module(recent), whole)


def test_the_hash_spreads():
    """What stands in a table of 4096 rows: 2,000 n-grams share no more rows than chance has it, 384 of them."""
    module = NgramEmbeddings(NgramConfig([3], 4096), 256, 1)
    letters = torch.cartesian_prod(*[torch.arange(97, 110)] * 3)[:2000]
    used = module.index(letters).unique().numel()
    assert used == pytest.approx(4096 * (1 - (1 - 1 / 4096) ** 2000), rel=0.05)


def test_a_sequence_begins_with_nothing_before_it():
    model = make()
    ids = torch.randint(1, 256, (30,))
    seen = []
    model.ngrams.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(ids, cu_seqlens=cu(1, 9, 20))
    for start, end in ((0, 1), (1, 10), (10, 30)):
        for t in range(start, end):
            want = [ids[i].item() if i >= start else 0 for i in range(t - 4, t + 1)]
            assert seen[0][t].tolist() == want


@pytest.mark.parametrize("preset", ["tiny", "laptop"])
def test_decoding_equals_the_full_forward(preset):
    model = make(preset)
    texts = [torch.randint(0, 256, (n,)) for n in (3, 34, 28)]
    with torch.no_grad():
        full = [model(t, cu_seqlens=cu(len(t))).logits for t in texts]
    cache = model.allocate_cache(4, 50)
    model.prefill(torch.cat([t[:1] for t in texts]), cu(1, 1, 1), cache, [3, 0, 2])
    at = [1, 1, 1]
    for order in ([0, 1, 2], [2, 0], [1, 2], [2, 1], [1], [1, 2]):
        logits, _ = model.step(torch.stack([texts[i][at[i]] for i in order]), cache, [[3, 0, 2][i] for i in order])
        for row, i in zip(logits, order, strict=True):
            assert torch.allclose(row, full[i][at[i]], atol=1e-4)
            at[i] += 1
    model.prefill(texts[1][:20], cu(20), cache, [3])  # a slot's former bytes are forgotten
    logits, _ = model.step(texts[1][20:21], cache, [3])
    assert torch.allclose(logits[0], full[1][20], atol=1e-4)


def test_files_keep_them(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    again = HNetForCausalLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again.ngrams.weight, model.ngrams.weight)
    plain = HNetForCausalLM(HNetConfig.preset("tiny"))
    assert "ngram_cfg" not in plain.config.to_dict()  # the published format, where it suffices
    assert plain.ngrams is None
    assert not [name for name in plain.state_dict() if "ngram" in name]


def test_a_table_is_looked_up():
    """It costs no arithmetic, is no matrix for Muon, does not decay and belongs to the outermost stage."""
    model, plain = make(), HNetForCausalLM(HNetConfig.preset("tiny"))
    a, b = stage_costs(model), stage_costs(plain)
    assert [c.flops for c in a] == [c.flops for c in b]
    assert a[0].parameters - b[0].parameters == model.ngrams.weight.numel() == 3 * 50 * 64
    assert id(model.ngrams.weight) not in muon_parameters(model)
    assert not decays("ngrams.weight", model.ngrams.weight)
    assert decays("ngrams.weight", model.ngrams.weight, embeddings=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sizes": [1]}, "sizes must list integers from 2 to 8, each once"),
        ({"sizes": [9]}, "sizes must list integers from 2 to 8"),
        ({"sizes": [3, 3]}, "each once"),
        ({"sizes": 3}, "sizes must list"),
        ({"sizes": [2.0]}, "sizes must list integers"),
        ({"sizes": [2], "rows": 0}, "rows must be an integer >= 1, got 0"),
        ({"sizes": [2], "row": 4}, "unknown key 'row'"),
    ],
)
def test_configs_with_mistakes(given, message):
    d = HNetConfig.preset("tiny").to_dict() | {"ngram_cfg": given}
    with pytest.raises(ValueError, match=message):
        HNetConfig.from_dict(d)


def test_keys_of_a_run():
    assert TrainConfig(preset="tiny").model().ngram_cfg == NgramConfig()
    assert TrainConfig(preset="tiny", ngrams=[2, 5], ngram_rows=70).model().ngram_cfg == NgramConfig([2, 5], 70)
    shorthand = TrainConfig(arch="c1 T1", d_model=[32, 32], ngrams=[3])
    assert shorthand.model().ngram_cfg == NgramConfig([3], 8192)
    with pytest.raises(ValueError, match="sizes must list integers from 2 to 8"):
        TrainConfig(preset="tiny", ngrams=[12]).model()
