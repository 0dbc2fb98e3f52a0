"""An H-Net as a `PreTrainedModel`: the same parameters under the same names as `hnet.HNetForCausalLM`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMode
from transformers.utils import ModelOutput

import hnet_kernels as hk
from hnet.config import BOS
from hnet.errors import UserError, user_path
from hnet.model import causal_lm
from hnet.model.hnet import HNet
from hnet.model.ngrams import NgramEmbeddings
from hnet.train.checkpoint import latest_checkpoint

from .cache import HNetCache
from .config import HNetConfig

IGNORE = -100


@dataclass
class HNetOutput(ModelOutput):
    """loss (): ce + ratio_weight x ratio_loss, with labels.  ce (): nats a label.  ratio_loss (): sum over stages.
    logits (B, L, vocab), 0 where attention_mask is.  routing: of the packed batch, outermost stage first."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: HNetCache | None = None
    ce: Tensor | None = None
    ratio_loss: Tensor | None = None
    routing: list[hk.Routing] | None = None


class HNetForCausalLM(PreTrainedModel, GenerationMixin):
    """`hnet.HNetForCausalLM` for transformers: `from_pretrained` reads what `save_pretrained` or `hnet export` wrote;
    `from_checkpoint` everything that hnet's commands read."""

    config_class = HNetConfig
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm_head.weight": "embeddings.weight"}  # noqa: RUF012
    _keep_in_fp32_modules_strict = {"residual_proj"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True
    _fresh: list[dict[str, Tensor]]  # weights to begin with, while some are missing

    def __init__(self, config: HNetConfig, native: causal_lm.HNetForCausalLM | None = None) -> None:
        super().__init__(config)
        if native is None:
            native = causal_lm.HNetForCausalLM(config.native(), dtype=torch.get_default_dtype())
        self.embeddings, self.ngrams, self.backbone = native.embeddings, native.ngrams, native.backbone
        self.lm_head = native.lm_head
        for x in [*self.parameters(), *self.buffers()]:
            if not x.is_meta:
                x._is_hf_initialized = True  # type: ignore[attr-defined]
        self.post_init()
        self.generation_config.suppress_tokens = [BOS]  # it only ever begins a text

    @property
    def native(self) -> causal_lm.HNetForCausalLM:
        """hnet's own model around these very modules, made anew each time: for everything in hnet."""
        model = causal_lm.HNetForCausalLM.__new__(causal_lm.HNetForCausalLM)
        nn.Module.__init__(model)
        model.config, model.training = self.config.native(), self.training
        model.embeddings, model.ngrams, model.backbone = self.embeddings, self.ngrams, self.backbone
        model.lm_head = self.lm_head
        return model

    @staticmethod
    def from_native(model: causal_lm.HNetForCausalLM, **config: Any) -> HNetForCausalLM:
        """Around the modules of `model`, which shares them. `config`: keys of HNetConfig, such as compression."""
        made = HNetForCausalLM(HNetConfig.from_native(model.current_config(), **config), model).train(model.training)
        made.config.dtype = model.embeddings.weight.dtype
        return made

    @staticmethod
    def from_checkpoint(
        path_or_repo: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None,
        **config: Any,
    ) -> HNetForCausalLM:  # fmt: skip
        """A model of hnet's: a run folder (its latest checkpoint), a checkpoint, a published .pt, a repository.

        Args:
            dtype, device: as `hnet.HNetForCausalLM.from_pretrained`, which reads it.
            config: keys of HNetConfig, such as compression.
        """
        root = Path(path_or_repo) / "checkpoints"
        with user_path(path_or_repo):
            where = latest_checkpoint(root) if root.is_dir() else path_or_repo
        read = causal_lm.HNetForCausalLM.from_pretrained
        return HNetForCausalLM.from_native(read(where, dtype=dtype, device=device).eval(), **config)

    # --- what transformers asks for -----------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError("an H-Net's ids are bytes: its embeddings cannot be resized")

    def initialize_weights(self) -> None:
        self._fresh = []
        super().initialize_weights()
        del self._fresh

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What a file did not have, one module at a time: buffers that are never saved, and missing weights."""
        config = self.config.native()
        if isinstance(module, NgramEmbeddings):
            made = NgramEmbeddings(config.ngram_cfg, config.vocab_size, 1)
            init.copy_(module.powers, made.powers)
            init.copy_(module.first, made.first)
        if isinstance(module, HNet) and not module.innermost and module.logit_bias is not None:
            assert config.routing_cfg.logit_bias is not None
            init.constant_(module.logit_bias, config.routing_cfg.logit_bias[module.stage])
        missing = [n for n, p in module.named_parameters(recurse=False) if not getattr(p, "_is_hf_initialized", False)]
        if not missing:
            return
        if not self._fresh:
            self._fresh = [causal_lm.HNetForCausalLM(config).state_dict()]
        prefix = next(name for name, m in self.named_modules() if m is module)
        for name in missing:
            init.copy_(getattr(module, name), self._fresh[0][f"{prefix}.{name}"])

    # --- running ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: HNetCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> HNetOutput | tuple:
        """Next-byte logits of a padded batch; inside, it is packed: no row sees padding, or another row.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L); positions where it is 0 (on the left or right) are no text.
            labels: (B, L) int64, shifted inside: position t predicts labels[t + 1]; -100 is not asked for.
            past_key_values: decode with this cache; without one, nothing is remembered.
            logits_to_keep: of how many last positions, or of which, logits are returned; 0: all.
            num_items_in_batch: labels of all micro-batches of a step together, over which loss is the mean; the Trainer
                gives it.
            shift_labels: (B, L) int64, instead of labels: position t predicts shift_labels[t]. (Among the keywords: the
                Trainer takes every argument named so for one that all data have.)
            use_cache, other keywords: not looked at.

        Raises:
            ValueError: no input_ids, inputs_embeds, a mask of another shape, labels with a cache, padding on the right
                with a cache, a cache that is full.
        """
        if input_ids is None or input_ids.dim() != 2 or kwargs.get("inputs_embeds") is not None:
            raise UserError("an H-Net reads bytes: input_ids must be (B, L) and inputs_embeds left out")
        shift_labels = kwargs.get("shift_labels")
        if past_key_values is not None:
            if labels is not None or shift_labels is not None:
                raise UserError("labels must be left out where past_key_values is given")
            logits = self._decode(input_ids, attention_mask, past_key_values)
            result = HNetOutput(logits=_keep(logits, logits_to_keep), past_key_values=past_key_values)
            return result if self._as_dict(return_dict) else result.to_tuple()

        there = _present(input_ids, attention_mask)
        ids, cu_seqlens = _pack(input_ids, there)
        out = self.native(ids, cu_seqlens=cu_seqlens)
        logits = _unpack(out.logits, there, input_ids.shape)
        result = HNetOutput(logits=_keep(logits, logits_to_keep), routing=out.routing)
        targets = None if shift_labels is None else _packed(shift_labels, there)
        if targets is None and labels is not None:
            targets = _targets(labels, there)
        if targets is not None:
            result.ce, result.ratio_loss, result.loss = self._losses(out, targets, num_items_in_batch)
        return result if self._as_dict(return_dict) else result.to_tuple()

    def _as_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)

    def _losses(
        self, out: causal_lm.CausalLMOutput, targets: Tensor, items: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropy, ratio loss, and what is to be minimised."""
        asked = (targets != IGNORE).sum()
        nats = F.cross_entropy(out.logits.float(), targets, ignore_index=IGNORE, reduction="sum")
        ce = nats / asked.clamp(min=1)
        ratios = [hk.ratio_loss(r, n) for r, n in zip(out.routing, self.config.compression, strict=True)]
        ratio = sum(ratios, start=ce.new_zeros(()))
        loss = ce + self.config.ratio_weight * ratio
        # micro-batches are added up: each counts as much as it has labels
        return ce.detach(), ratio.detach(), loss if items is None else loss * (asked / items)

    def _decode(self, input_ids: Tensor, mask: Tensor | None, cache: HNetCache) -> Tensor:
        if cache.columns:
            logits = cache.feed(self.backbone, input_ids)
        else:
            there = _present(input_ids, mask)
            if there is not None and not there[:, -1].all():
                raise UserError("rows must end with text where there is a cache: pad on the left (padding_side='left')")
            ids, cu_seqlens = _pack(input_ids, there)
            logits = _unpack(cache.fill(self.native, ids, cu_seqlens).logits, there, input_ids.shape)
        cache.columns += input_ids.shape[1]
        return logits

    # --- generate() ---------------------------------------------------------------------------------------------------

    def _validate_generation_mode(self, generation_mode: Any, generation_config: Any, *rest: Any) -> None:
        plain = generation_mode in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)
        beams = generation_mode in (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
        if not plain and not (beams and generation_config.use_cache is False):
            raise UserError(
                "generate() of an H-Net samples or is greedy; beam search needs use_cache=False, since the cache "
                f"cannot take rows back; {generation_mode} is not offered otherwise"
            )
        if generation_config.output_hidden_states or generation_config.output_attentions:
            raise UserError("an H-Net has no hidden states or attentions to return: its stages differ in length")
        if generation_config.guidance_scale not in (None, 1):
            raise UserError(f"guidance_scale must be left out, got {generation_config.guidance_scale:g}: not offered")
        GenerationMixin._validate_generation_mode(cast(Any, self), generation_mode, generation_config, *rest)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return
        if generation_config.cache_implementation is not None:
            raise UserError(f"cache_implementation must be left out, got {generation_config.cache_implementation}")
        model_kwargs["past_key_values"] = HNetCache(max_cache_length + 1)


# --- padded batches and packs ----------------------------------------------------------------------------------------


def _present(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """(B, L) bool: what is text; None: everything."""
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    return attention_mask != 0


def _pack(input_ids: Tensor, there: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, L) -> (T,), cu_seqlens (B + 1,)"""
    B, L = input_ids.shape
    if there is None:
        lengths = torch.full((B,), L, device=input_ids.device)
        ids = input_ids.reshape(-1)
    else:
        lengths, ids = there.sum(1), input_ids[there]
    return ids, F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _unpack(rows: Tensor, there: Tensor | None, shape: torch.Size) -> Tensor:
    """(T, vocab) -> (B, L, vocab), 0 for padding"""
    if there is None:
        return rows.view(*shape, -1)
    padded = rows.new_zeros(*shape, rows.shape[-1])
    padded[there] = rows
    return padded


def _targets(labels: Tensor, there: Tensor | None) -> Tensor:
    """(B, L) -> (T,): the label after each position of the pack, if that is text"""
    after = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    return _packed(after if there is None else after.masked_fill(~F.pad(there[:, 1:], (0, 1)), IGNORE), there)


def _packed(values: Tensor, there: Tensor | None) -> Tensor:
    """(B, L) -> (T,)"""
    return values.reshape(-1) if there is None else values[there]


def _keep(logits: Tensor, which: int | Tensor) -> Tensor:
    if isinstance(which, int):
        return logits[:, -which:] if which else logits
    return logits[:, which]
