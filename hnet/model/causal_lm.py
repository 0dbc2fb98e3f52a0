"""H-Net as a byte-level language model: embedding, backbone, head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import hnet_kernels as hk
from hnet.config import HNetConfig

from . import native_step
from .cache import HNetCache, run_directly, upload
from .checkpoint_format import find_config, find_weights, load_state, read_weights, save_pretrained
from .decode_graphs import EXACT, Graphs
from .hnet import HNet, recent_bytes
from .isotropic import Block
from .ngrams import NgramEmbeddings
from .pack import Pack


class CausalLMOutput(NamedTuple):
    logits: Tensor  # (B, L, vocab) or (T, vocab)
    routing: list[hk.Routing]  # one a stage with routing, outermost first


class HNetForCausalLM(nn.Module):
    """H-Net over bytes (arXiv 2507.07955). Parameter names are those of the published checkpoints.

    Args:
        config: architecture.
        dtype: parameter dtype; the residual projections stay fp32. Default fp32.
        device: where the parameters live.
    """

    generate: Callable[..., list[bytes]]  # `hnet.generate.generate`, which puts itself here

    def __init__(
        self, config: HNetConfig, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model[0])
        has_ngrams = bool(config.ngram_cfg.sizes)
        self.ngrams = NgramEmbeddings(config.ngram_cfg, config.vocab_size, config.d_model[0]) if has_ngrams else None
        self.backbone = HNet(config)
        self.lm_head = nn.Linear(config.d_model[0], config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embeddings.weight
        self.init_weights()
        self.cast(dtype or torch.float32)
        self.to(device)

    def cast(self, dtype: torch.dtype) -> HNetForCausalLM:
        """Parameters to `dtype`, residual projections and logit biases to fp32. Returns self."""
        biases = [None if s.innermost else s.logit_bias for s in self.stages()]
        self.to(dtype)
        for stage, bias in zip(self.stages(), biases, strict=True):
            if not stage.innermost:
                stage.residual_proj.float()
                stage.logit_bias = bias
        return self

    def stages(self) -> Iterator[HNet]:
        """The recursive stages, outermost first."""
        stage = self.backbone
        while True:
            yield stage
            if stage.innermost:
                return
            stage = stage.main_network

    @torch.no_grad()
    def init_weights(self, std: float = 0.02) -> None:
        """The published scheme: embeddings N(0, 1), linears N(0, 0.02), those that end a residual branch divided by
        sqrt(residual branches from the outside down to their stage), routing identity, residual projection zero."""
        nn.init.normal_(self.lm_head.weight, std=std)
        nn.init.normal_(self.embeddings.weight, std=1.0)
        residuals = 0
        for stage in self.stages():
            stacks = [stage.main_network] if stage.innermost else [stage.encoder, stage.decoder]
            residuals += sum(s.num_residuals for s in stacks)
            for stack in stacks:
                for name, m in stack.named_modules():
                    if isinstance(m, nn.Linear):
                        ends_branch = name.endswith(("out_proj", "fc2"))
                        nn.init.normal_(m.weight, std=std / residuals**0.5 if ends_branch else std)
            if not stage.innermost:
                nn.init.zeros_(stage.residual_proj.weight)
                nn.init.zeros_(stage.residual_proj.bias)

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        max_seqlen: int | None = None,
        max_chunks: list[int] | None = None,
    ) -> CausalLMOutput:
        """Next-byte logits.

        Args:
            input_ids: (B, L) int64, B sequences of equal length; or (T,) with
            cu_seqlens: (N+1,) int32 from 0 to T, packed documents that do not see each other.
            max_seqlen: upper bound on document length; spares a GPU the look.
            max_chunks: one budget for each stage with routing, outermost first: static shapes, no host sync.

        Returns:
            logits (B, L, vocab) or (T, vocab), and the Routing of every stage, outermost first.

        Raises:
            ValueError: input_ids is 2-D with cu_seqlens or 1-D without, or max_chunks has the wrong length.
        """
        if (input_ids.dim(), cu_seqlens is None) not in ((2, True), (1, False)):
            raise ValueError(
                "input_ids must be (B, L), or (T,) together with cu_seqlens; "
                f"got shape {tuple(input_ids.shape)} {'without' if cu_seqlens is None else 'with'} cu_seqlens"
            )
        if max_chunks is not None and len(max_chunks) != self.config.num_stages - 1:
            raise ValueError(f"max_chunks must have {self.config.num_stages - 1} entries, got {max_chunks}")
        flat = input_ids.reshape(-1)
        if cu_seqlens is None:
            B, L = input_ids.shape
            cu_seqlens = torch.arange(0, (B + 1) * L, L, dtype=torch.int32, device=flat.device) if L else None
            if cu_seqlens is None:
                cu_seqlens = torch.zeros(B + 1, dtype=torch.int32, device=flat.device)
            max_seqlen = L
        pack = Pack(cu_seqlens, flat.shape[0], max_seqlen)
        x, routing = self.backbone(self._embed(flat, pack), pack, max_chunks, input_ids=flat)
        return CausalLMOutput(self.lm_head(x).view(*input_ids.shape, -1), routing)

    def _embed(self, ids: Tensor, pack: Pack) -> Tensor:
        """(T,) -> (T, d_model)"""
        x = self.embeddings(ids)
        return x if self.ngrams is None else x + self.ngrams(recent_bytes(ids, pack, self.ngrams.longest))

    def current_config(self) -> HNetConfig:
        """The config with the logit biases as they are now."""
        biases = [s.logit_bias for s in self.stages() if not s.innermost]
        if all(b is None for b in biases):
            return self.config
        values = [0.0 if b is None else b.item() for b in biases]
        return replace(self.config, routing_cfg=replace(self.config.routing_cfg, logit_bias=values))

    def set_dropout(self, p: float) -> HNetForCausalLM:
        """Drop this share of every mixer's and MLP's output while training. Returns self."""
        for m in self.modules():
            if isinstance(m, Block):
                m.dropout = p
        return self

    # --- decoding -------------------------------------------------------------------------------------------------

    def allocate_cache(self, batch_size: int, max_length: int, graphs: bool | Graphs | None = None) -> HNetCache:
        """An empty cache of `batch_size` slots for sequences of up to `max_length` bytes.

        graphs: decode with CUDA graphs (`hnet.model.decode_graphs`). Default: where the model is on a GPU.
        """
        if graphs is None:
            graphs = self.embeddings.weight.is_cuda
        run = Graphs() if graphs is True else graphs
        spare = 1 if run and batch_size > EXACT else 0
        root = self.backbone.allocate_cache(batch_size + spare, max_length)
        recent = None
        if self.ngrams is not None:
            shape = (batch_size, self.ngrams.longest - 1)
            recent = torch.zeros(shape, dtype=torch.int64, device=self.embeddings.weight.device)
        fused = not run and self.embeddings.weight.device.type == "cpu"
        return HNetCache(root, batch_size, max_length, run or run_directly, recent, fused)

    @torch.inference_mode()
    def prefill(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        cache: HNetCache,
        slots: Tensor | Sequence[int] | None = None,
    ) -> CausalLMOutput:
        """Run packed prompts, each into a fresh slot of the cache (default: slots 0..N-1 in order).

        Args:
            input_ids: (T,) int64; cu_seqlens: (N+1,) int32, no prompt empty.
            slots: as in `step`.
        Returns:
            As `forward`, for all T positions.
        Raises:
            ValueError: an empty prompt, one longer than the cache, more prompts than slots, a slot that is not there
                or named twice.
        """
        cu = cu_seqlens.tolist()
        lengths = [b - a for a, b in zip(cu, cu[1:], strict=False)]
        if input_ids.dim() != 1 or not all(n > 0 for n in lengths) or cu[-1] != input_ids.shape[0]:
            raise ValueError("prefill takes packed prompts (T,) with cu_seqlens (N+1,) from 0 to T, none of them empty")
        if max(lengths, default=0) > cache.max_length:
            raise ValueError(f"a prompt of {max(lengths)} bytes does not fit a cache of {cache.max_length}")
        named = cache.checked(range(min(len(lengths), cache.size)) if slots is None else slots)
        if len(named) != len(lengths):
            raise ValueError(f"{len(lengths)} prompts need as many slots of the cache's {cache.size}")
        places = upload(named, input_ids.device)
        pack = Pack(cu_seqlens, input_ids.shape[0])
        x, routing = self.backbone(self._embed(input_ids, pack), pack, None, cache.root, places, input_ids)
        if self.ngrams is not None and cache.recent is not None:
            recent = recent_bytes(input_ids, pack, self.ngrams.longest)
            cache.recent[places] = recent[cu_seqlens[1:].long() - 1, 1:]
        for stage, ends in zip(cache.root.stages(), [cu_seqlens, *(r.cu_chunks for r in routing)], strict=True):
            stage.filled(named, places, ends.diff())
        return CausalLMOutput(self.lm_head(x), routing)

    @torch.inference_mode()
    def step(
        self, input_ids: Tensor, cache: HNetCache, slots: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Feed one byte to each slot. On a GPU the host waits for it once for each stage with routing that runs: for
        the outermost at every byte, for the next where that one begins a chunk.

        Args:
            input_ids: (n,) int64, on the device of the model; slots: distinct, in any order, integers or (n,) int64 on
                the CPU (on a GPU one more wait). Default: all, in order.
        Returns:
            logits (n, vocab), and for each stage with routing the (rows,) bool mask of boundaries, on the CPU; a
            stage's rows are those where the stage outside it fired.
        Raises:
            ValueError: a slot is full, named twice or not there, or input_ids does not match the slots.
        """
        named = cache.checked(slots)
        if input_ids.shape != (len(named),):
            raise ValueError(f"input_ids must be one byte a slot, shape ({len(named)},), got {tuple(input_ids.shape)}")
        if max(cache.root.seen[s] for s in named) >= cache.max_length:
            raise ValueError(f"a slot has reached the cache's max_length, {cache.max_length}")
        for stage in cache.root.stages() if cache.fused else ():
            stage.reserve(named)
        if (native := native_step.of(self, cache)) is not None:
            return native(input_ids, named)
        x = self.embeddings(input_ids)
        if self.ngrams is not None:
            x = x + self.ngrams(cache.recall(named, input_ids))
        x, masks = self.backbone.step(x, cache.root, named, input_ids, cache.run)
        return self.lm_head(x), masks

    # --- files ----------------------------------------------------------------------------------------------------

    @staticmethod
    def from_pretrained(
        path_or_repo: str | Path,
        config: HNetConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> HNetForCausalLM:
        """A model from a directory, a .safetensors or .pt file, or a Hugging Face repository.

        Args:
            path_or_repo: directory with config.json and model.safetensors (or one .pt); such a file; or "owner/name",
                fetched with huggingface_hub if that is installed.
            config: architecture. Default: config.json beside the weights, else `<stem>.json`, else the preset `<stem>`.
            dtype, device: as in HNetForCausalLM.

        Raises:
            FileNotFoundError: no such path, or no config to be found.
            ValueError: a damaged file; a missing, unknown or misshapen tensor (named).
        """
        weights = find_weights(path_or_repo)
        config = config or find_config(weights)
        state = read_weights(weights)
        model = HNetForCausalLM(config, dtype=dtype)
        load_state(model, state, str(weights))
        return model.to(device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors into `directory`."""
        save_pretrained(self, directory)
