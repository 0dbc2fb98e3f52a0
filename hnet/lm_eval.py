"""Model type `hnet` of EleutherAI's lm-evaluation-harness (extra `eval`), registered by importing this.

python -m hnet.lm_eval run --model hnet --model_args pretrained=runs/mine --tasks wikitext
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hnet.cli.evaluate import SEQ_LEN, trained_with
from hnet.cli.models import checkpoint_of, load_hnet
from hnet.config import BOS
from hnet.data.corpus import Corpus
from hnet.data.packing import IGNORED, eval_batches
from hnet.device import pick_autocast, pick_device
from hnet.errors import RunFailed, UserError
from hnet.generate import Engine, SamplingConfig
from hnet_kernels import cross_entropy

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError:
    raise UserError("hnet.lm_eval needs lm-eval: pip install 'hnet-kernels[eval]'") from None

FEATURES = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}


@register_model("hnet")
class HNetLM(LM):
    """A byte-level H-Net under the harness. Its tokens are bytes, BOS stands before every text.

    Args (of --model_args):
        pretrained: a run directory, a checkpoint, a weights file, a repository.
        seq_len: bytes that the model sees at once. Default: as in training, or 8192.
        stride: as in `hnet eval`, for loglikelihood_rolling.
        score_end: loglikelihood_rolling counts the end of the text too, as `hnet eval` does. The harness does not.
        token_bytes: how many bytes a task's max_gen_toks are worth, each.
        seed: of sampling, where a task asks for it: that of request n is seed + n.
        dtype: as in `hnet eval`; generation is with fp32 weights.
        batch_bytes: bytes that go through the model at once.
        batch_size: texts that are written at the same time; auto: 16.
        device: auto, cpu, cuda; cuda:0, which the harness's command says by itself, is auto.

    Raises:
        ValueError: not an H-Net; an option out of range.
    """

    def __init__(
        self, pretrained: str, seq_len: int | None = None, stride: int | None = None, score_end: bool = False,
        token_bytes: int = 1, seed: int = 0, dtype: str = "auto", batch_bytes: int = 16384,
        batch_size: int | str = "auto", device: str | None = None, max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        path = checkpoint_of(pretrained)
        name = "auto" if device in (None, "cuda:0") else str(device)  # the harness's command says cuda:0 unless told
        if name not in ("auto", "cpu", "cuda"):
            raise UserError(f"device must be auto, cpu or cuda, got {device}")
        self._device = pick_device(name)
        self.model = load_hnet(path, self._device)
        self.seq_len = int(seq_len or trained_with(path).get("seq_len", SEQ_LEN))
        self.stride, self.score_end, self.token_bytes, self.seed = stride, bool(score_end), int(token_bytes), int(seed)
        self.batch_bytes = int(batch_bytes)
        self.slots = 16 if str(batch_size).startswith("auto") else int(batch_size)
        least = {"seq_len": 2, "token_bytes": 1, "batch_bytes": 1, "batch_size": 1}
        for name, value in zip(least, (self.seq_len, self.token_bytes, self.batch_bytes, self.slots), strict=True):
            if value < least[name]:
                raise UserError(f"{name} must be at least {least[name]}, got {value}")
        if stride is not None and not 1 <= stride <= self.seq_len:
            raise UserError(f"stride must be 1 to seq_len ({self.seq_len}), got {stride}")
        self.low = pick_autocast(dtype, self._device)

    @property
    def tokenizer_name(self) -> str:
        return "hnet-bytes"

    # --- likelihoods --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): nats of the continuation's bytes after BOS and the context, below 0, and
        whether each of them is the likeliest. Of a context too long for seq_len the end is kept.

        Raises:
            ValueError: a continuation alone is too long.
        """
        given = [[part.encode("utf-8", "surrogateescape") for part in request.args] for request in requests]
        for _, continuation in given:
            if len(continuation) > self.seq_len - 1:
                raise UserError(
                    f"a continuation of {len(continuation)} bytes does not fit seq_len {self.seq_len} (with BOS)"
                )
        found: list[tuple[float, bool]] = []
        for pack in self._packs(given):
            found += self._score(pack)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def _packs(self, given: list[list[bytes]]) -> Iterator[list[tuple[bytes, int]]]:
        """(text, bytes of it that are asked for), as many as go through the model at once."""
        pack: list[tuple[bytes, int]] = []
        for context, continuation in given:
            text = (context + continuation)[-(self.seq_len - 1) :]
            if pack and sum(1 + len(t) for t, _ in pack) + 1 + len(text) > self.batch_bytes:
                yield pack
                pack = []
            pack.append((text, len(continuation)))
        if pack:
            yield pack

    def _score(self, pack: Sequence[tuple[bytes, int]]) -> list[tuple[float, bool]]:
        texts = [bytes([BOS]) + text for text, _ in pack]
        ends = np.cumsum([len(t) for t in texts])
        ids = torch.tensor(list(b"".join(texts)), device=self._device)
        cu_seqlens = torch.tensor([0, *ends.tolist()], dtype=torch.int32, device=self._device)
        targets = torch.full_like(ids, IGNORED)
        for end, (_, asked) in zip(ends.tolist(), pack, strict=True):
            targets[end - 1 - asked : end - 1] = ids[end - asked : end]
        logits = self._logits(ids, cu_seqlens, max(map(len, texts)))
        nats = cross_entropy(logits, targets).loss.double().cpu().numpy()
        logits[:, BOS] = -torch.inf  # which is never written
        likeliest = ((logits.argmax(-1) == targets) | (targets == IGNORED)).cpu().numpy()
        begins = [0, *ends[:-1].tolist()]
        return [
            (-float(nats[a:b].sum()), bool(likeliest[a:b].all())) for a, b in zip(begins, ends.tolist(), strict=True)
        ]

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each text, below 0, over the windows of `hnet eval`: without a stride each seq_len start afresh."""
        texts = [request.args[0].encode("utf-8", "surrogateescape") for request in requests]
        rows = []
        if any(texts):
            corpus = Corpus.of(texts)  # without the empty ones
            for batch in eval_batches(corpus, self.seq_len, self.batch_bytes, None, stride=self.stride):
                here = batch.to(self._device)
                logits = self._logits(here.input_ids, here.cu_seqlens, here.max_seqlen)
                nats = cross_entropy(logits, here.targets).loss.double()
                rows.append(nats[here.targets != IGNORED].cpu().numpy())
        nats_of_all, begin, found = np.concatenate([*rows, np.zeros(0)]), 0, []
        for request, text in zip(requests, texts, strict=True):
            end = begin + len(text)
            found.append(-float(nats_of_all[begin : end + (self.score_end and bool(text))].sum()))
            begin = end + bool(text)  # and the end of the text
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def _logits(self, ids: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """(T, vocab), as `hnet eval` computes them"""
        low: AbstractContextManager = nullcontext()
        if self.low is not None:
            low = torch.autocast(self._device.type, dtype=self.low)
        with low:
            return self.model(ids, cu_seqlens=cu_seqlens, max_seqlen=longest).logits

    # --- texts --------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text of each (context, options), until a stop string or EOS; of a context too long for seq_len the end is
        kept, what is no UTF-8 becomes U+FFFD. Greedy, unless a task asks for more.

        Raises:
            ValueError: an option that hnet does not have; max_gen_toks leaves no room for a context.
            RuntimeError: logits that are not finite.
        """
        engine = Engine(self.model, slots=self.slots, max_length=self.seq_len)
        texts = []
        for n, request in enumerate(requests):
            context, options = request.args
            config, until, size = self._options(options)
            prompt = context.encode("utf-8", "surrogateescape")
            prompt = prompt[max(len(prompt) - (self.seq_len - 1 - size), 0) :]
            texts.append(engine.submit(prompt, config, max_new_bytes=size, seed=self.seed + n, stop=until))
        while engine.busy:
            engine.step()
        found = []
        for request, text in zip(requests, texts, strict=True):
            if text.finish == "error":
                raise RunFailed(text.error)
            found.append(bytes(text.text).decode(errors="replace"))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _options(self, given: dict[str, Any]) -> tuple[SamplingConfig, list[str], int]:
        """How to sample, where to stop, and after how many bytes at the latest."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(given))
        until = [stop for stop in options.pop("until") if stop]
        size = options.pop("max_gen_toks") * self.token_bytes
        if not options.pop("do_sample"):
            options = {**options, "temperature": 0.0}
        if unknown := sorted(options.keys() - FEATURES):
            raise UserError(f"generation_kwargs must be of {', '.join(sorted(FEATURES))}, got {', '.join(unknown)}")
        if size > self.seq_len - 2:
            raise UserError(f"max_gen_toks ({size} bytes) must leave room for a context in seq_len {self.seq_len}")
        return SamplingConfig(**options), until, size


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
