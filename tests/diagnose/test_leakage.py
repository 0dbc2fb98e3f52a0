"""Documents of a pack, on the real model and loader."""

import pytest
import torch

from hnet import HNetConfig, HNetForCausalLM
from hnet.data.corpus import Corpus
from hnet.data.pack_stream import PackStream
from hnet.diagnose.leakage import find_leak, leak

TEXT = [f"document {i}: {'lorem ipsum ' * (2 + i % 5)}".encode() for i in range(40)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HNetForCausalLM(HNetConfig.preset("tiny")).eval()


@pytest.fixture(scope="module")
def batch():
    return next(PackStream(Corpus.of(TEXT), 128, 512, seed=0))


def whole(ids):
    return torch.tensor([0, len(ids)], dtype=torch.int32)


def test_ours_does_not_leak(model, batch):
    (f,) = leak(lambda ids, cu: model(ids, cu_seqlens=cu).logits, batch.input_ids, batch.cu_seqlens)
    assert f.severity == "ok", f.evidence
    assert f.evidence[0].startswith("Document ")


def test_a_model_that_is_not_told(model, batch):
    """The loader parts documents, the training loop drops it."""
    (f,) = leak(lambda ids, cu: model(ids, cu_seqlens=whole(ids)).logits, batch.input_ids, batch.cu_seqlens)
    assert f.severity == "critical"
    assert f.confidence == "high"


def test_a_loader_that_does_not_part(model, batch):
    def forward(ids, cu):
        return model(ids, cu_seqlens=cu).logits

    (f,) = leak(forward, batch.input_ids, whole(batch.input_ids))
    assert f.severity == "critical"
    found = find_leak(forward, batch.input_ids, whole(batch.input_ids))
    assert found.joined == len(set(torch.nonzero(batch.input_ids == 254).flatten().tolist()) - {0})
    with pytest.raises(ValueError, match="two documents"):
        find_leak(forward, torch.tensor([254, 97, 98]), torch.tensor([0, 3], dtype=torch.int32))
