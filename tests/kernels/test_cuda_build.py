"""How the CUDA part of the native module is built: found or not, for which GPUs, without spills, loadable anywhere."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hnet_kernels import _C, info

ROOT = Path(__file__).parents[2]


def needs(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed")
    return path


@pytest.fixture
def built():
    if not _C.has_cuda():
        pytest.skip("the native extension was built without CUDA")


def test_module_says_what_it_has():
    assert _C.has_cuda() == hasattr(_C, "cuda_route_fwd") == bool(_C.cuda_archs())
    assert ("CUDA kernels not built" in info.report()) == (not _C.has_cuda())


def test_needs_no_cuda_library(built):
    """The runtime is inside, its symbols hidden from PyTorch's; the driver is looked for at the first launch."""
    needed = subprocess.run([needs("readelf"), "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed
    assert not re.search(r"lib(cuda|cudart)\b", needed)
    names = subprocess.run([needs("nm"), "-D", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert not re.search(r" _*(cuda|cu)[A-Z]", names)


def test_a_launch_without_a_gpu_is_an_error(built):
    code = "from hnet_kernels import _C; _C.cuda_dechunk_step(0, 0, 0, 4, 0, 4, 0, 0, 0, 1, 4, 0, 0, 0, 0)"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 1
    assert "RuntimeError: CUDA: " in run.stderr


def cuobjdump(*flags: str) -> str:
    spec = importlib.util.find_spec("triton")
    if spec is None:
        pytest.skip("cuobjdump comes with triton, which is not installed")
    tool = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *flags, _C.__file__], capture_output=True, text=True, check=True).stdout


def test_code_for_every_architecture(built):
    assert sorted(set(re.findall(r"sm_\d+", cuobjdump("--list-elf")))) == sorted(_C.cuda_archs().split(", "))


def test_nothing_spills(built):
    """A spilled register needs a stack frame or local memory; no kernel has either, on any architecture."""
    usage = re.findall(
        r"Function (\S*_kernel\S*):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", cuobjdump("-res-usage")
    )
    assert len(usage) == 9 * len(_C.cuda_archs().split(", "))  # three kernels for three dtypes
    for kernel, registers, stack, shared, local in usage:
        assert (stack, local) == ("0", "0"), kernel
        assert int(registers) <= (64 if "route_fwd" in kernel else 128), kernel  # two blocks of 512 threads
        assert int(shared) < 48 << 10, kernel


# --- HNET_CUDA ----------------------------------------------------------------------------------------------------


def configure(tmp_path, option, nvcc, **defines):
    """What find_nvcc.cmake makes of an nvcc: CMake's exit status and words."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(probe LANGUAGES NONE)\n"
        f"set(HNET_CUDA {option})\ninclude({ROOT}/csrc/cuda/find_nvcc.cmake)\n"
        'message(STATUS "compiler=[${HNET_NVCC}] archs=[${HNET_CUDA_ARCHS}] cmake=[${CMAKE_CUDA_ARCHITECTURES}]")\n'
    )
    flags = [f"-D{name}={value}" for name, value in defines.items()]
    run = subprocess.run(
        [needs("cmake"), "-S", tmp_path, "-B", tmp_path / "build", *flags],
        env={**{k: v for k, v in os.environ.items() if k != "CUDAARCHS"}, "CUDACXX": str(nvcc)},
        capture_output=True,
        text=True,
    )
    return run.returncode, run.stdout + run.stderr


@pytest.fixture
def broken_nvcc(tmp_path):
    path = tmp_path / "nvcc"
    path.write_text("#!/bin/sh\necho 'nvcc fatal : no host compiler' >&2\necho 'a second line' >&2\nexit 1\n")
    path.chmod(0o755)
    return path


def test_auto_goes_on_without_a_working_nvcc(tmp_path, broken_nvcc):
    status, said = configure(tmp_path, "AUTO", broken_nvcc)
    assert status == 0
    lines = [line for line in said.splitlines() if "hnet_kernels" in line]
    assert lines == [
        f"-- hnet_kernels: no CUDA kernels, {broken_nvcc} does not work (1): nvcc fatal : no host compiler"
    ]
    assert "compiler=[]" in said
    status, said = configure(tmp_path, "auto", tmp_path / "missing")
    assert status == 0
    assert "compiler=[]" in said


def test_on_insists(tmp_path, broken_nvcc):
    status, said = configure(tmp_path, "ON", broken_nvcc)
    assert status != 0
    assert "HNET_CUDA=ON, but" in said
    assert "no host compiler" in said


def test_off_never_looks(tmp_path):
    trap = tmp_path / "nvcc"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    trap.chmod(0o755)
    status, said = configure(tmp_path, "OFF", trap)
    assert status == 0
    assert "compiler=[]" in said
    assert not (tmp_path / "called").exists()


def test_other_words_are_refused(tmp_path, broken_nvcc):
    status, said = configure(tmp_path, "MAYBE", broken_nvcc)
    assert status != 0
    assert "HNET_CUDA must be AUTO, ON or OFF, got MAYBE" in said


def test_architectures(tmp_path):
    """An older nvcc gets those it knows; named ones are taken as they are."""
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\n[ \"$1\" = --list-gpu-arch ] && printf 'compute_80\\ncompute_90\\n'\nexit 0\n")
    fake.chmod(0o755)
    assert "archs=[sm_80, sm_90] cmake=[80-real;90]" in configure(tmp_path, "ON", fake)[1]
    said = configure(tmp_path, "ON", fake, CMAKE_CUDA_ARCHITECTURES="90a-real;120")[1]
    assert "archs=[sm_90a, sm_120]" in said
