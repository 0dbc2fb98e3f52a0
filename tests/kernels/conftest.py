import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import hnet_kernels.native
from hnet_kernels import dispatch, eager
from hnet_kernels.cuda import common, routing

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

# Compiled graphs are cached on disk under keys that know nothing of an op's schema: one from before a change would run
torch.compiler.config.force_disable_caches = True


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty hands out NaN (and the largest integers), so an output byte never written shows."""
    # on a GPU the plain-PyTorch side of a comparison may use what has no deterministic form: a warning there
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# TRITON_INTERPRET=1 (test_triton_interpreted.py sets it) runs these same tests on the Triton kernels, on the CPU.
if os.environ.get("TRITON_INTERPRET") == "1":
    KERNELS = [pytest.param(("triton", "cpu"), id="triton")]
    EVERYWHERE = KERNELS
else:
    KERNELS = [
        pytest.param(("cpu", "cpu"), id="cpu"),
        pytest.param(("triton", "cuda"), id="triton-gpu", marks=pytest.mark.gpu),
    ]
    EVERYWHERE = [
        pytest.param(("reference", "cpu"), id="reference"),
        *KERNELS,
        pytest.param(("reference", "cuda"), id="reference-gpu", marks=pytest.mark.gpu),
    ]


@pytest.fixture(params=EVERYWHERE)
def on(request):
    """(backend, device) a test runs on."""
    return request.param


@pytest.fixture(params=KERNELS)
def native(request):
    """As `on`, without the reference: what is registered with PyTorch as an op."""
    return request.param


@pytest.fixture
def asked(monkeypatch):
    """What `eager.plain` has answered."""
    answers, plain = [], eager.plain

    def ask(args):
        answers.append(plain(args))
        return answers[-1]

    monkeypatch.setattr(eager, "plain", ask)
    return answers


@pytest.fixture
def dispatched(monkeypatch):
    """Calls something with all ops through the dispatcher."""

    def run(f, *args):
        with monkeypatch.context() as patch:
            patch.setattr(eager, "plain", lambda args: False)
            return f(*args)

    return run


# --- the CUDA kernels on the CPU, by cuda_emulator.h -----------------------------------------------------------------


@pytest.fixture(scope="session")
def emulated():
    """The CUDA part of the native module, built on the emulator with blocks of 64 threads: once for these sources."""
    if (cxx := shutil.which("g++") or shutil.which("c++")) is None:
        pytest.skip("no C++ compiler")
    includes = [CSRC, HERE, Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"]]
    sources = [CSRC / "cuda/route.cu", CSRC / "cuda/dechunk.cu", CSRC / "cuda/bindings.cpp", HERE / "cuda_emulated.cpp"]
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-fvisibility=hidden"]
    command = [cxx, *flags, "-DHNET_CUDA_THREADS=64", *(f"-I{i}" for i in includes), "-x", "c++", *sources]
    read = [*sorted(p for p in CSRC.rglob("*") if p.is_file()), *sorted(HERE.glob("cuda_emula*"))]
    of = hashlib.sha256(repr((command, sys.version, torch.__version__)).encode())
    for path in read:
        of.update(path.read_bytes())
    library = HERE.parents[1] / "build" / "tests" / f"cuda_emulated_{of.hexdigest()[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{library}.lock"):  # of the processes of pytest-xdist one compiles
        if not library.exists():
            subprocess.run([*command, "-o", f"{library}.part"], check=True)
            Path(f"{library}.part").rename(library)
    spec = importlib.util.spec_from_file_location("cuda_emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_emulator(emulated, monkeypatch):
    emulated.set_resident_blocks(3)
    monkeypatch.setattr(common, "extension", lambda: emulated)
    monkeypatch.setattr(routing, "extension", lambda: emulated)
    monkeypatch.setattr(common, "run", lambda launch, like: launch(0, 0))
    monkeypatch.setattr(routing, "route_bwd", hnet_kernels.native.route_bwd)
    refused = dispatch.why_not
    monkeypatch.setattr(dispatch, "why_not", lambda name, *a: None if name == "cuda" else refused(name, *a))
    return emulated
