import os

import pytest
import torch

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
