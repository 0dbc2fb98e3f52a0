"""For `make sanitize`: as a pytest plugin it loads the extension in the folder HNET_SANITIZED in place of the installed
one; as a program it prints the instruction sets that this machine can run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path


def load(folder: str):
    (library,) = Path(folder).glob("_C*.so")
    spec = importlib.util.spec_from_file_location("hnet_kernels._C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert b"__asan_init" in library.read_bytes(), f"{library} is not built with HNET_SANITIZE=ON"
    return module


def usable(isa: str) -> bool:
    code = "from hnet_kernels import _C; _C.cpu_isa()"
    env = {**os.environ, "HNET_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 0


if __name__ == "__main__":
    print(*filter(usable, ("baseline", "avx2", "avx512", "avx512_bf16")))
else:
    sys.modules["hnet_kernels._C"] = load(os.environ["HNET_SANITIZED"])
