"""The op tests on the Triton kernels themselves, run by Triton's interpreter on the CPU. In processes of their own,
because triton reads TRITON_INTERPRET when the kernels are defined."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hnet_kernels.dispatch import triton_error

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(triton_error() is not None, reason=f"{triton_error()}"),
]

# Left out: what the interpreter takes minutes over (long packs and rows, threads it does not use), two processes, and
# what no backend changes, and float16 (dtype2): the kernels are the same as for bfloat16
LEFT_OUT = [
    "1024",
    "1000",
    "long",
    "triton-64-",
    "more_than_one_tile",
    "split_equals_whole",
    "same_bits",
    "global",
    "inductor",
    "wrong_arguments",
    "mamba2-stepped",
    "mamba2-turned",
    "mamba2-same",
    "all-dtype1",
    "dtype2",
]
FILES = [
    "test_route test_entropy test_dechunk",
    "test_pool test_ratio_loss",
    "test_mamba2",
    pytest.param("test_strides test_torch_integration", marks=pytest.mark.long),
    "test_ema test_triton_launches",
]


@pytest.mark.parametrize("files", FILES)
def test_in_the_interpreter(files):
    here = Path(__file__).parent
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    chosen = " and ".join(f"not {name}" for name in LEFT_OUT)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", "-k", chosen]
    command += [str(here / f"{name}.py") for name in files.split()]
    run = subprocess.run(command, env=env, cwd=here.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout, run.stdout[-2000:]
