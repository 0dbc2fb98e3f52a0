"""The whole model on the card: goldens in fp32, with mamba-ssm and without; decoding; bf16 training."""

import pytest
import torch

import hnet_kernels as hk
from hnet.model import mamba2

from ..kernels.cases import cu_of
from ..model.test_golden import FOLDER, Golden
from .model_checks import LENGTHS, check_decode, check_golden, check_low_precision, seeded_model, training_step

pytestmark = pytest.mark.gpu


@pytest.fixture(params=sorted(FOLDER.glob("*.safetensors")), ids=lambda p: p.stem)
def golden(request):
    return Golden(request.param)


@pytest.fixture(params=["with mamba-ssm", "without mamba-ssm"])
def scan(request, monkeypatch):
    """Mamba-2's scan as dispatched on the card, and ours. The variable has mamba-ssm multiply in fp32, not in TF32."""
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    if request.param == "without mamba-ssm":
        monkeypatch.setattr(mamba2, "_mamba_ssm", lambda: None)
        return
    try:
        found = mamba2._mamba_ssm()
    except Exception as e:  # installed, but what it needs is not
        pytest.skip(f"mamba-ssm does not import: {type(e).__name__}: {e}")
    if found is None:
        pytest.skip("mamba-ssm is not installed")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_golden(golden, scan, backend):
    with hk.backend(backend):
        check_golden(golden, "cuda")


def test_cached_decode(golden, scan):
    check_decode(golden, "cuda")


def test_fp32_step_is_the_cpus(scan):
    model = seeded_model()
    exact = training_step(model, "cpu", torch.float32)
    card = training_step(model, "cuda", torch.float32)
    assert abs(card.loss - exact.loss) < 1e-4 * exact.loss
    assert torch.allclose(card.gradient, exact.gradient, atol=1e-3 * exact.gradient.abs().max().item())


@pytest.mark.parametrize("max_chunks", [None, [700, 500]])
def test_bf16_step(scan, max_chunks):
    """Against fp32 on the CPU, and no further from it than plain PyTorch in bf16 on the card."""
    model = seeded_model()
    exact = training_step(model, "cpu", torch.float32, max_chunks=max_chunks)
    plain = training_step(model, "cuda", torch.bfloat16, "reference", max_chunks)
    check_low_precision(training_step(model, "cuda", torch.bfloat16, max_chunks=max_chunks), plain, exact)


@pytest.fixture
def poisoned():
    """What torch.empty hands out is NaN: padding rows that leak show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_rows_leak_nowhere(scan, poisoned, dtype):
    """Budgets with room to spare: the padding rows hold what nobody wrote."""
    model = seeded_model()
    step = training_step(model, "cuda", dtype, max_chunks=[1000, 900])
    assert step.gradient.isfinite().all()
    exact = training_step(model, "cuda", dtype)
    assert abs(step.loss - exact.loss) < 1e-2 * exact.loss


def test_budgeted_model_never_waits(without_sync):
    """bf16, static shapes, the longest document's length given: forward and backward without a look at the device."""
    model = seeded_model().to("cuda")
    ids = torch.randint(0, 256, (sum(LENGTHS),), device="cuda")
    cu = cu_of(LENGTHS, "cuda")

    def work():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = model(ids, cu_seqlens=cu, max_seqlen=max(LENGTHS), max_chunks=[700, 500])
            loss = out.logits.float().square().mean() + sum(hk.ratio_loss(r, 3.0) for r in out.routing)
        loss.backward()

    work()
    without_sync(work)
