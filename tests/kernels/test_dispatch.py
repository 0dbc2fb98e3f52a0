import os
import subprocess
import sys

import pytest
import torch

import hnet_kernels as hk
from hnet_kernels import dispatch

from .cases import cu_of, qk_with_rate


def chosen(dtype=torch.float32, device="cpu", op="route"):
    return dispatch.resolve(None, op, torch.empty(1, dtype=dtype, device=device))


def test_auto_takes_the_native_kernels_on_cpu():
    assert chosen() == chosen(torch.bfloat16) == chosen(torch.float16) == "cpu"
    assert chosen(torch.float64) == "reference"
    assert chosen(device="meta") == "reference"


def test_context_manager_nests_and_restores():
    with hk.backend("reference"):
        assert chosen() == "reference"
        with hk.backend("auto"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
    assert chosen() == "cpu"
    with pytest.raises(RuntimeError, match="stop"), hk.backend("reference"):
        raise RuntimeError("stop")
    assert chosen() == "cpu"
    with pytest.raises(ValueError, match="backend must be one of"), hk.backend("gpu"):
        pass


def test_a_named_backend_never_falls_back_and_lists_every_reason():
    q, k = qk_with_rate(8, 4, 0.3)
    with pytest.raises(RuntimeError) as e:
        hk.route(q, k, cu_of([8]), backend="cuda")
    message = str(e.value)
    for line in ("backend 'cuda' cannot run route here", "reference: usable", "cpu: usable", "triton: ", "cuda: "):
        assert line in message
    with pytest.raises(RuntimeError, match="cpu: it takes fp32, bf16 or fp16, not torch.float64"):
        hk.route(q.double(), k.double(), cu_of([8]), backend="cpu")


def test_environment_variable():
    def run(value):
        code = "import torch, hnet_kernels.dispatch as d; print(d.resolve(None, 'route', torch.empty(1)))"
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "HNET_KERNELS_BACKEND": value},
            capture_output=True,
            text=True,
        )

    assert run("reference").stdout.strip() == "reference"
    bad = run("fast")
    assert bad.returncode != 0
    assert "HNET_KERNELS_BACKEND must be one of" in bad.stderr


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees(isa):
    """The op tests again on another instruction set, in a process of its own."""
    env = {**os.environ, "HNET_CPU_ISA": isa}
    probe = subprocess.run(
        [sys.executable, "-c", "from hnet_kernels import _C; print(_C.cpu_isa())"],
        env=env,
        capture_output=True,
        text=True,
    )
    if probe.returncode:
        pytest.skip(probe.stderr.strip().splitlines()[-1])
    assert probe.stdout.strip() == isa
    here = os.path.dirname(__file__)
    files = [os.path.join(here, f"test_{op}.py") for op in ("route", "pool", "dechunk", "ema")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cpu and not 1024", *files],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]


def test_imports_stay_light():
    """Importing the ops needs neither triton nor the hnet package."""
    code = "import sys, hnet_kernels; print([m for m in ('triton', 'hnet', 'mamba_ssm') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_keep_memory():
    code = """
import resource, torch, hnet_kernels as hk
assert hk.keep_memory()
for i in range(50):  # glibc's heap settles after a dozen
    if i == 25: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) < 1000  # 25 tensors of 64 MB; fresh pages would fault 400,000 times
