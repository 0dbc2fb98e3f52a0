"""Commands that take either model, and what `hnet demo` may replace."""

import shutil

import pytest
import torch
from click.testing import CliRunner

import hnet.cli.demo as demo_module
import hnet.cli.generate as generate_command
from hnet import HNetConfig, HNetForCausalLM
from hnet.chunk_lm import ChunkLM
from hnet.chunk_lm.config import ChunkLMConfig
from hnet.chunk_lm.train_config import ChunkLMTrainConfig
from hnet.cli import main
from hnet.cli.models import load
from hnet.cli.train import configuration
from hnet.config.keys import read_toml
from hnet.errors import PathTaken, UserError
from hnet.metrics_log import read_metrics
from hnet.train.config import TrainConfig

from .train.conftest import tiny


def run(*args, stdin=b""):
    return CliRunner().invoke(main, [str(a) for a in args], input=stdin)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    HNetForCausalLM(HNetConfig.preset("tiny")).save_pretrained(root / "hnet")
    ChunkLM(ChunkLMConfig(d_model=16, n_layers=1, seq_len=32, kernel_len=8, chunk=4, spectral_state=True)
            ).save_pretrained(root / "chunk_lm")  # fmt: skip
    return root


# --- generate, segment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generate", "generate-chunk-lm"])
@pytest.mark.parametrize("model", ["hnet", "chunk_lm"])
def test_generate_takes_either_model(models, name, model):
    args = [name, models / model, "--prompt", "def ", "--seed", 1, "--temperature", 0, "--dtype", "fp32"]
    r = run(*args, "--max-new-bytes", 8)
    assert r.exit_code == 0, r.output
    lm = (HNetForCausalLM if model == "hnet" else ChunkLM).from_pretrained(models / model).eval()
    new = lm.generate("def ", max_new_bytes=8, temperature=0, seed=1)
    new = new[0] if isinstance(new, list) else new
    assert r.stdout_bytes == b"def " + new.decode(errors="replace").encode() + b"\n"
    assert run(*args, "--max-tokens", 8).stdout_bytes == r.stdout_bytes


@pytest.mark.parametrize("command", ["generate", "generate-chunk-lm", "segment"])
def test_device_and_dtype_reach_the_model(models, command, monkeypatch):
    seen = {}

    def watched(*args, **kwargs):
        lm = load(*args, **kwargs)
        seen.update(p=next(lm.parameters()), training=lm.training)
        return lm

    monkeypatch.setattr(generate_command, "load", watched)
    monkeypatch.setattr("hnet.cli.models.load", watched)
    given = ["-"] if command == "segment" else []
    for model in ["hnet"] if command == "segment" else ["hnet", "chunk_lm"]:
        for dtype, wanted in (("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
            r = run(command, models / model, *given, "--device", "cpu", "--dtype", dtype, stdin=b"import this\n")
            assert r.exit_code == 0, r.output
            assert seen["p"].dtype == wanted
            assert seen["p"].device.type == "cpu"
            assert not seen["training"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["generate", "generate-chunk-lm", "segment"])
def test_a_gpu_that_is_not_there_is_one_line(models, command):
    r = run(command, models / "hnet", "--device", "cuda", stdin=b"x")
    assert (r.exit_code, r.stderr) == (1, "Error: device is 'cuda' but PyTorch sees no CUDA device\n")


def test_auto_is_bf16_on_a_gpu(models, monkeypatch):
    """Without one: the weights are asked for on a device that says it is one."""
    device = type("Device", (), {"type": "cuda"})()
    read = HNetForCausalLM.from_pretrained
    monkeypatch.setattr(HNetForCausalLM, "from_pretrained", staticmethod(lambda path, device: read(path)))
    assert load(str(models / "hnet"), device, "auto").embeddings.weight.dtype == torch.bfloat16
    assert load(str(models / "hnet"), device, "fp32").embeddings.weight.dtype == torch.float32


def test_stateful_and_segment_say_which_model_they_need(models):
    assert "--stateful is for a ChunkLM" in run("generate", models / "hnet", "--prompt", "x", "--stateful").stderr
    assert run("generate", models / "chunk_lm", "--prompt", "x", "--stateful", "--max-tokens", 4).exit_code == 0
    assert "this needs an H-Net" in run("segment", models / "chunk_lm", "-", stdin=b"x").stderr


def test_a_prompt_on_standard_input_may_be_any_bytes(models):
    r = run("generate", models / "hnet", "--max-tokens", 1, "--temperature", 0, stdin=b"\xff\x00a")
    assert r.exit_code == 0, r.output
    assert r.stdout_bytes.startswith(b"\xff\x00a")


# --- train, resume ----------------------------------------------------------------------------------------------------

DATA = tiny("unused").data
CHUNK = [
    "--data", *DATA, "--pattern", "*.py", "--seq-len", "32", "--kernel-len", "8", "--chunk", "4", "--width", "16",
    "--n-layers", "1", "--batch-size", "2", "--accum-steps", "1", "--steps-per-epoch", "3", "--epochs", "2",
    "--log-every", "2", "--spectral-state", "--eval-bytes", "64", "--sample-bytes", "0", "--no-plots",
]  # fmt: skip


def steps(out):
    return [r["step"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r]


@pytest.mark.parametrize("command", ["train-chunk-lm", "train"])
def test_a_chunk_lm_resumes_from_its_run_alone(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    r = run("train-chunk-lm", *CHUNK, "--ckpt", "lm.pt")
    assert r.exit_code == 0, r.output
    where = ["--ckpt", "lm.pt"] if command == "train-chunk-lm" else ["--out", "lm"]
    r = run(command, "--resume", *where)  # nothing is left to do, and that is no error
    assert r.exit_code == 0, r.output
    longer = ["--steps", "8"] if command == "train" else ["--epochs", "4"]
    r = run(command, "--resume", *where, *longer)
    assert r.exit_code == 0, r.output
    end = 8 if command == "train" else 12
    assert steps(tmp_path / "lm") == list(range(1, end + 1))
    lm = ChunkLM.from_pretrained(tmp_path / "lm.pt")
    assert (lm.config.spectral_state, lm.config.d_model, lm.config.kernel_len) == (True, 16, 8)
    saved = torch.load(tmp_path / "lm.pt", weights_only=True)
    assert saved["step"] == end


def test_the_script_with_the_documented_flags_and_no_data(tmp_path, monkeypatch):
    """`python -m scripts.train_chunk_lm ... --resume` goes through the command group: same flags, one-line errors."""
    import runpy
    import sys

    monkeypatch.chdir(tmp_path)
    flags = [
        "--seq-len", "32", "--kernel-len", "8", "--chunk", "4", "--batch-size", "2", "--accum-steps", "1",
        "--steps-per-epoch", "3", "--epochs", "2", "--lr", "0.0002", "--log-every", "2", "--ckpt", "lm.pt",
    ]  # fmt: skip

    def script(*args):
        monkeypatch.setattr(sys, "argv", ["train_chunk_lm", *args])
        with pytest.raises(SystemExit) as e:
            runpy.run_module("scripts.train_chunk_lm", run_name="__main__")
        return e.value.code

    assert script(*CHUNK, *flags) == 0
    flags[flags.index("--epochs") + 1] = "3"
    assert script(*flags, "--resume") == 0
    assert steps(tmp_path / "lm") == list(range(1, 10))
    assert ChunkLM.from_pretrained(tmp_path / "lm.pt").config.spectral_state
    assert script("--ckpt", "elsewhere.pt", "--resume") == 1


def test_config_toml_keeps_what_was_given():
    c = ChunkLMTrainConfig(data=["x"], epochs=7, steps_per_epoch=3).validate()
    assert (c.steps, c.eval_every, c.checkpoint_every) == (21, 3, 3)
    assert c.validate().steps == 21
    text = c.to_toml()
    assert "steps = 0\n" in text
    assert "eval_every = 0\n" in text
    assert "restart_at = [0.0]\n" in text


def test_epochs_beat_steps_that_a_file_says(tmp_path):
    """Files of before, where derived steps are written out."""
    toml = tmp_path / "c.toml"
    toml.write_text('data = ["x"]\nepochs = 3\nsteps_per_epoch = 10\nsteps = 30\n')
    values = configuration(ChunkLMTrainConfig, str(toml), None, {"epochs": 6})
    assert values.validate().steps == 60
    values = configuration(ChunkLMTrainConfig, str(toml), None, {})
    assert values.validate().steps == 30


def test_an_hnet_resumes_under_either_name(tmp_path):
    c = tiny(tmp_path / "run")
    (tmp_path / "c.toml").write_text(c.to_toml())
    assert run("train-chunk-lm", tmp_path / "c.toml", "--steps", 2).exit_code == 0
    assert steps(tmp_path / "run") == [1, 2]
    r = run("train-chunk-lm", "--resume", "--out", tmp_path / "run", "--steps", 3)
    assert r.exit_code == 0, r.output
    r = run("train", "--resume", tmp_path / "run" / "checkpoints" / "step_00000003", "--steps", 4)  # no --out
    assert r.exit_code == 0, r.output
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    r = run("train-chunk-lm", "--resume", "--out", tmp_path / "run", "--width", 32)
    assert "is of an H-Net, which has no width; hnet train shows the keys it has" in r.stderr


def test_fine_tuning(models, tmp_path):
    c = tiny(tmp_path / "run")
    c.steps, c.preset = 2, ""
    (tmp_path / "c.toml").write_text(c.to_toml())
    r = run("train", tmp_path / "c.toml", "--init-from", models / "hnet", "--freeze", "encoder,stage0.router")
    assert r.exit_code == 0, r.output
    assert "parameters stay as they are" in r.output
    assert "starts from the weights" in r.output
    r = run("train", "--resume", "--out", tmp_path / "run", "--steps", 3)
    assert r.exit_code == 0, r.output
    assert read_toml(tmp_path / "run" / "config.toml", TrainConfig)["freeze"] == ["encoder", "stage0.router"]


@pytest.mark.parametrize("command", ["train", "train-chunk-lm"])
@pytest.mark.parametrize("key", ["init_from", "freeze"])
def test_a_chunk_lm_says_that_it_cannot_be_fine_tuned(tmp_path, command, key):
    (tmp_path / "c.toml").write_text(f'data = ["x"]\nwidth = 16\n{key} = "y"\n')
    r = run(command, tmp_path / "c.toml")
    assert r.exit_code == 1
    assert f"is of a ChunkLM, which has no {key}" in r.stderr


@pytest.mark.parametrize("auto", [True, False])
def test_resume_auto_takes_the_keys_of_the_run(tmp_path, auto):
    c = tiny(tmp_path / "run")
    c.steps = 2
    (tmp_path / "c.toml").write_text(c.to_toml())
    assert run("train", tmp_path / "c.toml", "--resume", "auto").exit_code == 0  # nothing there: a start
    args = ["--out", tmp_path / "run"] if auto else [tmp_path / "c.toml"]
    assert run("train", *args, "--resume", "auto", "--steps", 3).exit_code == 0
    assert steps(tmp_path / "run") == [1, 2, 3]


# --- stages of a ChunkLM's learning rate ---------------------------------------------------------------------------


def test_stage_keys_make_the_schedule():
    from hnet.train.schedule import make_schedule

    c = ChunkLMTrainConfig(
        data=["x"], epochs=9, steps_per_epoch=10, stage1_epochs=1, stage2_epochs=4, stage1_lr_mult=0.5,
        stage2_lr_mult=2.0, stage3_lr_mult=0.25, stage1_min_mult=0.2, stage2_min_mult=1.0, stage3_min_mult=0.0,
    ).validate()  # fmt: skip
    s = make_schedule(c)
    peaks = {0: 0.5, 10: 2.0, 50: 0.25}
    for step, peak in peaks.items():
        assert s.factor(step) == pytest.approx(peak)
        assert c.peak(step) == pytest.approx(peak * c.learning_rate)
        assert c.peak(step + 9) == pytest.approx(peak * c.learning_rate)
    # half-way the cosine is at the mean of both ends: stage 2 has steps 10 .. 49
    assert s.factor(30) == pytest.approx(1.5)
    assert s.factor(5) == pytest.approx(0.35)
    assert s.factor(90) == pytest.approx(0.0, abs=1e-9)
    s.restart(30)
    assert s.factor(30) == pytest.approx(2.0)


def test_a_raise_in_a_stage_with_its_own_peak_is_at_that_peak(tmp_path):
    """No false lr_not_at_peak where stage*_lr_mult is not 1, and the rate is what the key says."""
    r = run("train-chunk-lm", *CHUNK, "--out", tmp_path / "run", "--epochs", 6, "--curriculum", "epochs", "--cutoffs",
            "4,8,12,0", "--raise-epochs", "1,3,5", "--stage1-lr-mult", 0.5, "--stage2-lr-mult", 2.0, "--lr", 0.001,
            "--stage3-lr-mult", 0.25, "--log-every", 1)  # fmt: skip
    assert r.exit_code == 0, r.output
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [x["event"] for x in rows if "event" in x] == ["cutoff_raised"] * 3
    lr = {x["step"]: x["lr"] for x in rows if "lr" in x}
    assert [lr[s] for s in (1, 4, 7, 10, 16)] == pytest.approx([0.5e-3, 0.5e-3, 2e-3, 2e-3, 0.25e-3])


def test_default_stages_are_epochs_0_2_and_5():
    c = ChunkLMTrainConfig(data=["x"], epochs=10, steps_per_epoch=100).validate()
    assert [round(a * c.steps) for a in c.restart_at] == [0, 200, 500]
    assert (c.restart_min, c.restart_peak) == ([0.1, 0.1, 0.05], [1.0, 1.0, 1.0])
    short = ChunkLMTrainConfig(data=["x"], epochs=4, steps_per_epoch=100).validate()
    assert [round(a * short.steps) for a in short.restart_at] == [0, 200]
    with pytest.raises(UserError, match=r"stage2_min_mult must be at most stage2_lr_mult \(0.1\).*got 0.5"):
        ChunkLMTrainConfig(data=["x"], stage2_lr_mult=0.1, stage2_min_mult=0.5).validate()
    with pytest.raises(UserError, match="stage1_epochs must be at least 1"):
        ChunkLMTrainConfig(data=["x"], stage1_epochs=0).validate()


def test_a_printed_loss_is_the_mean_since_the_last_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    r = run("train-chunk-lm", *CHUNK, "--ckpt", "lm.pt", "--steps-per-epoch", 5)
    assert r.exit_code == 0, r.output
    loss = {x["step"]: x["loss"] for x in read_metrics(tmp_path / "lm" / "metrics.jsonl") if "loss" in x}
    printed = [line.split("loss=")[1].split()[0] for line in r.output.splitlines() if line.startswith("  step ")]
    pairs = [(1, 2), (3, 4), (6, 7), (8, 9)]  # the step that ends an epoch has the epoch's line
    assert printed == [f"{(loss[a] + loss[b]) / 2:.2f}" for a, b in pairs]


# --- demo ----------------------------------------------------------------------------------------------------------


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_demo_refuses_what_no_demo_wrote_and_deletes_nothing(tmp_path):
    c = tiny(tmp_path / "run")
    (tmp_path / "c.toml").write_text(c.to_toml())
    assert run("train", tmp_path / "c.toml", "--steps", 1).exit_code == 0
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for name in ("run", "notes", "file"):
        r = run("demo", "--steps", 1, "--out", tmp_path / name)
        assert r.exit_code == 1
        assert r.stderr == f"Error: {tmp_path / name} is not a demo's: name another --out, or remove it yourself\n"
    assert contents(tmp_path) == before


def test_demo_replaces_a_demo_only_as_it_left_it(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "config", lambda out, steps: tiny(out))
    out = tmp_path / "demo"
    r = run("demo", "--out", out)
    assert r.exit_code == 0, r.output
    (out / "samples" / "of_before.txt").write_text("")
    assert run("demo", "--out", out).exit_code == 0
    assert not (out / "samples" / "of_before.txt").exists()
    assert steps(out) == list(range(1, 9))
    (out / "notes.txt").write_text("mine")
    r = run("demo", "--out", out)
    assert "holds notes.txt, which no demo wrote" in r.stderr
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert run("train", "--resume", "--out", out, "--steps", 10).exit_code == 0  # now it is somebody's run
    before = contents(out)
    r = run("demo", "--out", out)
    assert "was trained on with other keys than the demo's" in r.stderr
    assert contents(out) == before
    with pytest.raises(PathTaken):
        demo_module.clear(out)
    shutil.rmtree(out)
    demo_module.clear(out)


def test_train_config_is_an_hnets_unless_a_file_says_otherwise(tmp_path):
    values = configuration(TrainConfig, None, None, {"data": ["x"]})
    assert type(values) is TrainConfig
    (tmp_path / "c.toml").write_text("kernel_len = 8\n")
    values = configuration(TrainConfig, str(tmp_path / "c.toml"), None, {"data": ["x"]})
    assert type(values) is ChunkLMTrainConfig
    (tmp_path / "c.toml").write_text("kernel_len = 8\npreset = 'tiny'\n")  # of neither
    with pytest.raises(UserError, match="unknown key 'kernel_len'"):
        configuration(TrainConfig, str(tmp_path / "c.toml"), None, {})
