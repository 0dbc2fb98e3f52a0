"""`hnet eval` gives the numbers training's own evaluation gives."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from click.testing import CliRunner

from hnet import BOS, EOS, HNetForCausalLM
from hnet.chunk_lm import ChunkLM, ChunkLMConfig
from hnet.chunk_lm.evaluation import evaluate_chunk_lm
from hnet.chunk_lm.task import ChunkLMTask
from hnet.chunk_lm.train_config import ChunkLMTrainConfig
from hnet.cli.evaluate import evaluate
from hnet.data.corpus import Corpus
from hnet.data.packing import eval_batches
from hnet.data.perturb import PERTURBATIONS, perturb
from hnet.train.config import TrainConfig
from hnet.train.evaluation import evaluate_hnet
from hnet.train.loop import Trainer

from .train.conftest import STDLIB

HELD_OUT = STDLIB / "email" / "errors.py"
ALL = ("--bytes", 1 << 20)  # a ChunkLM spreads its windows by how many there are to be


def run(*args):
    result = CliRunner().invoke(evaluate, [str(a) for a in args], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.output


def shared(out):
    return dict(
        data=[str(STDLIB / "email" / "header.py")], val_data=[str(HELD_OUT)], steps=3, out=str(out), sample_bytes=0,
        plots=False, eval_bytes=1 << 20, weight_ema=0.9, warmup_steps=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def hnet_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "run"
    config = TrainConfig(
        **shared(out), preset="tiny", arch="c1 c1 T1", d_model=[32, 32, 64], compression=[2.0, 2.0], seq_len=128,
        batch_bytes=512, eval_every=3, checkpoint_every=3,
    )  # fmt: skip
    return out, Trainer(config).train()


@pytest.fixture(scope="module", params=[False, True], ids=["chunk head", "causal"])
def chunk_lm_run(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "run"
    config = ChunkLMTrainConfig(
        **shared(out), ckpt=str(out.parent / "one.pt"), width=16, n_layers=1, seq_len=64, kernel_len=8, chunk=4,
        batch_size=2, accumulation=1, steps_per_epoch=3, epochs=1, causal=request.param,
    )  # fmt: skip
    return out, Trainer(config, make_task=ChunkLMTask).train()


def test_hnet_equals_training(hnet_run):
    out, trained = hnet_run
    found = json.loads(run(out, HELD_OUT, "--batch-bytes", 512, "--json"))
    assert found["nats_per_symbol"] == trained["val_ce"]
    assert found["bits_per_byte"] == trained["val_bpb"]
    assert found["bytes"] == HELD_OUT.stat().st_size
    assert found["predictions"] == found["bytes"] + 1  # and the end of the document
    assert found["nats_per_byte"] == pytest.approx(found["nats_per_symbol"] * found["predictions"] / found["bytes"])
    assert found["perplexity_per_byte"] == pytest.approx(math.exp(found["nats_per_byte"]))
    sizes = [trained["stage0/val_bytes_per_chunk"], trained["stage1/val_bytes_per_chunk"]]
    assert found["bytes_per_chunk"] == pytest.approx(sizes, rel=1e-6)
    assert found["boundary_share"] == pytest.approx([1 / sizes[0], sizes[0] / sizes[1]], rel=1e-6)


def test_batches_of_another_size_change_rounding_only(hnet_run):
    best = hnet_run[0] / "checkpoints" / "best"
    found = json.loads(run(best, HELD_OUT, "--dtype", "fp32", "--json"))
    again = json.loads(run(best, HELD_OUT, "--dtype", "fp32", "--batch-bytes", 200, "--json"))
    assert found["nats_per_byte"] == pytest.approx(again["nats_per_byte"], rel=1e-5)


def test_ema_equals_training(hnet_run, chunk_lm_run):
    for (out, trained), size in ((hnet_run, 512), (chunk_lm_run, 128)):
        found = json.loads(run(out, HELD_OUT, "--ema", "--batch-bytes", size, *ALL, "--json"))
        assert found["nats_per_symbol"] == pytest.approx(trained["ema_val_ce"], rel=1e-6)
        assert found["bits_per_byte"] == pytest.approx(trained["ema_val_bpb"], rel=1e-6)
        assert trained["ema_val_ce"] != trained["val_ce"]


def test_chunk_lm_equals_training(chunk_lm_run):
    out, trained = chunk_lm_run
    found = json.loads(run(out, HELD_OUT, "--batch-bytes", 128, *ALL, "--json"))
    assert found["nats_per_byte"] == pytest.approx(trained["val_ce"], rel=1e-6)
    assert found["kind"] == "ChunkLM"
    alone = json.loads(run(out.parent / "one.pt", HELD_OUT, "--batch-bytes", 128, *ALL, "--json"))
    assert alone["nats_per_byte"] == found["nats_per_byte"]


def test_how_decided_routers_are(hnet_run):
    """As training's evaluation says, and G - F is what p on boundaries and elsewhere make of it."""
    out, trained = hnet_run
    found = json.loads(run(out, HELD_OUT, "--batch-bytes", 512, "--json"))
    assert "flips" not in found
    for i in range(2):
        for k in ("p_on", "p_off", "undecided", "G_minus_F"):
            assert found[k][i] == trained[f"stage{i}/val_{k}"]
        F = found["boundary_share"][i]
        G = F * found["p_on"][i] + (1 - F) * found["p_off"][i]
        assert found["G_minus_F"][i] == pytest.approx(G - F, rel=1e-9)
        assert 0 < found["p_off"][i] < 0.5 < found["p_on"][i] <= 1
    text = run(out, HELD_OUT, "--batch-bytes", 512)
    gap, near = trained["stage1/val_G_minus_F"], trained["stage1/val_undecided"]
    assert f"within 0.1 of 1/2 at {near:.1%} of positions; G - F {gap:.3f}\n" in text


def test_flips_between_two_models(hnet_run, tmp_path):
    """All boundaries of the one against its own, and against those of a model whose router is turned around."""
    out, _ = hnet_run
    same = json.loads(run(out, HELD_OUT, "--since", out, "--json"))
    assert (same["flips"], same["since"]) == ([0.0, 0.0], str(out))
    model = HNetForCausalLM.from_pretrained(sorted((out / "checkpoints").glob("step_*"))[-1])
    with torch.no_grad():
        next(model.stages()).routing_module.q_proj_layer.weight.neg_()
    model.save_pretrained(tmp_path)
    turned = json.loads(run(out, HELD_OUT, "--since", tmp_path, "--dtype", "fp32", "--bytes", 300, "--json"))
    # p becomes 1 - p, so every position is in one of the sets, and the first of a sequence in both
    (batch,) = eval_batches(Corpus.of([HELD_OUT.read_bytes()]), 128, 16384, 300)
    positions, sequences = len(batch.input_ids), len(batch.cu_seqlens) - 1
    assert turned["flips"][0] == (positions - sequences) / positions
    assert f"of its boundaries are others than in {tmp_path}" in run(out, HELD_OUT, "--since", tmp_path)


def test_robustness(hnet_run, chunk_lm_run, tmp_path):
    """Each row is what `hnet eval` says of a file with the changed text."""
    for out in (hnet_run[0], chunk_lm_run[0]):
        text = HELD_OUT.read_bytes()[:600]
        (tmp_path / "plain").write_bytes(text)
        rows = json.loads(run(out, tmp_path / "plain", "--robustness", "--json"))["robustness"]
        assert [row["text"] for row in rows] == ["as it is", *PERTURBATIONS]
        for row in rows:
            new = text
            if row["text"] in PERTURBATIONS:
                new = perturb(Corpus.of([text]), row["text"]).buffer.tobytes()
            (tmp_path / "changed").write_bytes(new)
            alone = json.loads(run(out, tmp_path / "changed", "--json"))
            assert row["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-9)
            assert row["bytes"] == alone["bytes"]
            assert row["bits_per_original_byte"] == pytest.approx(row["bits_per_byte"] * len(new) / 600, rel=1e-9)
    text = run(hnet_run[0], HELD_OUT, "--robustness", "--bytes", 100)
    assert "\n  as it is     100 " in text
    assert len({line for line in text.splitlines() if line.startswith(tuple(f"  {p}" for p in PERTURBATIONS))}) == 5


def test_limit(hnet_run):
    out, _ = hnet_run
    found = json.loads(run(out, HELD_OUT, "--bytes", 300, "--json"))
    assert 300 <= found["bytes"] < 300 + 128


def test_knowing_nothing_costs_eight_bits(hnet_run, tmp_path):
    model = HNetForCausalLM.from_pretrained(sorted((hnet_run[0] / "checkpoints").glob("step_*"))[-1])
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path)
    lines = tmp_path / "lines.txt"
    lines.write_bytes(b"one\ntwo\n" * 500)
    found = json.loads(run(tmp_path, lines, "--documents", "line", "--json"))
    assert (found["bytes"], found["predictions"], found["documents"]) == (4000, 5000, 1000)  # and 1000 ends
    assert found["nats_per_symbol"] == pytest.approx(math.log(256), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(8 * 5000 / 4000, rel=1e-6)


def test_report(hnet_run):
    out, trained = hnet_run
    text = run(out, HELD_OUT, "--batch-bytes", 512)
    assert f"bits per byte  {trained['val_bpb']:.4f}, perplexity {2 ** trained['val_bpb']:.3f}\n" in text
    assert f"a symbol {trained['val_ce']:.4f}\n" in text
    assert "context        windows of 128 that start afresh\n" in text
    assert "windows of 128 every 32 bytes\n" in run(out, HELD_OUT, "--stride", 32, "--bytes", 100)
    assert "stage 1  " in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.txt"], "data path nowhere.txt does not exist"),
        ([HELD_OUT, "--seq-len", "1"], "seq_len must be at least 2"),
        ([HELD_OUT, "--stride", "0"], r"stride must be 1 to seq_len \(128\), got 0"),
        ([HELD_OUT, "--stride", "129"], r"stride must be 1 to seq_len \(128\), got 129"),
        (["hf:text?data_files=x"], "needs --bytes"),
        ([HELD_OUT, "--since", "nowhere"], "nowhere"),
    ],
)
def test_mistakes(hnet_run, args, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(hnet_run[0], *args)


def test_no_average(tmp_path):
    from hnet.config import HNetConfig

    HNetForCausalLM(HNetConfig.preset("tiny")).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="weight_ema"):
        run(tmp_path, HELD_OUT, "--ema")


# --- sliding context ----------------------------------------------------------------------------------------------


@torch.no_grad()
def hnet_by_hand(model, documents, seq_len, stride):
    """Every symbol by itself, after what a window may show it; the shortest context that was needed."""
    nats, contexts = 0.0, []
    for d in documents:
        symbols = [*d, EOS]
        for j, wanted in enumerate(symbols):
            begin = 0 if j < seq_len else stride * math.ceil((j + 1 - seq_len) / stride)
            ids = torch.tensor([BOS, *symbols[begin:j]])
            logits = model(ids, cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32)).logits
            nats -= logits[-1].log_softmax(-1)[wanted].item()
            contexts.append((j - begin, j))
    assert all(length >= min(seq_len - stride, before) for length, before in contexts)
    return nats


@pytest.mark.parametrize(("seq_len", "stride"), [(12, 5), (12, 1), (12, 12), (7, 3), (200, 50)])
def test_sliding_context_of_an_hnet_is_every_symbol_by_itself(hnet_run, seq_len, stride):
    model = HNetForCausalLM.from_pretrained(sorted((hnet_run[0] / "checkpoints").glob("step_*"))[-1])
    documents = [b"a", b"A short one.", HELD_OUT.read_bytes()[:61], b"exactly 11b", b"twelve bytes"]
    score = evaluate_hnet(
        model, Corpus.of(documents), nullcontext, seq_len=seq_len, batch_bytes=100, stride=stride
    )  # fmt: skip
    assert (score.num_bytes, score.targets) == (sum(map(len, documents)), sum(map(len, documents)) + 5)
    nats = hnet_by_hand(model.eval(), documents, seq_len, stride)
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.bpb == pytest.approx(nats / math.log(2) / score.num_bytes, rel=1e-5)


@pytest.mark.parametrize(("seq_len", "stride"), [(12, 5), (12, 1), (12, 12), (64, 20)])
def test_sliding_context_of_a_causal_chunk_lm_is_every_byte_by_itself(seq_len, stride):
    torch.manual_seed(0)
    config = ChunkLMConfig(d_model=16, n_layers=2, seq_len=64, kernel_len=8, causal=True, dropout=0.0)
    model = ChunkLM(config).eval()
    torch.nn.init.normal_(model.head.weight)
    long = [HELD_OUT.read_bytes()[:n] for n in (65, 130)]
    short = [b"a", b"tiny"]
    score = evaluate_chunk_lm(
        model, Corpus.of([long[0], *short, long[1]]), nullcontext, seq_len=seq_len, batch_size=3, stride=stride
    )  # fmt: skip
    nats = 0.0
    for d in (*long, b"".join(short)):
        nats += math.log(256)  # nothing is before the first
        for j in range(1, len(d)):
            begin = 0 if j <= seq_len else min(stride * math.ceil((j - seq_len) / stride), len(d) - 1 - seq_len)
            assert j - begin >= min(seq_len - stride, j)
            with torch.no_grad():
                logits = model(torch.tensor([list(d[begin:j])]))[0, -1]
            nats -= logits.log_softmax(-1)[d[j]].item()
    assert score.num_bytes == score.targets == 65 + 130 + 5
    assert score.nats == pytest.approx(nats, rel=1e-5)


def test_sliding_context_from_the_command(hnet_run, chunk_lm_run):
    out, _ = hnet_run
    afresh, slid = (json.loads(run(out, HELD_OUT, "--json", *more)) for more in ((), ("--stride", 32)))
    assert (afresh["stride"], slid["stride"]) == (None, 32)
    assert (afresh["bytes"], afresh["predictions"]) == (slid["bytes"], slid["predictions"])
    assert afresh["bits_per_byte"] != slid["bits_per_byte"]
    out, _ = chunk_lm_run
    if json.loads(sorted((out / "checkpoints").glob("step_*/config.json"))[-1].read_text())["causal"]:
        found = json.loads(run(out, HELD_OUT, "--json", "--stride", 16))
        assert found["bytes"] == HELD_OUT.stat().st_size
    else:
        with pytest.raises(ValueError, match="stride must be left out for a chunk head"):
            run(out, HELD_OUT, "--stride", 16)
    with pytest.raises(ValueError, match="since must be left out for a ChunkLM"):
        run(out, HELD_OUT, "--since", out)
    with pytest.raises(ValueError, match="is a ChunkLM"):
        run(hnet_run[0], HELD_OUT, "--since", out)


def test_int8_costs_little(hnet_run):
    fp32, int8 = (
        json.loads(run(hnet_run[0], HELD_OUT, "--json", "--dtype", dtype))["bits_per_byte"]
        for dtype in ("fp32", "int8")
    )
    assert fp32 != int8
    assert abs(int8 / fp32 - 1) < 0.005
