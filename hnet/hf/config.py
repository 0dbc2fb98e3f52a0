"""The shape of an H-Net and what its loss weighs, as a transformers configuration."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hnet import config as hnet_config
from hnet.config import BOS, EOS
from hnet.config.model import HF_MODEL_TYPE
from hnet.errors import UserError

PAD = 253  # no byte of UTF-8 either, so that labels made of ids can leave out padding and keep EOS
DEFAULT = "hnet_1stage_L"


@strict
class HNetConfig(PreTrainedConfig):
    """Keys of the published `config.json` (see `hnet.HNetConfig`), and of training with `labels`:

    compression: bytes (chunks) per chunk that the ratio loss of each stage with routing aims at, outermost first.
    ratio_weight: of each ratio loss.

    Without arch_layout, d_model and d_intermediate: those of hnet_1stage_L.

    Raises:
        ValueError: as hnet.HNetConfig.from_dict; compression is not one number > 1 a stage with routing; a negative
            ratio_weight.
    """

    model_type = HF_MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values", "ce", "ratio_loss", "routing"]  # noqa: RUF012
    attribute_map = {"tie_word_embeddings": "tie_embeddings"}  # noqa: RUF012

    arch_layout: list | None = None
    d_model: list[int] | None = None
    d_intermediate: list[int] | None = None
    vocab_size: int = 256
    ssm_cfg: dict | None = None
    attn_cfg: dict | None = None
    conv_cfg: dict | None = None
    routing_cfg: dict | None = None
    ngram_cfg: dict | None = None
    tie_embeddings: bool = False

    compression: list[float] | list[int] | None = None
    ratio_weight: float | int = 0.03

    bos_token_id: int | None = BOS
    eos_token_id: int | list[int] | None = EOS
    pad_token_id: int | None = PAD
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.arch_layout is None and self.d_model is None and self.d_intermediate is None:
            self._take(hnet_config.HNetConfig.preset(DEFAULT))
        native = self.native()
        self._take(native)
        if self.compression is None:
            self.compression = [6.0] if native.num_stages == 2 else [3.0] * (native.num_stages - 1)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """
        Raises:
            ValueError: see the class.
        """
        routed, wanted = self.native().num_stages - 1, self.compression or []
        if len(wanted) != routed or not all(n > 1 for n in wanted):
            raise UserError(f"compression must list a number > 1 for each of {routed} stages, got {wanted}")
        if not self.ratio_weight >= 0:
            raise UserError(f"ratio_weight must be >= 0, got {self.ratio_weight}")

    def native(self) -> hnet_config.HNetConfig:
        """The architecture alone, as hnet has it."""
        names = hnet_config.HNetConfig.__dataclass_fields__
        given = {name: getattr(self, name) for name in names}
        return hnet_config.HNetConfig.from_dict({k: v for k, v in given.items() if v is not None})

    @staticmethod
    def from_native(config: hnet_config.HNetConfig, **more: Any) -> HNetConfig:
        """`more`: other keys, such as compression."""
        return HNetConfig(**config.to_dict(), **more)

    def _take(self, config: hnet_config.HNetConfig) -> None:
        for name, value in config.to_dict().items():
            setattr(self, name, value)

    @property
    def hidden_size(self) -> int:
        """Width of the outermost stage, which embeddings and head have."""
        return self.native().d_model[0]

    @property
    def num_hidden_layers(self) -> int:
        """Layers of all stages."""
        c = self.native()
        layouts = [layout for s in range(c.num_stages) for layout in c.layouts(s)]
        return sum(n for layout in layouts for _, n in hnet_config.parse_layout(layout))

    def to_diff_dict(self) -> dict[str, Any]:
        """The whole architecture besides: what reads it may have other defaults."""
        given = {k: v for k, v in super().to_diff_dict().items() if v is not None}
        return {**given, **self.native().to_dict(), "model_type": self.model_type}
