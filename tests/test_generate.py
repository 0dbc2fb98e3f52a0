import pytest
import torch

from hnet import BOS, EOS, HNetConfig, HNetForCausalLM
from hnet.generate import generate, stream
from hnet.generate.texts import stream_text


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HNetForCausalLM(HNetConfig.preset("tiny")).eval()


def test_greedy_equals_argmax_of_full_forwards(model):
    text = [254, *b"hello"]
    new = generate(model, "hello", max_new_bytes=12, temperature=0, stop_at_eos=False)[0]
    for byte in new:
        logits = model(torch.tensor(text), cu_seqlens=torch.tensor([0, len(text)], dtype=torch.int32)).logits
        assert byte == int(logits[-1].argmax())
        text.append(byte)


def test_batch_of_ragged_prompts_equals_one_at_a_time(model):
    prompts = ["a", b"longer prompt \xf0\x9f", "", "middle"]
    together = generate(model, prompts, max_new_bytes=20, temperature=0)
    assert together == [generate(model, p, max_new_bytes=20, temperature=0)[0] for p in prompts]
    assert model.generate(prompts, max_new_bytes=20, temperature=0) == together


def test_seed_repeats(model):
    a, b, c = (generate(model, "x", max_new_bytes=30, seed=s)[0] for s in (1, 1, 2))
    assert a == b != c


class Scripted(torch.nn.Module):
    """Says a fixed string whatever it is asked."""

    def __init__(self, says: bytes) -> None:
        super().__init__()
        self.says, self.embeddings = says, torch.nn.Embedding(1, 1)

    def allocate_cache(self, n, length):
        self.at = [0] * n
        return self

    def _logits(self, slots):
        out = torch.full((len(slots), 256), -30.0)
        for row, s in enumerate(slots):
            out[row, self.says[self.at[s]]] = 30.0
            self.at[s] += 1
        return out

    def prefill(self, ids, cu, cache, slots):
        logits = torch.zeros(len(ids), 256)
        logits[cu[1:].long() - 1] = self._logits(range(len(cu) - 1))
        return type("Out", (), {"logits": logits})

    def step(self, ids, cache, slots):
        return self._logits(slots), []


def test_stops_at_eos_without_yielding_it():
    m = Scripted(b"hi" + bytes([EOS]) + b"never")
    assert generate(m, ["a", "b"], max_new_bytes=50) == [b"hi", b"hi"]
    assert generate(Scripted(b"hi" + bytes([EOS]) + b"!!"), "a", max_new_bytes=5, stop_at_eos=False) == [b"hi\xff!!"]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {}, {"top_p": 0.9, "repetition_penalty": 2.0}])
def test_bos_is_never_generated(sampling):
    """By a model that gives it all but e^-60 of the probability."""
    new = generate(Scripted(bytes([BOS]) * 40), ["a", "b"], max_new_bytes=40, seed=0, stop_at_eos=False, **sampling)
    assert [len(text) for text in new] == [40, 40]
    assert not any(BOS in text for text in new)


def test_prompts_have_the_seeds_that_follow_one_another(model):
    together = generate(model, ["x", "x", "y"], max_new_bytes=30, seed=7)
    assert together == [generate(model, p, max_new_bytes=30, seed=7 + n)[0] for n, p in enumerate("xxy")]
    assert together[0] != together[1]


def test_a_stop_string_is_not_yielded_and_what_was_held_back_is():
    m = Scripted(b"one, two; three" + bytes([EOS]))
    assert generate(m, ["a", "b"], max_new_bytes=50, stop=["; t", b"four"]) == [b"one, two"] * 2
    steps = list(stream(m, ["a"], max_new_bytes=5, stop=", twenty"))
    assert [list(s.values()) for s in steps] == [[byte] for byte in b"one, "]


def test_streamed_text_never_breaks_a_character():
    text = "naïve – తెలుగు 🎉"
    pieces = list(stream_text(Scripted(text.encode() + bytes([EOS])), "x", max_new_bytes=100))
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)
    assert len(pieces) == len(text)  # each character comes as soon as it is whole
    cut = list(stream_text(Scripted("é".encode()), "x", max_new_bytes=1))
    assert cut == ["�"]  # ended inside a character
    bad = list(stream_text(Scripted(b"a\xf8b" + bytes([EOS])), "x", max_new_bytes=10))
    assert "".join(bad) == "a�b"


def test_logits_that_are_not_finite_are_an_error():
    class Lost(Scripted):
        def _logits(self, slots):
            return super()._logits(slots) * (float("nan") if self.at[0] > 2 else 1)

    with pytest.raises(RuntimeError, match="logits are not finite: there is nothing to sample"):
        generate(Lost(b"hello"), ["a", "b"], max_new_bytes=5)


def test_bad_options(model):
    for kwargs, message in [
        ({"temperature": -1}, "temperature must be >= 0"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]"),
        ({"repetition_penalty": 0.5}, "repetition_penalty must be >= 1"),
        ({"max_new_bytes": -1}, "max_new_bytes must be >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(model, "x", **kwargs)
    with pytest.raises(ValueError, match="prompts must not be empty"):
        list(stream(model, []))
    assert generate(model, "x", max_new_bytes=0) == [b""]
