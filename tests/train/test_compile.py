import dataclasses
import math

import click
import pytest
import torch

from hnet.cli.options import config_options, given
from hnet.config.keys import read_toml
from hnet.device import World
from hnet.train.compile import compile_wanted
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer
from hnet.train.metrics import Reading

from .processes import found, job, run


@pytest.fixture
def dynamo():
    """Compiled code of other tests, and what this one changes, out of the way."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False):
        yield torch._dynamo
    torch._dynamo.reset()


def test_auto_compiles_on_a_gpu_alone(monkeypatch):
    def wanted(setting, device, processes=1, parallel="ddp"):
        config = TrainConfig(compile=setting, parallel=parallel)
        return compile_wanted(config, torch.device(device), World(0, processes, 0))

    monkeypatch.setattr("hnet.train.compile.triton_error", lambda: None)
    assert [wanted("auto", d) for d in ("cuda", "cpu")] == [True, False]
    assert [wanted(v, d) for v in (True, False) for d in ("cuda", "cpu")] == [True, True, False, False]
    assert [wanted("auto", "cuda", n, p) for n, p in ((2, "ddp"), (1, "fsdp"), (2, "fsdp"))] == [True, True, False]
    assert wanted(True, "cuda", 2, "fsdp")
    monkeypatch.setattr("hnet.train.compile.triton_error", lambda: "triton is not installed")
    assert not wanted("auto", "cuda")


def test_the_key_is_a_flag_and_a_word(tmp_path):
    seen = {}

    @click.command()
    @config_options(TrainConfig)
    def command(**options):
        seen.update(given(options))

    for args, value in ((["--compile"], True), (["--no-compile"], False), ([], None)):
        seen.clear()
        command.main(args, standalone_mode=False)
        assert seen.get("compile") is value
    for text, value in (("true", True), ("false", False), ('"auto"', "auto")):
        (tmp_path / "c.toml").write_text(f"compile = {text}\ncuda_graph = 'off'")
        assert read_toml(tmp_path / "c.toml", TrainConfig) == {"compile": value, "cuda_graph": "off"}
    with pytest.raises(ValueError, match="compile must be true, false or auto, got 'maybe'"):
        TrainConfig(data=["x"], compile="maybe").validate()
    with pytest.raises(ValueError, match="cuda_graph must be one of auto, on, off, got 'maybe'"):
        TrainConfig(data=["x"], cuda_graph="maybe").validate()


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"recompute": True, "arch": "C1m1 T1", "d_model": [64, 96]}], ids=["", "more"])
def test_compiled_blocks_train_alike_and_never_recompile(config, dynamo, change):
    config = dataclasses.replace(config, steps=12, dtype="fp32", warmup_steps=0, learning_rate=1e-4, **change)
    eager = Trainer(config)
    compiled = Trainer(dataclasses.replace(config, compile=True))
    dynamo.utils.counters.clear()
    lengths = set()
    for step in range(12):
        if step == 4:
            assert dynamo.utils.counters["stats"]["unique_graphs"] > 4  # it does compile
            torch._dynamo.config.error_on_recompile = True
        a, b = eager.train_step(), compiled.train_step()
        lengths.add(b["stage0/bytes_per_chunk"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    assert len(lengths) > 6  # inner stages of many lengths


@pytest.mark.slow
def test_samples_of_a_compiled_model(config, dynamo):
    trainer = Trainer(dataclasses.replace(config, compile=True, sample_bytes=8))
    assert "continuation of" in trainer.task.sample()[0]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_and_recomputed_in_two_processes(config, tmp_path, parallel):
    config = dataclasses.replace(
        config, dtype="fp32", parallel=parallel, recompute=True, arch="C1 c1", d_model=[64, 96]
    )
    jobs = [
        job(str(compile), dataclasses.replace(config, compile=compile, out=str(tmp_path / str(compile))), "step")
        for compile in (True, False)
    ]
    assert run(tmp_path, jobs) == [0, 0]
    (a,), (b,) = (found(tmp_path, name)["rows"] for name in ("True", "False"))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "change",
    [{}, {"rate_control": "bias", "weight_ema": 0.9, "optimizer": "muon"}, {"clipping": "adaptive", "clip_window": 3}],
    ids=["", "bias+ema+muon", "adaptive"],
)
def test_a_step_on_a_gpu_waits_for_nothing(config, change):
    config = dataclasses.replace(
        config, device="cuda", dtype="bf16", max_chunks=[0.6], arch="m1 T1", d_model=[64, 128], compile=False,
        cuda_graph="off", **change,
    )  # fmt: skip
    trainer = Trainer(config)
    for _ in range(4):
        trainer.train_step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = [trainer.start_step() for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(isinstance(p.reading, Reading) for p in pending)
    assert all(math.isfinite(trainer.finish_step(p)["loss"]) for p in pending)
