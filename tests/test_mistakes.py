"""Mistakes of users end in one line, bugs of ours in a traceback; for every command."""

import errno
import json
import os
import traceback
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import SafetensorError

from hnet import HNetConfig, HNetForCausalLM
from hnet.chunk_lm import ChunkLM
from hnet.chunk_lm.config import ChunkLMConfig
from hnet.cli import main
from hnet.errors import MissingPath, PathError, PathTaken, RunFailed, UserError, user_path

TEXT = b"What a model reads, a line or two of it.\n" * 40


def run(*args, stdin=""):
    return CliRunner().invoke(main, [str(a) for a in args], input=stdin)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of models, texts and broken files."""
    root = tmp_path_factory.mktemp("mistakes")
    torch.manual_seed(0)
    HNetForCausalLM(HNetConfig.preset("tiny")).save_pretrained(root / "hnet")
    ChunkLM(ChunkLMConfig(d_model=16, n_layers=1, seq_len=32, kernel_len=8, chunk=4)).save_pretrained(root / "chunk_lm")
    (root / "text.txt").write_bytes(TEXT)
    (root / "empty.txt").write_bytes(b"")
    (root / "broken.gz").write_bytes(b"not gzip")
    (root / "broken.jsonl").write_text("{")
    (root / "broken.parquet").write_bytes(b"PAR1" * 9)
    (root / "broken.toml").write_text("steps = [")
    (root / "unknown.toml").write_text("stepz = 3")
    (root / "wrong.toml").write_text('steps = "many"')
    (root / "latin.toml").write_bytes(b'out = "\xe4"')
    (root / "broken.json").write_text("{")
    (root / "weights").mkdir()
    (root / "weights" / "broken.safetensors").write_bytes(b"nothing")
    (root / "weights" / "broken.pt").write_bytes(b"nothing")
    (root / "weights" / "broken.json").write_text(json.dumps(HNetConfig.preset("tiny").to_dict()))
    (root / "binary.log").write_bytes(bytes(range(256)) * 9)
    (root / "words.log").write_text("nothing to see\n")
    (root / "held").mkdir()
    (root / "held" / "file").write_text("x")
    (root / "headless").mkdir()
    (root / "headless" / "config.json").write_text("[1, 2]")
    (root / "headless" / "model.safetensors").write_bytes(b"nothing")
    (root / "unreadable.txt").write_bytes(TEXT)
    (root / "unreadable.toml").write_text("steps = 3")
    return root


TRAIN = ["train", "--preset", "tiny", "--out", "RUN", "--steps", "2", "--seq-len", "64", "--batch-bytes", "128"]
CHUNK = ["train-chunk-lm", "--out", "RUN", "--width", "16", "--n-layers", "1", "--seq-len", "32", "--kernel-len", "8"]
CHUNK += ["--chunk", "4", "--epochs", "1", "--steps-per-epoch", "2"]

MISTAKES = [
    # command, what its one line says
    ([*TRAIN], "data must be at least one file or folder"),
    ([*TRAIN, "--data", "/nowhere"], "data path /nowhere does not exist"),
    ([*TRAIN, "--data", "@empty.txt"], "no bytes in"),
    ([*TRAIN, "--data", "@broken.gz"], "is not a whole gzip file"),
    ([*TRAIN, "--data", "@broken.jsonl"], "is not JSON"),
    ([*TRAIN, "--data", "@broken.parquet"], "is not a Parquet file that can be read"),
    ([*TRAIN, "--data", "@held", "--pattern", "*.py"], "matches '*.py'"),
    ([*TRAIN, "--data", "@held", "--pattern", ""], "pattern must be a glob"),
    ([*TRAIN, "--data", "@held", "--pattern", "/x"], "pattern must be a glob"),
    ([*TRAIN, "--data", "@text.txt", "--preset", "huge"], "unknown preset 'huge'"),
    ([*TRAIN, "--data", "@text.txt", "--model-config", "@broken.json"], "is not JSON"),
    ([*TRAIN, "--data", "@text.txt", "--model-config", "/nowhere.json"], "/nowhere.json does not exist"),
    ([*TRAIN, "--data", "@text.txt", "--model-config", "@held"], "Is a directory"),
    ([*TRAIN, "--data", "@text.txt", "--out", "@text.txt/run"], "Not a directory"),
    ([*TRAIN, "--data", "@text.txt", "--arch", "z9"], "arch"),
    ([*TRAIN, "--data", "@text.txt", "--learning-rate", "0"], "learning_rate must be positive"),
    ([*TRAIN, "--data", "@text.txt", "--seq-len", "1"], "seq_len must be at least 2"),
    ([*TRAIN, "--data", "@text.txt", "--compression", "1.0"], "compression must be above 1"),
    ([*TRAIN, "--data", "@text.txt", "--batch-bytes", "9999999"], "batch"),
    ([*TRAIN, "--data", "hf:x?y=1"], "unknown key 'y'"),
    (["train", "/nowhere.toml"], "config file /nowhere.toml does not exist"),
    (["train", "@broken.toml"], "is not TOML"),
    (["train", "@unknown.toml"], "unknown key 'stepz'"),
    (["train", "@wrong.toml"], "steps must be int, got 'many'"),
    (["train", "@latin.toml"], "is not text"),
    (["train", "--resume", "--out", "/nowhere"], "config file /nowhere/config.toml does not exist"),
    ([*TRAIN, "--data", "@text.txt", "--resume", "latest"], "run/config.toml does not exist"),
    ([*TRAIN, "--data", "@text.txt", "--resume", "/nowhere"], "config.toml does not exist"),
    ([*CHUNK], "data must be at least one file or folder"),
    ([*CHUNK, "--data", "/nowhere"], "data path /nowhere does not exist"),
    ([*CHUNK, "--data", "@text.txt", "--cutoffs", "9,3"], "cutoffs must rise"),
    ([*CHUNK, "--data", "@text.txt", "--kernel-len", "99"], "kernel_len must be at most seq_len"),
    ([*CHUNK, "--data", "@text.txt", "--ckpt", "RUN"], "ckpt must be a file beside the run directory"),
    ([*CHUNK, "--data", "@text.txt", "--ckpt", "@text.txt/lm.pt"], "cannot write"),
    ([*CHUNK, "--data", "@text.txt", "--ckpt", "@held"], "ckpt must be a file, got the folder"),
    (["generate", "/nowhere", "--prompt", "x"], "/nowhere does not exist"),
    (["generate", "@held", "--prompt", "x"], "must hold model.safetensors"),
    (["generate", "@weights/broken.pt", "--prompt", "x"], "is not a whole PyTorch weights file"),
    (["generate", "@weights/broken.safetensors", "--prompt", "x"], "is not a whole safetensors file"),
    (["generate", "@headless", "--prompt", "x"], "must be a JSON object, got list"),
    (["generate", "@hnet", "--prompt", "x", "--temperature", "-1"], "temperature must be >= 0"),
    (["generate", "@hnet", "--prompt", "x", "--top-p", "0"], "top_p must be in (0, 1]"),
    (["generate", "@hnet", "--prompt", "x", "--max-new-bytes", "-1"], "max_new_bytes must be >= 0"),
    (["generate", "@hnet", "--prompt", "x", "--repetition-penalty", "0.5"], "repetition_penalty must be >= 1"),
    (["generate", "x" * 300, "--prompt", "x"], "File name too long"),
    (["generate-chunk-lm", "/nowhere", "--prompt", "x"], "/nowhere does not exist"),
    (["generate-chunk-lm", "@chunk_lm", "--prompt", ""], "prompt must hold at least one byte"),
    (["generate-chunk-lm", "@weights/broken.pt", "--prompt", "x"], "is not a whole"),
    (["segment", "/nowhere", "@text.txt"], "/nowhere does not exist"),
    (["segment", "@hnet", "@text.txt", "--stage", "7"], "stage must be 0 to"),
    (["eval", "/nowhere", "@text.txt"], "/nowhere does not exist"),
    (["eval", "@hnet", "/nowhere"], "data path /nowhere does not exist"),
    (["eval", "@hnet", "@empty.txt"], "no bytes in"),
    (["eval", "@hnet", "@text.txt", "--seq-len", "1"], "seq_len must be at least 2"),
    (["eval", "@hnet", "@text.txt", "--ema"], "holds no ema.safetensors"),
    (["eval", "@hnet", "hf:json"], "needs --bytes"),
    (["eval", "@chunk_lm", "@text.txt", "--seq-len", "999"], "seq_len must be 1 to 32"),
    (["export", "/nowhere", "@new"], "/nowhere does not exist"),
    (["export", "@hnet", "@held"], "OUT must be a new or empty folder"),
    (["export", "@hnet", "@text.txt/new"], "Not a directory"),
    (["serve", "/nowhere", "--port", "0"], "/nowhere does not exist"),
    (["serve", "@hnet", "--host", "0.0.0.0"], "give --token, or --no-token to let anybody in"),
    (["sweep", "/nowhere.toml"], "config file /nowhere.toml does not exist"),
    (["sweep", "@broken.toml"], "is not TOML"),
    (["plot", "/nowhere"], "is not a run directory"),
    (["plot", "@held"], "is not a run directory"),
    (["diagnose", "/nowhere"], "/nowhere does not exist"),
    (["diagnose", "@binary.log"], "is not text"),
    (["diagnose", "@words.log"], "no training log recognised"),
    (["diagnose", "@broken.toml"], "is not TOML"),
    (["diagnose", "@held"], "holds no metrics.jsonl, config.toml or log file"),
]


@pytest.mark.parametrize(("args", "line"), MISTAKES, ids=[f"{i}-{a[0]}" for i, (a, _) in enumerate(MISTAKES)])
def test_a_mistake_is_one_line(place, tmp_path, args, line):
    if args[0] == "serve":
        pytest.importorskip("fastapi")  # of this version not for Python 3.10
    words = [str(tmp_path / "run") if a == "RUN" else str(place / a[1:]) if a[0:1] == "@" else a for a in args]
    r = run(*words)
    assert isinstance(r.exception, SystemExit), "".join(traceback.format_exception(r.exception))
    assert r.exit_code == (2 if args[0] == "diagnose" else 1)
    said = r.stderr.strip()
    assert said.startswith("Error: ")
    assert line in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_one_line(place, tmp_path):
    for name, args in (
        ("unreadable.txt", [*TRAIN, "--out", tmp_path / "run", "--data", place / "unreadable.txt"]),
        ("unreadable.txt", ["eval", place / "hnet", place / "unreadable.txt"]),
        ("unreadable.txt", ["diagnose", place / "unreadable.txt"]),
        ("unreadable.toml", ["train", place / "unreadable.toml"]),
    ):
        (place / name).chmod(0)
        r = run(*args)
        (place / name).chmod(0o644)
        assert "Permission denied" in r.stderr
        assert r.stderr.count("\n") == 1


BUGS = {
    "train": ([*TRAIN, "--data", "@text.txt"], "hnet.train.loop.Trainer.train"),
    "train-chunk-lm": ([*CHUNK, "--data", "@text.txt"], "hnet.train.loop.Trainer.train"),
    "generate": (["generate", "@hnet", "--prompt", "x"], "hnet.model.causal_lm.HNetForCausalLM.prefill"),
    "generate-chunk-lm": (["generate-chunk-lm", "@chunk_lm", "--prompt", "x"], "hnet.chunk_lm.ChunkLM.forward"),
    "segment": (["segment", "@hnet", "@text.txt"], "hnet.model.causal_lm.HNetForCausalLM.forward"),
    "eval": (["eval", "@hnet", "@text.txt"], "hnet.model.causal_lm.HNetForCausalLM.forward"),
    "export": (["export", "@hnet", "RUN"], "hnet.model.causal_lm.HNetForCausalLM.save_pretrained"),
    "diagnose": (["diagnose", "@log.csv"], "hnet.diagnose.report.diagnose"),
    "serve": (["serve", "@hnet", "--port", "0"], "hnet.serve.server.serve"),
    "sweep": (["sweep", "@unknown.toml"], "hnet.sweep.config.read_sweep"),
    "plot": (["plot", "@plotted"], "hnet.plots.run.plot_rows"),
    "info": (["info"], "hnet_kernels.info.report"),
    "demo": (["demo", "--out", "RUN", "--steps", "1"], "hnet.cli.demo.demo"),
}


@pytest.mark.parametrize("bug", [ValueError, TypeError, KeyError, FileNotFoundError, RuntimeError])
@pytest.mark.parametrize("command", BUGS)
def test_a_bug_keeps_its_traceback(place, tmp_path, monkeypatch, command, bug):
    """Every command, each with a function inside it that is broken."""
    if command == "serve":
        pytest.importorskip("fastapi")
    (place / "log.csv").write_text("step,loss\n1,2\n2,1\n")
    (place / "plotted").mkdir(exist_ok=True)
    (place / "plotted" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")

    def broken(*args, **kwargs):
        raise bug("ours")

    args, inside = BUGS[command]
    monkeypatch.setattr(inside, broken)
    r = run(*[str(tmp_path / "run") if a == "RUN" else str(place / a[1:]) if a[0] == "@" else a for a in args])
    assert type(r.exception) is bug, r.output
    assert "broken" in "".join(traceback.format_exception(r.exception))


def test_export_onto_a_full_disk_is_one_line(place, tmp_path, monkeypatch):
    """As safetensors says it."""

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    r = run("export", place / "hnet", tmp_path / "new")
    assert (r.exit_code, r.stderr) == (1, f"Error: cannot write {tmp_path / 'new'}: no space left\n")


def test_every_command_is_in_both_tables():
    assert set(BUGS) == set(main.commands)
    assert {a[0] for a, _ in MISTAKES} | {"info", "demo"} == set(main.commands)


def test_with_traceback_a_mistake_shows_where_it_came_from():
    r = run("--traceback", "train")
    assert isinstance(r.exception, UserError)


def test_errors_are_the_built_in_ones_too():
    for kind, base in ((MissingPath, FileNotFoundError), (PathTaken, FileExistsError), (PathError, OSError),
                       (RunFailed, RuntimeError)):  # fmt: skip
        assert issubclass(kind, UserError)
        assert issubclass(kind, base)
        assert issubclass(kind, ValueError)
        assert str(kind("a message")) == "a message"


def test_what_the_system_says_of_a_path():
    with pytest.raises(PathError, match="^cannot read /proc: Is a directory$") as e, user_path("/proc"):
        Path("/proc").read_bytes()
    assert e.value.errno == errno.EISDIR
    with pytest.raises(KeyError), user_path("/proc"):
        raise KeyError("ours")
