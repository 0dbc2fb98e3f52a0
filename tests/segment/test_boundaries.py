"""segment and segment_file against decoding the same bytes one at a time."""

import io

import numpy as np
import pytest
import torch

from hnet import BOS
from hnet.errors import UserError
from hnet.segment import segment, segment_file

TEXT = "శ్రీ గణేశాయ నమః\nHello, wörld! 👩‍👧\n".encode() + b"\xff\xe0\xb0 cut" + "\nمرحبا\n".encode() * 5


def decoded(model, text, context=b""):
    """(loss, per stage {offset of a position: whether a chunk begins there}) from `model.step`."""
    cache = model.allocate_cache(1, len(context) + len(text) + 1)
    loss, begins = [], [{} for _ in range(model.config.num_stages - 1)]
    for i, byte in enumerate([BOS, *context, *text]):
        logits, masks = model.step(torch.tensor([byte]), cache)
        for stage, mask in zip(begins, masks, strict=False):  # an inner stage is asked where the outer one begins
            if len(mask):
                stage[i - 1 - len(context)] = bool(mask[0])
        if 0 <= i - len(context) < len(text):
            loss.append(-logits[0].log_softmax(0)[text[i - len(context)]].item())
    return loss, begins


def test_boundaries_are_those_of_decoding(two_stages):
    found = segment(two_stages, TEXT)
    loss, begins = decoded(two_stages, TEXT)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-4, atol=1e-5)
    assert len(found.stages) == 2
    for stage, expected in zip(found.stages, begins, strict=True):
        assert stage.starts.tolist() == sorted({max(i, 0) for i, b in expected.items() if b})
        assert stage.offsets.tolist() == sorted({max(i, 0) for i in expected})
        inside = stage.offsets > 0
        assert ((stage.probability > 0.5) == np.isin(stage.offsets, stage.starts))[inside].all()
        assert 1 < len(stage.starts) < len(stage.offsets)  # or nothing was tested
    outer, inner = found.stages
    assert outer.offsets.tolist() == list(range(len(TEXT)))
    assert inner.offsets.tolist() == outer.starts.tolist()
    assert [int(d) for d in found.depth] == [
        (i in set(outer.starts.tolist())) + (i in set(inner.starts.tolist())) for i in range(len(TEXT))
    ]
    types = [found.loss.dtype, outer.offsets.dtype, outer.probability.dtype, outer.starts.dtype]
    assert types == [np.float32, np.int64, np.float32, np.int64]


def test_context_is_seen_and_left_out(two_stages):
    context, text = TEXT[:40], TEXT[40:90]
    found = segment(two_stages, text, context=context, offset=40)
    loss, begins = decoded(two_stages, text, context)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-4, atol=1e-5)
    for stage, expected in zip(found.stages, begins, strict=True):
        assert stage.starts.tolist() == [i for i, b in expected.items() if b and i >= 0]
        assert stage.offsets.tolist() == [i for i in expected if i >= 0]
    assert (found.text, found.offset) == (text, 40)


def test_no_text_has_no_chunks(two_stages):
    found = segment(two_stages, b"")
    assert [len(x) for stage in found.stages for x in stage] == [0] * 6
    assert len(found.loss) == len(found.depth) == 0
    assert list(segment_file(two_stages, io.BytesIO(b""))) == []


def test_the_mode_of_the_model_stays(two_stages):
    two_stages.train()
    try:
        segment(two_stages, b"x")
        assert two_stages.training
    finally:
        two_stages.eval()


class Slow(io.RawIOBase):
    """Gives what it has three bytes at a time, and remembers the most it was asked for."""

    def __init__(self, text):
        self.text, self.most = io.BytesIO(text), 0

    def read(self, n=-1):
        self.most = max(self.most, n)
        return self.text.read(min(n, 3))


@pytest.mark.parametrize(("seq_len", "context"), [(64, 16), (64, 0), (20, 5), (4096, None)])
def test_pieces_are_the_file(two_stages, tmp_path, seq_len, context):
    (tmp_path / "text").write_bytes(TEXT)
    pieces = list(segment_file(two_stages, tmp_path / "text", seq_len=seq_len, context=context))
    slow = Slow(TEXT)
    again = list(segment_file(two_stages, slow, seq_len=seq_len, context=context))
    assert slow.most <= seq_len
    assert b"".join(p.text for p in pieces) == TEXT
    for p, q in zip(pieces, again, strict=True):
        assert (p.offset, p.text) == (q.offset, q.text)
        np.testing.assert_array_equal(p.depth, q.depth)
    kept = seq_len // 4 if context is None else context
    for p in pieces:
        assert TEXT[p.offset : p.offset + len(p.text)] == p.text
        assert len(p.text) < seq_len
        assert p.offset == 0 or p.text[0] & 0xC0 != 0x80  # between two characters
        before = TEXT[max(p.offset - kept, 0) : p.offset]
        while before and before[0] & 0xC0 == 0x80:
            before = before[1:]
        alone = segment(two_stages, p.text, context=before)
        np.testing.assert_array_equal(p.depth, alone.depth)
        np.testing.assert_array_equal(p.loss, alone.loss)
    if seq_len == 64:  # the lines of TEXT are shorter than half of it
        assert all(p.text.endswith(b"\n") for p in pieces)
    if seq_len == 4096:
        assert len(pieces) == 1


def test_a_file_stops_where_told(two_stages):
    endless = io.BytesIO(TEXT * 1000)
    pieces = list(segment_file(two_stages, endless, seq_len=64, max_bytes=100))
    assert b"".join(p.text for p in pieces) == (TEXT * 2)[:100]
    assert endless.tell() == 100


@pytest.mark.parametrize(("seq_len", "context"), [(1, 0), (8, 7), (8, -1)])
def test_sizes_out_of_range_are_named(two_stages, seq_len, context):
    with pytest.raises(UserError, match=f"seq_len {seq_len} and context {context}"):
        next(segment_file(two_stages, io.BytesIO(b"x"), seq_len=seq_len, context=context))


def test_a_file_that_is_not_there_is_named(two_stages, tmp_path):
    with pytest.raises(UserError, match="none"):
        next(segment_file(two_stages, tmp_path / "none"))
