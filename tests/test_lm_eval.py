"""The real lm-evaluation-harness on small local tasks; no network."""

import importlib
import json
import math
import sys

import pytest
import torch
from click.testing import CliRunner

from hnet import HNetConfig, HNetForCausalLM
from hnet.cli.main import main

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'hnet-kernels[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from hnet.lm_eval import HNetLM  # noqa: E402

TEXTS = ["The first text, of a few words.", "a", "Das zweite: naïve 日本語 🦊 " * 9, "x" * 300]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = HNetForCausalLM(HNetConfig.preset("tiny"))
    with torch.no_grad():  # routers that decide
        model.backbone.routing_module.q_proj_layer.weight.add_(torch.randn(64, 64) * 0.3)
    where = tmp_path_factory.mktemp("lm_eval") / "model"
    model.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def model(folder):
    return HNetForCausalLM.from_pretrained(folder).eval()


def harness(folder, task, docs, **options):
    """The harness's results for a task of `docs`."""
    import datasets

    config = {
        "task": "local", "dataset_path": "none", "test_split": "test", "num_fewshot": 0,
        "custom_dataset": lambda **kwargs: {"test": datasets.Dataset.from_list(docs)}, **task,
    }  # fmt: skip
    return lm_eval.simple_evaluate(
        "hnet", {"pretrained": str(folder), "dtype": "fp32", **options}, [config], bootstrap_iters=0, device="cpu",
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip


def logprobs(model, text):
    """(bytes, 256), of each byte of a text, before it is read"""
    ids = torch.tensor([[254, *text]])
    with torch.no_grad():
        return model(ids).logits[0].double().log_softmax(-1)


def nats(model, text, begin=0):
    """Of the bytes from `begin` on."""
    rows = logprobs(model, text)
    return sum(rows[i, text[i]].item() for i in range(begin, len(text)))


# --- the harness --------------------------------------------------------------------------------------------------


def test_bits_per_byte(folder, model):
    task = {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    }  # fmt: skip
    found = harness(folder, task, [{"text": t} for t in TEXTS])["results"]["local"]
    size = sum(len(t.encode()) for t in TEXTS)
    want = -sum(nats(model, t.encode()) for t in TEXTS) / size
    assert found["bits_per_byte,none"] == pytest.approx(want / math.log(2), rel=1e-6)
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(want), rel=1e-6)


@pytest.mark.parametrize("stride", [None, 40])
def test_with_ends_it_is_hnet_eval(folder, tmp_path, stride):
    task = {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    options = {"seq_len": 100, "score_end": True, "stride": stride}
    found = harness(folder, task, [{"text": t} for t in TEXTS], **options)["results"]["local"]["bits_per_byte,none"]
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    flags = ["--seq-len", "100", "--dtype", "fp32", "--json", *(["--stride", str(stride)] if stride else [])]
    files = [str(tmp_path / f"{i}.txt") for i in range(len(TEXTS))]
    done = CliRunner().invoke(main, ["eval", str(folder), *files, *flags])
    assert done.exit_code == 0, done.output
    assert found == pytest.approx(json.loads(done.output)["bits_per_byte"], rel=1e-9)


def test_multiple_choice(folder, model):
    docs = [
        {"question": "One and one is", "choices": [" two", " seven", " x"], "gold": 0},
        {"question": "日本", "choices": ["語", "x", "語語語"], "gold": 2},
    ]
    task = {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    result = harness(folder, task, docs, batch_bytes=30)
    right = 0
    for doc, sample in zip(docs, result["samples"]["local"], strict=True):
        context = doc["question"].encode()
        want = [nats(model, context + c.encode(), len(context)) for c in doc["choices"]]
        assert [float(r[0]) for r in sample["filtered_resps"]] == pytest.approx(want, rel=1e-5)
        right += max(range(3), key=want.__getitem__) == doc["gold"]
    assert result["results"]["local"]["acc,none"] == right / 2


def test_generate_until(folder, model):
    docs = [{"text": "Once upon", "answer": "x"}, {"text": "日本", "answer": "y"}]
    full = model.generate([d["text"] for d in docs], max_new_bytes=20, temperature=0)
    stop = full[0][5:7].decode(errors="replace")
    task = {
        "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [stop, "\n\n"], "max_gen_toks": 10}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    result = harness(folder, task, docs, token_bytes=2, batch_size=1)
    want = model.generate([d["text"] for d in docs], max_new_bytes=20, temperature=0, stop=[stop, "\n\n"])
    assert [s["resps"][0][0] for s in result["samples"]["local"]] == [w.decode(errors="replace") for w in want]


# --- details ------------------------------------------------------------------------------------------------------


def asked(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_likelihoods_and_whether_greedy_writes_them(folder, model):
    lm = HNetLM(str(folder), seq_len=50, dtype="fp32", device="cpu")
    (greedy,) = model.generate("ab", max_new_bytes=4, temperature=0)
    written = greedy.decode("utf-8", "surrogateescape")
    other = "zzzz" if written != "zzzz" else "yyyy"
    long = "long " * 40
    found = lm.loglikelihood(asked("loglikelihood", ("ab", written), ("ab", other), ("", "a"), ("ab", ""), (long, "!")))
    assert [is_greedy for _, is_greedy in found] == [True, False, found[2][1], True, found[4][1]]
    want = [nats(model, b"ab" + greedy, 2), nats(model, b"ab" + other.encode(), 2), nats(model, b"a"), 0.0]
    want += [nats(model, long.encode()[-48:] + b"!", 48)]  # BOS and the end of what is too long
    assert [n for n, _ in found] == pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match=r"a continuation of 50 bytes does not fit seq_len 50 \(with BOS\)"):
        lm.loglikelihood(asked("loglikelihood", ("", "x" * 50)))


def test_empty_texts_count_nothing(folder, model):
    lm = HNetLM(str(folder), dtype="fp32", device="cpu", score_end=True)
    found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("",), ("ab",), ("",)))
    end = logprobs(model, b"ab")[2, 255].item()
    assert found == pytest.approx([0.0, nats(model, b"ab") + end, 0.0], rel=1e-6)
    assert lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("",))) == [0.0]


def test_sampling_is_repeatable_and_long_contexts_are_cut(folder, model):
    lm = HNetLM(str(folder), seq_len=40, device="cpu", seed=5)
    options = {"until": "", "max_gen_toks": 12, "do_sample": True, "temperature": 0.9, "top_k": 40}
    requests = asked("generate_until", ("long " * 20, options), ("short", options))
    found = lm.generate_until(requests)
    assert found == lm.generate_until(requests)
    cut = ("long " * 20)[-27:]
    want = model.generate([cut, "short"], max_new_bytes=12, temperature=0.9, top_k=40, seed=5)
    assert found == [w.decode(errors="replace") for w in want]


def test_options_that_make_no_sense(folder):
    for wrong, message in (
        ({"seq_len": 1}, "seq_len must be at least 2, got 1"),
        ({"seq_len": 50, "stride": 51}, r"stride must be 1 to seq_len \(50\), got 51"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"device": "cuda:1"}, "device must be auto, cpu or cuda, got cuda:1"),
    ):
        with pytest.raises(ValueError, match=message):
            HNetLM(str(folder), **{"device": "cpu", **wrong})
    lm = HNetLM(str(folder), seq_len=50, device="cuda:0")  # what the harness's command gives unless told, GPU or not
    for wrong, message in (
        ({"until": [], "num_beams": 4}, "generation_kwargs must be of .*, got num_beams"),
        ({"until": [], "max_gen_toks": 49}, r"max_gen_toks \(49 bytes\) must leave room"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate_until(asked("generate_until", ("a", wrong)))


def test_without_the_harness_the_extra_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "hnet.lm_eval")
    with pytest.raises(ValueError, match=r"hnet.lm_eval needs lm-eval: pip install 'hnet-kernels\[eval\]'"):
        importlib.import_module("hnet.lm_eval")
