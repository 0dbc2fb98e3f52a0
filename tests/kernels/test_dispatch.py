import os
import subprocess
import sys

import pytest
import torch

import hnet_kernels as hk
from hnet_kernels import _C, dispatch

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
    code = "import torch, hnet_kernels.dispatch as d; print(d.resolve(None, 'route', torch.empty(1)), d._preferred)"

    def run(backend, preferred="cuda:route", command=("-c", code)):
        env = {**os.environ, "HNET_KERNELS_BACKEND": backend, "HNET_KERNELS_PREFER": preferred}
        return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)

    assert run("reference").stdout.strip() == "reference {'route': 'cuda'}"
    bad = run("fast")
    assert bad.returncode != 0
    assert "ValueError: HNET_KERNELS_BACKEND must be one of" in bad.stderr
    bad = run("auto", "cpu:route")
    assert "ValueError: HNET_KERNELS_PREFER must be a list of cuda:OP" in bad.stderr
    said = run("fast", command=("-m", "hnet_kernels.info"))
    assert said.returncode == 0
    assert (
        "NOTHING RUNS: HNET_KERNELS_BACKEND must be one of reference, cpu, triton, cuda, auto, got 'fast'"
        in said.stdout
    )
    command = run("fast", command=("-m", "hnet", "info"))
    assert command.returncode == 1
    (line,) = command.stderr.splitlines()
    assert line == "Error: HNET_KERNELS_BACKEND must be one of reference, cpu, triton, cuda, auto, got 'fast'"


@pytest.fixture
def gpu(monkeypatch):
    """Every backend but the CPU's runs on a GPU, as far as anybody asks."""
    monkeypatch.setattr(
        dispatch, "why_not", lambda name, op, device, dtype: None if name != "cuda" or op in dispatch.CUDA_OPS else "no"
    )


def chosen_on_a_gpu(op, backend=None):
    return dispatch._choose(backend or dispatch._active, op, "cuda", torch.float32, backend is None)


def test_cuda_for_many_ops_is_triton_where_there_is_no_cuda_kernel(gpu):
    with hk.backend("cuda"):
        found = {op: chosen_on_a_gpu(op) for op in ("route", "route_step", "dechunk_step", "pool", "dechunk", "ema")}
    assert found == {
        "route": "cuda",
        "route_step": "cuda",
        "dechunk_step": "cuda",
        "pool": "triton",
        "dechunk": "triton",
        "ema": "triton",
    }
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run pool here"):
        chosen_on_a_gpu("pool", "cuda")


def test_cuda_that_cannot_run_is_not_replaced():
    q, k = qk_with_rate(8, 4, 0.3)
    r = hk.route(q, k, cu_of([8]))
    with hk.backend("cuda"):
        for call in (lambda: hk.route(q, k, cu_of([8])), lambda: hk.pool(q, r), lambda: hk.ratio_loss(r, 2.0)):
            with pytest.raises(RuntimeError, match="backend 'cuda' cannot run .* here"):
                call()


def test_auto_prefers_what_it_is_told_to(gpu, monkeypatch):
    ops = ("route", "route_step", "dechunk_step", "pool")
    assert [chosen_on_a_gpu(op) for op in ops] == ["triton"] * 4
    monkeypatch.setattr(dispatch, "_preferred", dispatch.preferences("cuda:route, cuda:dechunk_step,triton:route_step"))
    assert [chosen_on_a_gpu(op) for op in ops] == ["cuda", "triton", "cuda", "triton"]
    with hk.backend("triton"):
        assert chosen_on_a_gpu("route") == "triton"  # a name is an order


@pytest.mark.parametrize("text", ["cuda", "route", "cuda:pool", "cpu:route", "cuda:route;cuda:route_step", "cuda:"])
def test_preferences_that_are_none(text):
    with pytest.raises(ValueError, match=r"HNET_KERNELS_PREFER must be a list of cuda:OP or triton:OP, .* got '"):
        dispatch.preferences(text)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_agrees(isa):
    """The op tests again on another instruction set, in a process of its own."""
    if isa == _C.cpu_isa():
        pytest.skip(f"every other test runs on {isa} here")
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
    files = [os.path.join(here, f"test_{op}.py") for op in ("route", "entropy", "pool", "dechunk", "ema", "linear")]
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
