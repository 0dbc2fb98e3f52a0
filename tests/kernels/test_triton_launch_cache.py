"""A launch keeps the compiled kernel that Triton picked for such arguments: always the one that Triton would pick."""

import contextlib
import random

import pytest
import torch

from hnet_kernels import dispatch
from hnet_kernels.dispatch import triton_error

from .cases import INTERPRETED

pytestmark = pytest.mark.skipif(
    triton_error() is not None or INTERPRETED, reason=triton_error() or "interpreted kernels are not launched"
)


@pytest.fixture
def gpu():
    from benchmarks.fake_gpu import fake_gpu

    with fake_gpu(compiles=False) as fake:
        yield fake


def launched(gpu, kernel, *args, grid=(3, 2), like=None, D=64, cached=True, **constexprs):
    """The launch that comes of it"""
    like = like if like is not None else next(a for a in args if torch.is_tensor(a))
    if cached:
        kernel.launch(grid, like, D, *args, **constexprs)
    else:
        kernel._through_triton(grid, like, D, args, constexprs)
    return gpu.launches[-1]


def at(offset, dtype=torch.float32, n=64):
    """A tensor `offset` bytes past a place that 16 divides"""
    memory = torch.empty(n * 8 + 64, dtype=torch.uint8)
    begin = -memory.data_ptr() % 16 + offset
    return memory[begin : begin + n * dtype.itemsize].view(dtype)


def copy_arguments(x=None, z=None, layout=None, M=5, N=2, x_stride=64):
    i32 = at(0, torch.int32) if layout is None else layout
    return at(0) if x is None else x, i32, i32, i32, at(0) if z is None else z, M, N, x_stride


def changes():
    """What each may need another kernel for: arguments of a pool's launch, its width and constexprs"""
    return {
        "as it is": (copy_arguments(), {}),
        "dtype": (copy_arguments(x=at(0, torch.bfloat16), z=at(0, torch.bfloat16)), {}),
        "dtype of one": (copy_arguments(z=at(0, torch.bfloat16)), {}),
        "width": (copy_arguments(), {"D": 128}),
        "a flag": (copy_arguments(), {"BLOCK": 8}),
        "an odd address": (copy_arguments(x=at(4)), {}),
        "another odd address": (copy_arguments(z=at(8)), {}),
        "both": (copy_arguments(x=at(12), z=at(4)), {}),
        "nothing given": ((*copy_arguments()[:4], None, 5, 2, 64), {}),
        "a stride of one": (copy_arguments(x_stride=1), {}),
        "an odd stride": (copy_arguments(x_stride=33), {}),
        "a stride of 64 bits": (copy_arguments(x_stride=2**31), {}),
        "an odd stride of 64 bits": (copy_arguments(x_stride=2**33 + 1), {}),
        "a length of 64 bits": (copy_arguments(M=2**31), {}),
        "two": (copy_arguments(M=2**31, x_stride=2**31), {}),
    }


@pytest.mark.parametrize("change", [name for name in changes() if name != "as it is"])
def test_what_needs_a_kernel_of_its_own_gets_one(gpu, change):
    from hnet_kernels.triton.pool import COPY

    plain, other = changes()["as it is"], changes()[change]
    for _ in range(2):
        first = launched(gpu, COPY["boundary"], *plain[0], **plain[1])
        second = launched(gpu, COPY["boundary"], *other[0], **other[1])
        assert first.kernel is not second.kernel


@pytest.mark.parametrize(
    "same",
    [
        {"M": 1},
        {"M": 16, "N": 32},
        {"x_stride": 16},
        {"x_stride": 0},
        {"layout": at(0, torch.int32, 16)},
        {"z": torch.empty(0)},
    ],
    ids=["a length of one", "lengths 16 divides", "another stride 16 divides", "no stride", "a length", "no memory"],
)
def test_what_needs_none_gets_none(gpu, same):
    from hnet_kernels.triton.pool import COPY

    first = launched(gpu, COPY["boundary"], *copy_arguments())
    assert launched(gpu, COPY["boundary"], *copy_arguments(**same)).kernel is first.kernel


def test_any_arguments_launch_what_triton_would(gpu):
    """The same kernel with the same arguments on the same grid, whatever came before. Pointers may be addresses."""
    from hnet_kernels.triton import aot

    draw, kernels = random.Random(0), list(aot.kernels().values())
    dtypes = {"*T": [torch.float32, torch.bfloat16, torch.float16], "*R": [torch.float32, torch.bfloat16]}
    dtypes |= {"*fp32": [torch.float32], "*i32": [torch.int32], "*i8": [torch.int8], "*u8": [torch.bool, torch.uint8]}

    def argument(kind):
        if kind.startswith("*"):
            dtype = draw.choice(dtypes[kind])
            size = dtype.itemsize
            return draw.choice([None, at(0, dtype), at(0, dtype), at(0, dtype), at(draw.randrange(0, 16, size), dtype)])
        return draw.random() if kind == "fp32" else draw.choice([0, 1, 16, 48, 7, 2**31 - 1, 2**31, 2**40 + 1])

    def address(a):
        return a.data_ptr() if torch.is_tensor(a) else a

    seen = set()
    for _ in range(600):
        kernel = draw.choice(kernels)
        args = [argument(kind) for kind in kernel.args.values()]
        like, grid = torch.empty(1, dtype=draw.choice(dtypes["*T"])), draw.choice([(1,), (2, 3), (4, 5, 6)])
        given = {"like": like, "D": draw.choice([1, 33, 256]), "grid": grid}
        once, again = (launched(gpu, kernel, *args, **given) for _ in range(2))
        want = launched(gpu, kernel, *args, **given, cached=False)
        assert once.kernel is again.kernel is want.kernel
        assert once.grid == again.grid == want.grid == (*grid, 1, 1)[:3]
        assert [*map(address, again.args)] == [*map(address, want.args)]
        assert not any(map(torch.is_tensor, again.args))
        seen.add(again.kernel)
    assert len(seen) > 300


def test_nothing_is_launched_on_an_empty_grid(gpu):
    from hnet_kernels.triton.pool import COPY

    COPY["boundary"].launch((0, 2), torch.empty(1), 64, *copy_arguments())
    assert not gpu.launches


def test_the_current_stream_is_asked_for_at_every_launch(gpu):
    from hnet_kernels.triton.pool import COPY

    for stream in (0, 7, 0, 9):
        gpu.stream = stream
        assert launched(gpu, COPY["boundary"], *copy_arguments()).stream == stream


def test_a_device_has_its_own_kernels_and_is_current_while_they_are_launched(gpu, monkeypatch):
    from hnet_kernels.triton.pool import COPY

    class Rows:
        dtype = torch.float32

        def __init__(self, index):
            self.device = torch.device("cuda", index)

    @contextlib.contextmanager
    def current(index):
        before, gpu.device = gpu.device, index
        on.append(index)
        yield
        gpu.device = before

    on = []
    monkeypatch.setattr(torch.cuda, "current_device", gpu.get_current_device)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(gpu, "get_current_stream", lambda device: 100 + device)
    found = {}
    for _ in range(2):
        for index in (0, 1):
            launch = launched(gpu, COPY["boundary"], *copy_arguments(), like=Rows(index))
            assert launch.stream == 100 + index
            assert found.setdefault(index, launch.kernel) is launch.kernel
    assert found[0] is not found[1]
    assert on == [1, 1]
    assert gpu.device == 0


def test_what_triton_compiles_is_launched(monkeypatch):
    """Down to the driver, with a kernel that was really compiled: by Triton the first time, by us then."""
    from benchmarks.fake_gpu import fake_gpu
    from hnet_kernels.triton import ratio_loss

    cu, sums = torch.tensor([0, 3, 9], dtype=torch.int32), torch.ones(2)
    with fake_gpu() as gpu:
        for _ in range(2):
            ratio_loss.ratio_loss(sums, cu, cu, 4.0, False, False)
        with monkeypatch.context() as patch:
            patch.setattr(ratio_loss.LOSS[False].fn.__class__, "run", None)  # Triton's own launch
            ratio_loss.ratio_loss(sums, cu, cu, 4.0, False, False)
    first, second, third = gpu.launches
    assert first.kernel == second.kernel == third.kernel == "_ratio_loss_kernel"
    assert first.grid == second.grid == third.grid == (1, 1, 1)
    assert first.args[0].data_ptr() == second.args[0] == cu.data_ptr()
    assert first.args[5:] == second.args[5:] == third.args[5:] == (4.0, 2, False, False, 256)


def test_a_round_trip_launches_what_it_did(gpu, monkeypatch):
    """A stage, forward and backward: eleven kernels, a budget's two included, all kept from the second time on."""
    from benchmarks import host_cost

    monkeypatch.setattr(dispatch, "_active", "triton")
    _, both = host_cost.stage()
    names = []
    for _ in range(3):
        gpu.launches.clear()
        both()
        names.append([launch.kernel.src.fn.__name__ for launch in gpu.launches])
    assert names[0] == names[1] == names[2]
    assert len(names[0]) == 11
