"""compute-sanitizer over a small run of every kernel: memory, races between threads of a block, barriers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "tests.gpu.small_run", "cuda"]
FOUND = 86  # exit code for "errors were found", so that it is told from other failures


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


@pytest.fixture(scope="module")
def compiled_kernels():
    """The kernels come from Triton's cache afterwards: compiling under the tool would take minutes."""
    subprocess.run(RUN, cwd=ROOT, check=True, timeout=300)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_clean(tool, compiled_kernels):
    path = sanitizer()
    if path is None:
        pytest.skip("compute-sanitizer is not installed")
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # PyTorch and Triton ask the driver for things it may refuse as they start; those are no memory errors
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [path, "--tool", tool, *quiet, "--error-exitcode", str(FOUND), *RUN]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    log = done.stdout + done.stderr
    if "Device not supported" in log:
        pytest.skip("compute-sanitizer does not support the device here (as under gVisor)")
    assert done.returncode == 0, log[-4000:]
    assert "ERROR SUMMARY: 0 errors" in log or "RACECHECK SUMMARY: 0 hazards" in log, log[-4000:]
    assert "every other op ran on cuda" in log
