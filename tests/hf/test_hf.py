"""The real transformers, on local folders."""

import copy
import importlib
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from hnet import HNetForCausalLM as Native
from hnet.cli.main import main
from hnet.model import native_step
from hnet.train.losses import losses

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'hnet-kernels[hf]'")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from hnet.hf import HNetCache, HNetConfig, HNetForCausalLM, HNetTokenizer  # noqa: E402

transformers.utils.logging.disable_progress_bar()


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def same(model, other, atol=1e-5):
    """The same weights, and logits to rounding: a tensor may lie where a matrix product sums in another order."""
    ids = torch.randint(0, 256, (2, 60))
    a, b = model.state_dict(), other.state_dict()
    assert torch.allclose(logits(model, ids), logits(other, ids), atol=atol)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def batch(texts, side):
    """input_ids and attention_mask, with rubbish for padding"""
    width = max(map(len, texts))
    ids, mask = torch.full((len(texts), width), 77), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, where], mask[row, where] = torch.tensor(list(text)), 1
    return ids, mask


@pytest.fixture(scope="module")
def model(native):
    return HNetForCausalLM.from_native(native, compression=[2.0, 3.0])


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", ["5GB", "100KB"])
def test_saved_and_loaded_by_the_auto_classes(model, native, tmp_path, shards):
    where = tmp_path / "owner" / "hnet-1.5.b"
    model.save_pretrained(where, max_shard_size=shards)
    assert (len(list(where.glob("*.safetensors"))) > 1) == (shards == "100KB")
    config = AutoConfig.from_pretrained(where)
    assert type(config) is HNetConfig
    assert config.native() == native.config
    assert config.compression == [2.0, 3.0]
    again = AutoModelForCausalLM.from_pretrained(where)
    assert type(again) is HNetForCausalLM
    assert same(again, native)  # logits: also the buffers that no file has
    assert same(Native.from_pretrained(where), native)  # hnet reads it too


def test_bf16_as_in_hnet(model, native, tmp_path):
    model.save_pretrained(tmp_path)
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = Native.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    low.save_pretrained(tmp_path / "low")
    for model in (low, AutoModelForCausalLM.from_pretrained(tmp_path / "low")):
        assert model.dtype == torch.bfloat16
        assert same(model, ours, atol=0.02)


def test_what_hnet_wrote_is_read(native, tmp_path):
    """A folder of `hnet export`, a published .pt, a run's folder."""
    native.save_pretrained(tmp_path / "exported")
    torch.save(native.state_dict(), tmp_path / "published.pt")
    native.config.to_json(tmp_path / "published.json")
    step = tmp_path / "run" / "checkpoints" / "step_00000001"
    native.save_pretrained(step)
    (step / "manifest.json").write_text("{}")
    for model in (
        HNetForCausalLM.from_pretrained(tmp_path / "exported"),
        HNetForCausalLM.from_checkpoint(tmp_path / "exported"),
        HNetForCausalLM.from_checkpoint(tmp_path / "published.pt", compression=[3, 3]),
        HNetForCausalLM.from_checkpoint(tmp_path / "run"),
    ):
        assert same(model, native)
    model.native.save_pretrained(tmp_path / "back")
    assert same(Native.from_pretrained(tmp_path / "back"), native)


def test_exported_for_transformers_and_back(native, tmp_path):
    native.save_pretrained(tmp_path / "ours")
    for flags, source, out in (("hf bf16", "ours", "hf"), ("hnet bf16", "hf", "back"), ("hf fp32", "ours", "whole")):
        form, dtype = flags.split()
        command = ["export", str(tmp_path / source), str(tmp_path / out), "--format", form, "--dtype", dtype]
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), native)
    back = Native.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), back, atol=0.02)
    assert {p.name for p in (tmp_path / "back").iterdir()} == {"config.json", "model.safetensors"}
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("a").input_ids == [254, 97]


def test_an_export_that_went_wrong_is_an_error(native, tmp_path, monkeypatch):
    native.save_pretrained(tmp_path / "ours")
    save = Native.save_pretrained

    def spoilt(self, out):
        other = copy.deepcopy(self)
        other.lm_head.weight.data[7, 3] *= 1.001
        save(other, out)

    monkeypatch.setattr(Native, "save_pretrained", spoilt)
    done = CliRunner().invoke(main, ["export", str(tmp_path / "ours"), str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "does not hold the model that was to be written" in done.output


def test_tied_embeddings_stay_tied(native, tmp_path):
    config = HNetConfig.from_native(native.config)
    config.tie_word_embeddings = True
    model = HNetForCausalLM(config)
    assert config.tie_embeddings
    model.save_pretrained(tmp_path)
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path), Native.from_pretrained(tmp_path)):
        assert again.lm_head.weight is again.embeddings.weight
        assert same(again, model.eval())


def test_a_new_model_begins_as_one_of_hnet(native):
    torch.manual_seed(3)
    ours = Native(native.config)
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(HNetConfig.from_native(native.config))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), made.state_dict().values(), strict=True))


def test_missing_weights_begin_as_in_a_new_model(native, tmp_path):
    native.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model.safetensors")
    lost = ["backbone.encoder.layers.1.mixer.out_proj.weight", "backbone.residual_proj.weight", "ngrams.weight"]
    save_file({k: v for k, v in state.items() if k not in lost}, tmp_path / "model.safetensors", {"format": "pt"})
    model, info = HNetForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(lost)
    found = model.state_dict()
    residuals = 3  # of the outermost stage
    assert found[lost[0]].std().item() == pytest.approx(0.02 / residuals**0.5, rel=0.1)
    assert not found[lost[1]].any()
    assert not found[lost[2]].any()
    assert all(torch.equal(found[k], v) for k, v in state.items() if k not in lost)


def test_repositories_whose_names_have_dots(native, tmp_path, monkeypatch):
    asked = []

    def download(repo, **options):
        asked.append(repo)
        native.save_pretrained(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    HNetForCausalLM.from_checkpoint("owner.x/hnet-1.5_v2.b")
    assert asked == ["owner.x/hnet-1.5_v2.b"]
    for missing in ("runs/model.pt", "runs/model.safetensors", "runs/config.json", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"does not exist$"):
            HNetForCausalLM.from_checkpoint(missing)


def test_configurations_that_make_no_sense():
    tiny = {"arch_layout": ["m1", ["m1"], "m1"], "d_model": [64, 64], "d_intermediate": [0, 0]}
    for wrong, message in (
        ({"compression": [2.0, 2.0]}, "compression must list a number > 1 for each of 1 stages"),
        ({"compression": [1.0]}, "compression must list"),
        ({"ratio_weight": -1.0}, "ratio_weight must be >= 0"),
        ({"d_model": [64]}, "d_model must list one value for each of the 2 stages"),
    ):
        with pytest.raises(Exception, match=message):
            HNetConfig(**{**tiny, **wrong})
    assert HNetConfig().native() == type(HNetConfig().native()).preset("hnet_1stage_L")
    assert json.loads(HNetConfig().to_json_string())["d_model"] == [1024, 1536]  # what other readers need is there


# --- padding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_each_alone(model, native, texts, side):
    ids, mask = batch(texts, side)
    with torch.no_grad():
        out = model(ids, attention_mask=mask)
    for row, text in enumerate(texts):
        alone = native(torch.tensor([list(text)]))
        assert torch.allclose(out.logits[row][mask[row] == 1], alone.logits[0], atol=1e-5)
        assert not out.logits[row][mask[row] == 0].any()
    assert torch.equal(model(ids, attention_mask=mask, logits_to_keep=3).logits, out.logits[:, -3:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_is_that_of_our_trainer(model, native, texts, side):
    """On the pack of the same documents; -100 and padding are not asked for, nor the byte after a row's end."""
    ids, mask = batch(texts, side)
    out = model(ids, attention_mask=mask, labels=ids)
    pack = torch.tensor(list(b"".join(texts)))
    cu = torch.tensor([0, *map(len, texts)]).cumsum(0).int()
    plain = native(pack, cu_seqlens=cu)
    inside = torch.ones(len(pack), dtype=torch.bool)
    inside[cu[1:].long() - 1] = False
    targets = pack.roll(-1)[inside]
    want = losses(plain.logits[inside], targets, plain.routing, [2.0, 3.0], torch.full((2,), 0.03))
    assert torch.allclose(out.ce, want.ce, atol=1e-5)
    assert torch.allclose(out.ratio_loss, want.ratio_loss, atol=1e-5)
    assert torch.allclose(out.loss, want.loss, atol=1e-5)
    shifted = torch.full_like(ids, -100)
    shifted[mask == 1] = pack.roll(-1).masked_fill(~inside, -100)
    for rubbish in (None, ids + 1):  # labels already in their places count alone
        again = model(ids, attention_mask=mask, labels=rubbish, shift_labels=shifted)
        assert torch.equal(again.loss, out.loss)
    assert not torch.allclose(model(ids, attention_mask=mask, shift_labels=shifted.flip(1)).loss, out.loss, atol=1e-3)
    labels = ids.clone()
    labels[0] = -100
    some = model(ids, attention_mask=mask, labels=labels)
    rest = inside[len(texts[0]) :]
    want = F.cross_entropy(plain.logits[len(texts[0]) :][rest], pack.roll(-1)[len(texts[0]) :][rest])
    assert torch.allclose(some.ce, want, atol=1e-5)


def test_micro_batches_add_up_to_their_batch(model, texts):
    ids, mask = batch([t for t in texts if len(t) > 1], "right")
    count = mask[:, 1:].sum()
    whole, loss = model(ids, attention_mask=mask, labels=ids), 0
    for i, m in zip(ids, mask, strict=True):
        part = model(i[None], attention_mask=m[None], labels=i[None], num_items_in_batch=count)
        share = m[1:].sum() / count  # of the labels; the ratio losses' weights add up to their weight
        assert torch.allclose(part.loss, share * (part.ce + 0.03 * part.ratio_loss))
        loss += part.loss - share * 0.03 * part.ratio_loss
    assert torch.allclose(loss, whole.ce)


def test_calls_that_make_no_sense(model):
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of input_ids, \(2, 4\), got \(2, 5\)"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="input_ids must be"):
        model(inputs_embeds=torch.zeros(2, 4, 64))
    with pytest.raises(ValueError, match="rows must end with text where there is a cache: pad on the left"):
        model(ids, attention_mask=torch.tensor([[1, 1, 1, 0]] * 2), past_key_values=HNetCache(8))
    with pytest.raises(ValueError, match="labels must be left out"):
        model(ids, labels=ids, past_key_values=HNetCache(8))
    for asked, what in [("output_hidden_states", True), ("output_attentions", True), ("guidance_scale", 2.0)]:
        message = (
            "guidance_scale must be left out, got 2" if asked == "guidance_scale" else "no hidden states or attent"
        )
        with pytest.raises(ValueError, match=message):
            model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, **{asked: what})
    with pytest.raises(ValueError, match="cannot be resized"):
        model.resize_token_embeddings(300)


# --- generate() ---------------------------------------------------------------------------------------------------


def test_greedy_is_that_of_hnet_with_and_without_cache(model, native):
    tokenizer = HNetTokenizer()
    prompts = ["Once upon a time", "日本", ""]
    given = tokenizer(prompts, padding=True, return_tensors="pt")
    out = model.generate(**given, max_new_tokens=24)
    new = [bytes(row).split(b"\xff")[0] for row in out[:, given.input_ids.shape[1] :].tolist()]
    assert new == native.generate(prompts, max_new_bytes=24, temperature=0)
    assert torch.equal(out, model.generate(**given, max_new_tokens=24, use_cache=False))
    assert torch.equal(out, model.generate(**given, max_new_tokens=24, prefill_chunk_size=None, num_return_sequences=1))


def test_sampling_and_several_of_each(model):
    given = HNetTokenizer()(["ab", "abcd"], padding=True, return_tensors="pt")
    torch.manual_seed(0)
    cached = model.generate(**given, do_sample=True, top_k=0, max_new_tokens=12, num_return_sequences=3)
    torch.manual_seed(0)
    again = model.generate(**given, do_sample=True, top_k=0, max_new_tokens=12, num_return_sequences=3, use_cache=False)
    assert cached.shape[0] == 6
    assert torch.equal(cached, again)
    assert not (cached[:, given.input_ids.shape[1] :] == 254).any()  # BOS only ever begins a text


def test_a_cache_is_taken_up_again(model, native):
    ids = torch.tensor([list(b"\xfeabcdefgh")])
    cache = HNetCache(20)
    with torch.no_grad():
        first = model(ids[:, :4], past_key_values=cache).logits
        model(ids[:, 4:5], past_key_values=(twin := copy.deepcopy(cache)))
        model(ids[:, :4], past_key_values=copy.deepcopy(twin))  # other bytes, in another cache
        rest = model(ids[:, 4:], past_key_values=cache).logits
        assert torch.allclose(model(ids[:, 5:], past_key_values=twin).logits, rest[:, 1:], atol=1e-4)
        assert torch.allclose(torch.cat([first, rest], 1), native(ids).logits, atol=1e-4)
        with pytest.raises(ValueError, match=r"room for 20 bytes a row, these need 22: .*HNetCache\(22\)"):
            model(ids[:, :1].expand(1, 13), past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values were filled by another model"):
            copy.deepcopy(model)(ids[:, :1], past_key_values=cache)
        assert cache.slots.root.seen == [9]  # nothing was fed


def test_a_step_on_a_cpu_is_prepared_once(model, monkeypatch):
    made = []
    describe = native_step.NativeStep._describe
    monkeypatch.setattr(native_step.NativeStep, "_describe", lambda self: made.append(self) or describe(self))
    model.generate(torch.tensor([list(b"\xfeab")]), max_new_tokens=6, do_sample=False)
    assert len(made) == 1


def test_beams_are_exact_without_cache_and_refused_with(model):
    given = HNetTokenizer()(["The", "a"], padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match="beam search needs use_cache=False"):
        model.generate(**given, num_beams=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="is not offered"):
        model.generate(given.input_ids[:1], assistant_model=model, max_new_tokens=2)
    out = model.generate(**given, num_beams=300, max_new_tokens=2, use_cache=False, suppress_tokens=[254, 255])
    alone = [tuple(text) for text in out[:, -2:].tolist()]
    for prompt, found in zip(
        (b"\xfeThe", b"\xfea"), alone, strict=True
    ):  # 300 beams of 256 first bytes keep all of them
        first = logits(model, torch.tensor([list(prompt)]))[0, -1].log_softmax(-1)
        ids = torch.tensor([[*prompt, b] for b in range(256)])
        pairs = first[:, None] + logits(model, ids)[:, -1].log_softmax(-1)
        pairs[254:], pairs[:, 254:] = -torch.inf, -torch.inf
        assert divmod(pairs.argmax().item(), 256) == found


# --- tokenizer ----------------------------------------------------------------------------------------------------


def test_every_text_comes_back(tmp_path):
    HNetForCausalLM.config_class().save_pretrained(tmp_path)
    HNetTokenizer(append_eos=True).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is HNetTokenizer
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 254, 255)
    for text in ("", " two  spaces , and . ", "naïve 日本語 🦊\n\t\x00", "<|eos|><|bos|> </s>"):
        assert tokenizer(text).input_ids == [254, *text.encode(), 255]
        assert tokenizer(text, add_special_tokens=False).input_ids == [*text.encode()]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == [*text.encode()]
    assert sorted(tokenizer.get_vocab().values()) == list(range(256))


def test_decoding_never_cuts_a_character():
    tokenizer = HNetTokenizer()
    fox = "a🦊b".encode()
    for cut in range(len(fox) + 1):
        assert tokenizer.decode([*fox[:cut]]) == fox[:cut].decode(errors="replace")
    assert tokenizer.batch_decode([[0x80, 65], [200]]) == ["\ufffdA", "\ufffd"]


# --- Trainer ------------------------------------------------------------------------------------------------------


def test_ten_steps_of_the_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'hnet-kernels[hf]'")
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    tiny = {"arch_layout": ["m1", ["T1"], "m1"], "d_model": [64, 64], "d_intermediate": [0, 96]}
    attention = {"num_heads": [4, 4], "rotary_emb_dim": [8, 8], "window_size": [-1, -1]}
    torch.manual_seed(0)
    model = HNetForCausalLM(HNetConfig(**tiny, ssm_cfg={"d_state": 8}, attn_cfg=attention, compression=[2.0]))
    tokenizer = HNetTokenizer(append_eos=True)
    data = [tokenizer("the same few words " * (1 + i % 3)) for i in range(16)]
    options = TrainingArguments(
        str(tmp_path), max_steps=10, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=5e-3,
        logging_steps=1, report_to=[], save_steps=10, use_cpu=True, disable_tqdm=True, seed=0,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        model, options, train_dataset=data, eval_dataset=data[:4], processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    trainer.train()
    seen = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(seen) == 10
    assert seen[0] == pytest.approx(5.6, abs=0.3)  # ln 256 and the ratio loss, whatever the accumulation
    assert seen[-1] < seen[0] - 1
    assert trainer.evaluate()["eval_loss"] < seen[0] - 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-10")
    assert same(again, model.eval())
    assert type(AutoTokenizer.from_pretrained(tmp_path / "checkpoint-10")) is HNetTokenizer


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "hnet.hf")
    with pytest.raises(ValueError, match=r"hnet.hf needs transformers: pip install 'hnet-kernels\[hf\]'"):
        importlib.import_module("hnet.hf")


@pytest.mark.parametrize("maps", [["in_proj", "Wqkv"], "all-linear"])
def test_adapters_of_peft(model, native, tmp_path, maps):
    """Every one learns, those on routers and residual projections too; saved, and merged, they say the same."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'hnet-kernels[lora]'")
    ids = torch.randint(0, 250, (2, 40))
    settings = peft.LoraConfig(r=2, target_modules=maps, task_type="CAUSAL_LM")
    lm = peft.get_peft_model(copy.deepcopy(model), settings)
    assert torch.equal(logits(lm, ids), logits(model, ids))
    pairs = {n: p for n, p in lm.named_parameters() if "lora_B" in n}
    linears = [n for n, m in native.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert len(pairs) == sum(maps == "all-linear" or n.endswith(("in_proj", "Wqkv")) for n in linears)
    lm(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in pairs.values())
    for p in pairs.values():
        torch.nn.init.normal_(p, std=0.1)
    text = lm.generate(input_ids=ids[:, :9], max_new_tokens=8, do_sample=False)
    lm.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert torch.equal(logits(again, ids), logits(lm, ids))
    merged = lm.merge_and_unload()
    assert type(merged) is HNetForCausalLM
    with torch.no_grad():
        a, b, plain = merged(ids), again(ids), model(ids)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(a.logits, plain.logits, atol=0.01)
    for x, y in zip(a.routing, b.routing, strict=True):
        torch.testing.assert_close(x.boundary_prob, y.boundary_prob, rtol=1e-4, atol=2e-5)
    assert torch.equal(merged.generate(input_ids=ids[:, :9], max_new_tokens=8, do_sample=False), text)
