"""hnet's cache in the place where transformers keeps keys and values."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import Cache

from hnet.errors import UserError
from hnet.model.cache import HNetCache as Slots
from hnet.model.causal_lm import HNetForCausalLM


class HNetCache(Cache):
    """State of a batch in `generate()`: one slot a row, filled by the first call, then a byte a row.

    Rows cannot be taken back, reordered or repeated: what a byte changed in the recurrent states of several stages is
    not kept. So beam search and assisted generation need use_cache=False.

    Args:
        max_length: bytes that a row may have.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__(layers=[])
        self.max_length = max_length
        self.slots: Slots | None = None
        self.model: HNetForCausalLM | None = None  # whose state the slots hold: one and the same for every step
        self.columns = 0  # of input_ids, padding too, that were seen

    def fill(self, model: HNetForCausalLM, ids: Tensor, cu_seqlens: Tensor) -> Any:
        """Prompts end to end; what `prefill` returns."""
        self.model, self.slots = model, model.allocate_cache(cu_seqlens.shape[0] - 1, self.max_length)
        return model.prefill(ids, cu_seqlens, self.slots)

    def feed(self, backbone: nn.Module, input_ids: Tensor) -> Tensor:
        """(B, n) more bytes -> logits (B, n, vocab); by the model that filled it, which has this backbone"""
        model, slots = self.model, self.slots
        if model is not None and model.backbone is not backbone:
            raise UserError("past_key_values were filled by another model")
        if model is None or slots is None or slots.size != input_ids.shape[0]:
            raise UserError(f"past_key_values holds {slots and slots.size} rows, input_ids has {input_ids.shape[0]}")
        needed = max(slots.root.seen) + input_ids.shape[1]
        if needed > self.max_length:
            raise UserError(
                f"past_key_values has room for {self.max_length} bytes a row, these need {needed}: to go on from a "
                f"cache, make it as large first, past_key_values=hnet.hf.HNetCache({needed}), or larger"
            )
        return torch.stack([model.step(column, slots)[0] for column in input_ids.unbind(1)], 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> HNetCache:
        """The state after a prompt, to be gone on from more than once."""
        made = HNetCache(self.max_length)
        made.model, made.columns = self.model, self.columns
        if self.slots is not None:
            native, self.slots.native = self.slots.native, None  # addresses, of a model too: found anew
            try:
                made.slots = copy.deepcopy(self.slots, memo)
            finally:
                self.slots.native = native
        return made

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    @property
    def is_compileable(self) -> bool:
        return False

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError("an H-Net's cache cannot take back, reorder or repeat rows: generate with use_cache=False")

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _refuse
