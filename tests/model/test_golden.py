"""Agreement with the published reference implementation, tensor by tensor."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import hnet_kernels as hk
from hnet import HNetConfig, HNetForCausalLM
from hnet.model.checkpoint_format import load_state
from hnet_kernels.dispatch import triton_interpreted

FOLDER = Path(os.environ.get("HNET_GOLDEN", Path(__file__).parent.parent / "data"))
TARGETS = [3.0, 2.5]
TOLERANCE = 1e-4


class Golden:
    def __init__(self, path: Path) -> None:
        with safe_open(str(path), "pt") as f:
            self.config = HNetConfig.from_dict(json.loads(f.metadata()["config"]))
            self.tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        self.model = HNetForCausalLM(self.config)
        params = {k.removeprefix("param."): v for k, v in self.tensors.items() if k.startswith("param.")}
        load_state(self.model, params, path.name)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]


@pytest.fixture(scope="module", params=sorted(FOLDER.glob("*.safetensors")), ids=lambda p: p.stem)
def golden(request):
    return Golden(request.param)


# By test_triton_interpreted.py: on the Triton kernels, Mamba-2's too
@pytest.fixture(params=["triton"] if triton_interpreted() else ["cpu", "reference"])
def backend(request):
    with hk.backend(request.param):
        yield


def agrees(got, want):
    scale = want.abs().max().clamp(min=1e-8)
    assert got.shape == want.shape
    assert ((got - want).abs().max() / scale).item() < TOLERANCE


def same_mask(routing, golden, prefix):
    for i, r in enumerate(routing):
        differ = r.boundary_mask != golden[f"{prefix}stage{i}.boundary_mask"]
        assert not (differ & ((r.boundary_prob - 0.5).abs() > 1e-6)).any()


def test_forward(golden, backend):
    out = golden.model(golden["input_ids"])
    agrees(out.logits, golden["logits"])
    same_mask(out.routing, golden, "")
    for i, r in enumerate(out.routing):
        agrees(r.boundary_prob, golden[f"stage{i}.boundary_prob"])


def test_losses_and_every_gradient(golden, backend):
    ids = golden["input_ids"]
    golden.model.zero_grad()
    out = golden.model(ids)
    ce = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    ratio = sum(hk.ratio_loss(r, n) for r, n in zip(out.routing, TARGETS, strict=False))
    agrees(ce, golden["ce"])
    agrees(ratio, golden["ratio_loss"])
    (ce + 0.03 * ratio).backward()
    for name, p in golden.model.named_parameters():
        agrees(p.grad, golden[f"grad.{name}"])


def test_ragged_packing(golden, backend):
    out = golden.model(golden["ragged.input_ids"], cu_seqlens=golden["ragged.cu_seqlens"])
    agrees(out.logits, golden["ragged.logits"])
    same_mask(out.routing, golden, "ragged.")


def test_cached_decode(golden, backend):
    ids = golden["input_ids"][0]
    cache = golden.model.allocate_cache(1, 90)
    logits = [golden.model.prefill(ids[:50], torch.tensor([0, 50], dtype=torch.int32), cache).logits[-1]]
    logits += [golden.model.step(ids[t : t + 1], cache)[0][0] for t in range(50, 90)]
    agrees(torch.stack(logits), golden["decode.logits"])


def test_budget_that_drops_nothing_changes_nothing(golden, backend):
    """The static-shape form of both stages, with more room than chunks."""
    ids, cu = golden["ragged.input_ids"], golden["ragged.cu_seqlens"]
    rooms = [200, 160][: golden.config.num_stages - 1]
    out = golden.model(ids, cu_seqlens=cu, max_chunks=rooms)
    agrees(out.logits, golden["ragged.logits"])
    assert [r.chunk_start.shape[0] for r in out.routing] == rooms
    assert all(int(r.num_dropped) == 0 for r in out.routing)
    golden.model.zero_grad()
    out.logits.square().mean().backward()
    budgeted = {n: p.grad.clone() for n, p in golden.model.named_parameters()}
    golden.model.zero_grad()
    golden.model(ids, cu_seqlens=cu).logits.square().mean().backward()
    for n, p in golden.model.named_parameters():
        agrees(budgeted[n], p.grad)
