import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty hands out NaN (and the largest integers), so an output byte never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


REFERENCE = pytest.param(("reference", "cpu"), id="reference")
KERNELS = [pytest.param(("cpu", "cpu"), id="cpu")]


@pytest.fixture(params=[REFERENCE, *KERNELS])
def on(request):
    """(backend, device) a test runs on."""
    return request.param


@pytest.fixture(params=KERNELS)
def native(request):
    """As `on`, without the reference: what is registered with PyTorch as an op."""
    return request.param
