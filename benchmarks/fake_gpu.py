"""A GPU that is none. PyTorch, our ops and Triton do all they do for a GPU, on tensors of the CPU, up to the driver,
which only takes down what it was told to launch: outputs stay as they were allocated. For counting launches, kernels
and host time where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hnet_kernels import dispatch, validation
from hnet_kernels.triton import aot, common


class Launch(NamedTuple):
    kernel: Any  # of the launcher: its name, or what was compiled
    grid: tuple[int, int, int]
    stream: int
    args: tuple[Any, ...]


class Driver:
    """An sm_90 with one current device and stream, as far as Triton asks."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.device, self.stream = 0, 0
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        return name, name, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return self.launcher(metadata.name)

    def launcher(self, kernel: Any) -> Any:
        launches = self.launches

        def launch(x, y, z, stream, function, packed, metadata, enter_hook, exit_hook, *args):
            launches.append(Launch(kernel, (x, y, z), stream, args))

        return launch


class Uncompiled(triton.compiler.CompiledKernel):
    """What Triton was asked to compile."""

    def __init__(self, source: Any, to: Driver) -> None:
        self.src = source
        self.name = self.module = self.function = self.packed_metadata = "none"
        self._run = to.launcher(self)


def _forget() -> None:
    for kernel in aot.kernels().values():
        kernel._compiled.clear()
        kernel.fn.device_caches.clear()


@contextmanager
def fake_gpu(compiles: bool = True) -> Iterator[Driver]:
    """Triton kernels run on CPU tensors as said above. compiles=False: Triton only decides what it would compile."""
    fake, refuses, before = Driver(), dispatch.why_not, driver._active

    def why_not(name, *of):
        return None if name == "triton" else refuses(name, *of)

    def unread(x):
        return False

    def sm_90(device):
        return "sm_90"

    def uncompiled(source, target=None, options=None, **_):
        return Uncompiled(source, fake)

    _forget()
    driver.set_active(fake)
    with (
        mock.patch.object(dispatch, "why_not", why_not),
        mock.patch.object(validation, "readable", unread),  # nobody looks at what is on a GPU
        mock.patch.object(common, "target", sm_90),
        mock.patch.object(triton.compiler, "compile", triton.compiler.compile if compiles else uncompiled),
    ):
        try:
            yield fake
        finally:
            driver._active = before
            _forget()
