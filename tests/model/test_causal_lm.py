import json
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from hnet import HNetConfig, HNetForCausalLM
from hnet.model.checkpoint_format import read_weights


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    m = HNetForCausalLM(HNetConfig.preset("tiny"))
    with torch.no_grad():  # a fresh router fires at half the positions; spread its decisions
        for stage in m.stages():
            if not stage.innermost:
                stage.routing_module.q_proj_layer.weight.add_(torch.randn(64, 64) * 0.3)
    return m.eval()


def cu(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def test_batch_and_packed_forms_agree(model):
    ids = torch.randint(0, 256, (3, 50))
    a = model(ids).logits
    b = model(ids.flatten(), cu_seqlens=cu(50, 50, 50)).logits
    assert torch.equal(a.flatten(0, 1), b)


def test_documents_do_not_see_each_other(model):
    ids = torch.randint(0, 256, (90,))
    whole = model(ids, cu_seqlens=cu(40, 50))
    for rows in (slice(0, 40), slice(40, 90)):
        alone = model(ids[rows], cu_seqlens=cu(rows.stop - rows.start))
        assert torch.allclose(alone.logits, whole.logits[rows], atol=1e-5)
        assert torch.equal(alone.routing[0].boundary_mask, whole.routing[0].boundary_mask[rows])


def test_causal(model):
    ids = torch.randint(0, 256, (1, 80))
    before = model(ids).logits
    ids[0, 50] = (ids[0, 50] + 1) % 256
    assert torch.allclose(model(ids).logits[0, :50], before[0, :50], atol=1e-5)


def test_ragged_decoding_equals_the_full_forward(model):
    torch.manual_seed(1)
    lengths = [30, 70, 44]
    texts = [torch.randint(0, 256, (n,)) for n in lengths]
    full = [model(t, cu_seqlens=cu(len(t))).logits for t in texts]
    prompts = [5, 1, 40]
    cache = model.allocate_cache(3, 80)
    out = model.prefill(torch.cat([t[:n] for t, n in zip(texts, prompts, strict=True)]), cu(*prompts), cache)
    for row, n, want in zip(out.logits.split(prompts), prompts, full, strict=True):
        assert torch.allclose(row, want[:n], atol=1e-4)
    at = list(prompts)
    while any(a < n for a, n in zip(at, lengths, strict=True)):
        active = [i for i in range(3) if at[i] < lengths[i]]
        logits, masks = model.step(torch.stack([texts[i][at[i]] for i in active]), cache, torch.tensor(active))
        assert masks[0].shape == (len(active),)
        for row, i in zip(logits, active, strict=True):
            assert torch.allclose(row, full[i][at[i]], atol=1e-4)
            at[i] += 1


TWO_STAGES = {
    "arch_layout": ["c1t1", ["T1", ["t2"], "m1"], "t1"],
    "d_model": [64, 64, 64],
    "d_intermediate": [0, 96, 96],
    "ssm_cfg": {"d_state": 8},
    "attn_cfg": {"num_heads": [4, 4, 4], "rotary_emb_dim": [8, 8, 8], "window_size": [5, -1, -1]},
}


@pytest.mark.parametrize("config", [HNetConfig.preset("tiny"), HNetConfig.from_dict(TWO_STAGES)], ids=["tiny", "two"])
@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0], [0, 1, 2]], ids=str)
def test_a_step_takes_slots_in_any_order(config, order):
    torch.manual_seed(2)
    m = HNetForCausalLM(config).eval()
    texts = [torch.randint(0, 256, (n,)) for n in (20, 34, 28)]
    full = [m(t, cu_seqlens=cu(len(t))).logits for t in texts]
    cache = m.allocate_cache(3, 50)
    m.prefill(torch.cat([t[:-6] for t in texts]), cu(*(len(t) - 6 for t in texts)), cache)
    for i in range(6, 0, -1):
        logits, _ = m.step(torch.stack([texts[s][-i] for s in order]), cache, torch.tensor(order))
        for row, s in zip(logits, order, strict=True):
            assert torch.allclose(row, full[s][-i], atol=1e-4)


@pytest.mark.parametrize("slots", [[0, 0, 1], [0, 1, 3], [-1, 0, 1], [[0, 1, 2]], [0.0, 1.0, 2.0]], ids=str)
def test_slots_that_are_not_places_of_the_cache_are_an_error(model, slots):
    cache = model.allocate_cache(3, 20)
    slots = torch.tensor(slots)
    with pytest.raises(ValueError, match="slots"):
        model.prefill(torch.zeros(6, dtype=torch.long), cu(2, 2, 2), cache, slots)
    model.prefill(torch.zeros(6, dtype=torch.long), cu(2, 2, 2), cache)
    with pytest.raises(ValueError, match="slots"):
        model.step(torch.zeros(slots.shape, dtype=torch.long), cache, slots)
    assert cache.length.tolist() == [2, 2, 2]


def test_bf16_keeps_the_residual_projection_in_fp32():
    m = HNetForCausalLM(HNetConfig.preset("tiny"), dtype=torch.bfloat16)
    kinds = {n: p.dtype for n, p in m.named_parameters()}
    assert {kinds.pop("backbone.residual_proj.weight"), kinds.pop("backbone.residual_proj.bias")} == {torch.float32}
    assert set(kinds.values()) == {torch.bfloat16}
    ids = torch.randint(0, 256, (2, 40))
    assert m(ids).logits.dtype == torch.bfloat16
    cache = m.allocate_cache(2, 60)
    m.prefill(ids.flatten(), cu(40, 40), cache)
    assert m.step(torch.tensor([1, 2]), cache)[0].isfinite().all()


def test_initialisation():
    torch.manual_seed(0)
    m = HNetForCausalLM(HNetConfig.preset("small"))
    p = dict(m.named_parameters())
    assert p["embeddings.weight"].std().item() == pytest.approx(1.0, rel=0.02)
    assert p["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert p["backbone.encoder.layers.0.mixer.in_proj.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    # 3 + 3 residual branches outside; 2 * 6 more inside
    assert p["backbone.encoder.layers.0.mixer.out_proj.weight"].std().item() == pytest.approx(0.02 / 6**0.5, rel=0.02)
    inner = "backbone.main_network.main_network.layers.0."
    assert p[inner + "mlp.fc2.weight"].std().item() == pytest.approx(0.02 / 18**0.5, rel=0.02)
    assert p[inner + "mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(p["backbone.routing_module.q_proj_layer.weight"], torch.eye(256))
    assert not p["backbone.residual_proj.weight"].any()
    assert not p["backbone.main_network.pad_dimension"].any()


def test_wrong_calls(model):
    ids = torch.zeros(10, dtype=torch.long)
    with pytest.raises(ValueError, match=r"input_ids must be \(B, L\), or \(T,\) together with cu_seqlens"):
        model(ids)
    with pytest.raises(ValueError, match="cu_seqlens must end at T = 10"):
        model(ids, cu_seqlens=cu(9))
    with pytest.raises(ValueError, match="max_chunks must have 1 entries"):
        model(ids, cu_seqlens=cu(10), max_chunks=[4, 4])
    cache = model.allocate_cache(1, 12)
    with pytest.raises(ValueError, match="a prompt of 20 bytes does not fit a cache of 12"):
        model.prefill(torch.zeros(20, dtype=torch.long), cu(20), cache)
    with pytest.raises(ValueError, match="none of them empty"):
        model.prefill(ids, cu(10, 0), cache)
    model.prefill(ids, cu(10), cache)
    for _ in range(2):
        model.step(torch.tensor([1]), cache)
    with pytest.raises(ValueError, match="reached the cache's max_length, 12"):
        model.step(torch.tensor([1]), cache)


# --- files --------------------------------------------------------------------------------------------------------


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    again = HNetForCausalLM.from_pretrained(tmp_path / "m")
    assert same(model, again)
    assert again.config == model.config
    assert (
        HNetForCausalLM.from_pretrained(tmp_path / "m" / "model.safetensors", dtype=torch.bfloat16).lm_head.weight.dtype
        == torch.bfloat16
    )


def test_shards_are_read_and_lead_nowhere_else(model, tmp_path):
    state = dict(model.state_dict())
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in set(files.values()):
        save_file({k: v for k, v in state.items() if files[k] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    model.config.to_json(tmp_path / "config.json")
    assert same(model, HNetForCausalLM.from_pretrained(tmp_path))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match="model-00002-of-00002.safetensors"):
        HNetForCausalLM.from_pretrained(tmp_path)
    for wrong in ("[]", "{", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x.safetensors"}}'):
        index.write_text(wrong)
        with pytest.raises(ValueError, match=r"index.json is not an index of safetensors files"):
            HNetForCausalLM.from_pretrained(tmp_path)


def test_tied_embeddings_round_trip(tmp_path):
    config = HNetConfig.from_dict({**HNetConfig.preset("tiny").to_dict(), "tie_embeddings": True})
    m = HNetForCausalLM(config)
    m.save_pretrained(tmp_path)
    again = HNetForCausalLM.from_pretrained(tmp_path)
    assert same(m, again)
    assert again.lm_head.weight is again.embeddings.weight


def test_published_pickle(model, tmp_path):
    """A .pt state dict; the config comes from a JSON beside it, or from the file's name."""
    torch.save(model.state_dict(), tmp_path / "x.pt")
    with pytest.raises(
        FileNotFoundError, match=r"no architecture for .*x.pt: pass config=, or put config.json or x.json"
    ):
        HNetForCausalLM.from_pretrained(tmp_path / "x.pt")
    assert same(model, HNetForCausalLM.from_pretrained(tmp_path / "x.pt", model.config))
    model.config.to_json(tmp_path / "x.json")
    assert same(model, HNetForCausalLM.from_pretrained(tmp_path / "x.pt"))
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    assert same(model, HNetForCausalLM.from_pretrained(tmp_path / "tiny.pt"))
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "tiny.pt")
    assert same(model, HNetForCausalLM.from_pretrained(tmp_path / "tiny.pt"))


def test_pickle_with_foreign_objects_runs_no_code(model, tmp_path, monkeypatch):
    """Parameters that carry omegaconf values load; a pickle that would call something is refused."""
    fake = types.ModuleType("omegaconf.listconfig")

    class ListConfig:
        def __init__(self):
            self.content = [3.0, 1.7]

    ListConfig.__module__, ListConfig.__qualname__ = "omegaconf.listconfig", "ListConfig"
    fake.ListConfig = ListConfig
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.listconfig", fake)
    state = {k: torch.nn.Parameter(v.clone()) for k, v in model.state_dict().items()}
    for p in state.values():
        p._optim = {"lr_multiplier": ListConfig()}
    torch.save(state, tmp_path / "tiny.pt")
    monkeypatch.undo()
    assert same(model, HNetForCausalLM.from_pretrained(tmp_path / "tiny.pt"))

    class Attack:
        def __reduce__(self):
            return (print, ("this must not run",))

    torch.save({"embeddings.weight": Attack()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt is not a whole PyTorch weights file"):
        read_weights(tmp_path / "evil.pt")


def test_damaged_and_wrong_files_are_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
        HNetForCausalLM.from_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    whole = (tmp_path / "tiny.pt").read_bytes()
    (tmp_path / "tiny.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"tiny.pt is not a whole PyTorch weights file"):
        HNetForCausalLM.from_pretrained(tmp_path / "tiny.pt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        HNetForCausalLM.from_pretrained(tmp_path / "nowhere")

    state = model.state_dict()
    gone = {k: v for k, v in state.items() if k != "lm_head.weight"}
    bad_shape = {**state, "lm_head.weight": torch.zeros(256, 32)}
    extra = {**state, "backbone.extra": torch.zeros(1)}
    for wrong, message in [
        (gone, "tiny.pt lacks lm_head.weight"),
        (bad_shape, r"tiny.pt: lm_head.weight must have shape \(256, 64\), got \(256, 32\)"),
        (extra, "tiny.pt has backbone.extra"),
        ([1, 2], "tiny.pt does not hold a dictionary of tensors"),
    ]:
        torch.save(wrong, tmp_path / "tiny.pt")
        with pytest.raises(ValueError, match=message):
            HNetForCausalLM.from_pretrained(tmp_path / "tiny.pt", HNetConfig.preset("tiny"))
