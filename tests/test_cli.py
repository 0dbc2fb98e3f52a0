"""The commands as a user types them."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from hnet.cli import main

from .train.conftest import STDLIB


def hnet(*args, stdin=""):
    return subprocess.run([sys.executable, "-m", "hnet", *map(str, args)], capture_output=True, text=True, input=stdin)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    toml = out.parent / "c.toml"
    rest = 'pattern = "*.py"\npreset = "tiny"\nsteps = 3\nbatch_bytes = 512\neval_bytes = 1024\n'
    toml.write_text(f'data = ["{STDLIB / "email"}"]\n' + rest)
    r = hnet("train", toml, "--seq-len", 128, "--out", out, "--steps", 5)
    assert r.returncode == 0, r.stderr
    return out, r


def test_train_flag_beats_file_beats_default(run):
    out, r = run
    text = (out / "config.toml").read_text()
    assert "steps = 5" in text
    assert "batch_bytes = 512" in text
    assert "learning_rate = 0.001" in text
    assert "held-out bits per byte before training" in r.stdout
    assert "step 5/5" in r.stdout


def test_a_backend_that_cannot_run_here_is_one_line(run):
    from hnet_kernels import backend

    with backend("cuda"):  # what HNET_KERNELS_BACKEND=cuda sets
        r = CliRunner().invoke(main, ["eval", str(run[0]), str(STDLIB / "email" / "header.py")])
    assert r.exit_code == 1
    assert isinstance(r.exception, SystemExit), r.exception  # no traceback
    assert "Error: backend 'cuda' cannot run" in r.output


def test_version():
    from importlib.metadata import version

    r = hnet("--version")
    assert (r.returncode, r.stdout.strip()) == (0, f"hnet, version {version('hnet-kernels')}")


def test_resume(run):
    out, _ = run
    r = hnet("train", "--resume", "--out", out, "--steps", 7)
    assert r.returncode == 0, r.stderr
    assert "step 7/7" in r.stdout
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 8


def test_generate_from_argument_and_stdin(run):
    out, _ = run
    r = hnet("generate", out, "--prompt", "import ", "--max-new-bytes", 20, "--seed", 1)
    assert r.returncode == 0, r.stderr
    assert r.stdout.startswith("import ")
    assert r.stdout == hnet("generate", out, "--max-new-bytes", 20, "--seed", 1, stdin="import ").stdout


def test_segment(run):
    out, _ = run
    r = hnet("segment", out, STDLIB / "email" / "errors.py", "--bytes", 100)
    assert r.returncode == 0, r.stderr
    assert "|" in r.stdout
    plain = r.stdout.replace("|", "").replace("⏎\n", "").replace("\n", "")
    assert plain == (STDLIB / "email" / "errors.py").read_text()[:100].replace("\n", "")
    assert "stage must be 0 to 0" in hnet("segment", out, "--stage", 3, stdin="x").stderr


def test_info():
    r = hnet("info")
    assert r.returncode == 0
    assert "native extension: built" in r.stdout
    assert "hnet_2stage_XL_code" in r.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train"], "data must be at least one file or folder"),
        (["train", "--data", "/nowhere"], "data path /nowhere does not exist"),
        (["train", "none.toml"], "config file none.toml does not exist"),
        (["train", "--data", __file__, "--preset", "huge"], "unknown preset 'huge'"),
        (["train", "--data", __file__, "--documents", "word"], "is not one of 'file', 'paragraph', 'line'"),
        (["train", "--data", __file__, "--val-data", __file__, "--batch-bytes", "9999999"], "fewer than one batch"),
        (["train", "--data", __file__, "--compression", "1.0"], "compression must be above 1"),
        (["train", "--data", "x", "--compression", "a,b"], "is not a list of float"),
        (["train", "--resume", "--out", "/nowhere"], "config file /nowhere/config.toml does not exist"),
        (["generate", "/nowhere", "--prompt", "x"], "/nowhere does not exist"),
        (["segment", "/nowhere", __file__], "/nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line_with_a_nonzero_exit(args, message, tmp_path):
    out = ["--out", str(tmp_path / "r")] if args[0] == "train" and "--out" not in args else []
    r = CliRunner().invoke(main, [*args, *out])  # a process for each would take two seconds
    assert isinstance(r.exception, SystemExit), r.exception  # no traceback
    assert r.exit_code != 0
    assert message in r.stderr
    assert not (tmp_path / "r").exists()


def test_importing_needs_no_accelerator_package():
    heavy = ("triton", "mamba_ssm", "causal_conv1d", "flash_attn")
    code = f"import sys, hnet; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.slow
def test_demo(tmp_path):
    """What `make demo` runs, two steps of it: data found, trained, evaluated, continued, segmented."""
    out = hnet("demo", "--steps", 2, "--out", tmp_path / "demo")
    assert out.returncode == 0, out.stderr
    for text in (
        "MB of Python",
        "Held-out bits per byte: 8.",
        "A continuation",
        "def read_lines(path):",
        "Chunks it learned",
    ):
        assert text in out.stdout
    assert "|" in out.stdout.split("Chunks it learned")[1]
    assert (tmp_path / "demo" / "plots").is_dir()
