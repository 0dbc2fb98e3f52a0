"""`hnet eval` gives the numbers training's own evaluation gives."""

import json
import math

import pytest
import torch
from click.testing import CliRunner

from hnet.chunk_lm.task import ChunkLMTask
from hnet.chunk_lm.train_config import ChunkLMTrainConfig
from hnet.cli.evaluate import evaluate
from hnet.train.config import TrainConfig
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
    assert found["nats_per_byte"] == trained["val_ce"]
    assert found["bits_per_byte"] == trained["val_bpb"]
    assert found["predictions"] == HELD_OUT.stat().st_size + 1  # and the end of the document
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
        assert found["nats_per_byte"] == pytest.approx(trained["ema_val_ce"], rel=1e-6)
        assert trained["ema_val_ce"] != trained["val_ce"]


def test_chunk_lm_equals_training(chunk_lm_run):
    out, trained = chunk_lm_run
    found = json.loads(run(out, HELD_OUT, "--batch-bytes", 128, *ALL, "--json"))
    assert found["nats_per_byte"] == pytest.approx(trained["val_ce"], rel=1e-6)
    assert found["kind"] == "ChunkLM"
    alone = json.loads(run(out.parent / "one.pt", HELD_OUT, "--batch-bytes", 128, *ALL, "--json"))
    assert alone["nats_per_byte"] == found["nats_per_byte"]


def test_limit(hnet_run):
    out, _ = hnet_run
    found = json.loads(run(out, HELD_OUT, "--bytes", 300, "--json"))
    assert 300 <= found["predictions"] < 300 + 128


def test_knowing_nothing_costs_eight_bits(hnet_run, tmp_path):
    from hnet.model.causal_lm import HNetForCausalLM

    model = HNetForCausalLM.from_pretrained(sorted((hnet_run[0] / "checkpoints").glob("step_*"))[-1])
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path)
    assert json.loads(run(tmp_path, HELD_OUT, "--json"))["bits_per_byte"] == pytest.approx(8, rel=1e-6)


def test_report(hnet_run):
    out, trained = hnet_run
    text = run(out, HELD_OUT, "--batch-bytes", 512)
    assert f"bits per byte  {trained['val_ce'] / math.log(2):.4f}" in text
    assert "stage 1  " in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.txt"], "data path nowhere.txt does not exist"),
        ([HELD_OUT, "--seq-len", "1"], "seq_len must be at least 2"),
        (["hf:text?data_files=x"], "needs --bytes"),
    ],
)
def test_mistakes(hnet_run, args, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(hnet_run[0], *args)


def test_no_average(tmp_path):
    from hnet.config import HNetConfig
    from hnet.model.causal_lm import HNetForCausalLM

    HNetForCausalLM(HNetConfig.preset("tiny")).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="weight_ema"):
        run(tmp_path, HELD_OUT, "--ema")
