"""Tests, benchmarks and `make gpu` on a machine that has torch and little else: what is collected, and asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The packages a GPU machine is expected to have, and what those need; everything else cannot be imported.
BLOCK = """
import importlib.metadata as metadata, re, sys

def needs(name, seen):
    name = re.sub("[-_.]+", "-", name).lower()
    if name in seen:
        return seen
    try:
        requires = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return seen
    seen.add(name)
    for line in requires:
        if "extra ==" not in line:
            needs(re.match(r"[\\w.-]+", line)[0], seen)
    return seen

allowed = {"hnet-kernels"}
for name in "numpy torch triton pytest pytest-benchmark safetensors click rich".split():
    needs(name, allowed)

class Block:
    def find_spec(self, name, path=None, target=None):
        owners = OWNERS.get(name.partition(".")[0], ())
        if owners and not any(re.sub("[-_.]+", "-", o).lower() in allowed for o in owners):
            raise ModuleNotFoundError(f"no module named {name!r} on a GPU machine", name=name)

OWNERS = metadata.packages_distributions()
sys.meta_path.insert(0, Block())

import importlib.util
find_spec = importlib.util.find_spec

def find_or_none(name, package=None):  # as where it is really not installed
    try:
        return find_spec(name, package)
    except ModuleNotFoundError:
        return None

importlib.util.find_spec = find_or_none
"""


def collected(*arguments: str) -> str:
    absent = [o for plugin in ("xdist", "xdist.looponfail", "hypothesispytest") for o in ("-p", f"no:{plugin}")]
    options = [*absent, "--collect-only", "-q", *arguments]
    code = BLOCK + f"\nimport pytest\nsys.exit(pytest.main({options!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 5), (done.stdout + done.stderr)[-3000:]  # 5: nothing selected
    return done.stdout


def test_the_block_blocks():
    code = BLOCK + "import numpy, torch\ntry:\n    import pyarrow\nexcept ModuleNotFoundError as e:\n    print(e)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pyarrow" in out


@pytest.mark.parametrize(
    ("folder", "parts"),
    [
        (
            "tests",
            ["gpu/test_stage.py", "gpu/test_large.py", "gpu/test_model.py", "kernels/test_route.py", "triton-gpu"],
        ),
        (
            "benchmarks",
            [
                *("test_gpu_ops.py::test_route[gpu-T65536-D2048-chunk3]", "test_round_trip_in_a_cuda_graph"),
                *("test_graphs.py::test_replay[route, dropping half-gpu-T262144-D2048-chunk6]",),
                *("test_forms_of_the_step[hnet_1stage_L-T131072]", "test_decode[laptop-B32]"),
            ],
        ),
    ],
)
def test_gpu_tests_are_collected(folder, parts):
    out = collected(folder, "-m", "gpu")
    for part in parts:
        assert part in out, f"{part} is missing from what was collected"


def test_a_run_needs_nothing_else():
    """Training and its config.toml."""
    code = BLOCK + "from hnet.train.loop import Trainer\nfrom hnet.train.config import TrainConfig\nimport hnet.cli\n"
    code += "print(TrainConfig(data=['x']).to_toml())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 'data = ["x"]\n' in out


def test_everything_in_the_gpu_folder_is_marked():
    assert "/test_" not in collected("tests/gpu", "-m", "not gpu")


def test_make_gpu_says_what_is_missing():
    """Without a GPU each part stops at once, in one line."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for part in ("gpu-build", "gpu-test", "gpu-bench"):
        done = subprocess.run(
            ["make", "--no-print-directory", part, f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode != 0
        assert "sees no CUDA device" in done.stderr
        assert done.stdout == ""
