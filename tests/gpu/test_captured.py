"""The trainer with its step as a real CUDA graph, against the same run without; and TF32 and compiled blocks."""

import dataclasses
from pathlib import Path

import pytest
import torch

from hnet.metrics_log import read_metrics
from hnet.train.loop import Trainer

from ..train.conftest import tiny

pytestmark = pytest.mark.gpu


@pytest.fixture
def config(tmp_path):
    precision = torch.get_float32_matmul_precision()
    yield dataclasses.replace(
        tiny(tmp_path / "run"), device="cuda", dtype="bf16", arch="c1 m1T1", d_model=[128, 192], max_chunks=[0.6],
        documents="paragraph", steps=12, eval_every=6, checkpoint_every=6, deterministic=False, compile=False,
        cuda_graph="on",
    )  # fmt: skip
    torch.set_float32_matmul_precision(precision)


def run(config, **change):
    c = dataclasses.replace(config, **change)
    trainer = Trainer(c)
    trainer.train()
    rows = read_metrics(Path(c.out) / "metrics.jsonl")
    losses = [r["loss"] for r in rows if "loss" in r]
    return trainer, losses, [r["event"] for r in rows if "event" in r]


OPTIONS = {
    "adamw": {},
    "muon+adaptive+bias": {"optimizer": "muon", "clipping": "adaptive", "clip_window": 4, "rate_control": "bias"},
    "accumulated": {"accumulation": 2, "weight_ema": 0.9, "ratio_warmup": 8},
    "compiled": {"compile": True},
    "recomputed": {"recompute": True},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_captured_run_is_the_run(config, options):
    """The same kernels on the same numbers, but for attention's backward, which adds up in no fixed order."""
    captured, losses, events = run(config, **OPTIONS[options])
    assert "captured" in events
    assert captured.captured.recorded
    eager, want, _ = run(config, **OPTIONS[options], cuda_graph="off", out=config.out + "2")
    assert losses == pytest.approx(want, rel=2e-3)
    assert eager.captured is None


def test_dropout_differs_from_step_to_step(config):
    """A replay draws anew: with a learning rate of almost 0 and one pack, only dropout moves the loss."""
    trainer = Trainer(dataclasses.replace(config, dropout=0.3, learning_rate=1e-12))
    batch = next(trainer.task.stream)
    trainer.task.stream = iter(lambda: batch, None)
    losses = [trainer.captured.run([batch], 0)[0].item() for _ in range(8)]
    assert trainer.captured.recorded
    assert len(set(losses)) == 8


def test_a_replay_waits_for_nothing(config, without_sync):
    trainer = Trainer(config)
    for _ in range(6):
        trainer.train_step()
    assert trainer.captured.recorded
    pending = without_sync(lambda: [trainer.start_step() for _ in range(4)])
    assert all(trainer.finish_step(p)["loss"] > 0 for p in pending)


def test_what_fails_while_recording_is_said_and_the_run_goes_on(config, monkeypatch):
    """A host read in the loss, only while recording: CUDA refuses, and everything is as it was before."""
    trainer = Trainer(dataclasses.replace(config, dropout=0.1))
    trainer.captured.required = False
    right = trainer.task.loss

    def reading(model, batch, step):
        loss, means = right(model, batch, step)
        if torch.cuda.is_current_stream_capturing():
            loss.item()
        return loss, means

    trainer.task.loss = reading
    trainer.train()
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    (event,) = [r for r in rows if "event" in r]
    assert event["event"] == "not_captured"
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 13))


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32(config, tf32):
    run(config, steps=1, tf32=tf32)
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")


def test_compiled_blocks_are_the_blocks(config):
    _, compiled, _ = run(config, compile=True, cuda_graph="off", dtype="fp32", tf32=False)
    _, eager, _ = run(config, compile=False, cuda_graph="off", dtype="fp32", tf32=False, out=config.out + "2")
    assert compiled == pytest.approx(eager, rel=1e-3)
