"""Configuration: the shape of an H-Net (`model`, `architecture`), the keys of a run (`keys`, `run`)."""

from .model import (
    BOS,
    BOUNDARIES,
    EOS,
    MAMBA_HEADDIM,
    MIXERS,
    AttnConfig,
    ConvConfig,
    HNetConfig,
    NgramConfig,
    RoutingConfig,
    SSMConfig,
    parse_layout,
)  # fmt: skip

__all__ = [
    "BOS", "BOUNDARIES", "EOS", "MAMBA_HEADDIM", "MIXERS", "AttnConfig", "ConvConfig", "HNetConfig", "NgramConfig",
    "RoutingConfig", "SSMConfig", "parse_layout",
]  # fmt: skip
