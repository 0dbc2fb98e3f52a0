"""What only a GPU can show. Every module here is marked `gpu`, so all of it skips where there is no CUDA device."""

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_fp32():
    """fp32 means fp32, no TF32 in matrix products; and no test leaves memory for the next to trip over."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.cuda.empty_cache()


@pytest.fixture
def without_sync():
    """without_sync(work): runs it; a wait of the host for the device raises."""

    def run(work):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return work()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run


@pytest.fixture
def need_memory():
    """need_memory(size): skips unless that many bytes are free on the card."""

    def check(size: int) -> None:
        free, _ = torch.cuda.mem_get_info()
        if free < size:
            pytest.skip(f"needs {size / 2**30:.0f} GiB of free GPU memory, {free / 2**30:.0f} are free")

    return check
