"""Bytes as tokens: id and byte are the same number."""

from __future__ import annotations

from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

from hnet.config import BOS, EOS

from .config import PAD

SPECIAL = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}


class HNetTokenizer(PreTrainedTokenizer):
    """256 ids: bytes, with BOS 254, EOS 255 and padding 253, which valid UTF-8 never holds. Text begins with BOS;
    padding is on the left. There is no file of a vocabulary.

    Text is only bytes: "<|eos|>" in it is seven of them (`split_special_tokens`). Decoding never cuts a character:
    bytes that are no UTF-8, also the first ones of a character that is not whole, become U+FFFD.

    Args:
        prepend_bos, append_eos: what encoding puts around a text.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    vocab_files_names: dict[str, str] = {}  # noqa: RUF012
    padding_side = "left"

    def __init__(self, prepend_bos: bool = True, append_eos: bool = False, **kwargs: Any) -> None:
        names = {name: f"<|{name.removesuffix('_token')}|>" for name in SPECIAL}
        kwargs = {**names, "split_special_tokens": True, "clean_up_tokenization_spaces": False, **kwargs}
        tokens = {name: AddedToken(str(kwargs[name]), special=True, normalized=False) for name in SPECIAL}
        self._added_tokens_decoder = {SPECIAL[name]: token for name, token in tokens.items()}
        self.prepend_bos, self.append_eos = prepend_bos, append_eos
        super().__init__(prepend_bos=prepend_bos, append_eos=append_eos, **{**kwargs, **tokens})

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {self.convert_ids_to_tokens(i): i for i in range(256)}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [chr(b) for b in text.encode("utf-8", "surrogateescape")]

    def _convert_token_to_id(self, token: str) -> int | None:
        return ord(token) if len(token) == 1 and ord(token) < 256 else None

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return b"".join(t.encode("latin-1" if len(t) == 1 else "utf-8") for t in tokens).decode(errors="replace")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        bos, eos = [BOS] * self.prepend_bos, [EOS] * self.append_eos
        return [*bos, *token_ids_0, *(token_ids_1 or []), *eos]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        ids = (
            token_ids_0
            if already_has_special_tokens
            else self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        )
        return [int(i in SPECIAL.values()) for i in ids]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()
