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


ON = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpu", "cpu"), id="cpu"),
]


@pytest.fixture(params=ON)
def on(request):
    """(backend, device) a test runs on."""
    return request.param
