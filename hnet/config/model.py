"""The shape of an H-Net: the published JSON format, its presets, and its checks."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hnet.errors import UserError

from .keys import from_json

MIXERS = "mMtTcC"  # Mamba-2, attention, gated convolution; a capital is followed by a SwiGLU
MAMBA_HEADDIM = 64
HF_MODEL_TYPE = "hnet"  # in the config.json that transformers writes
BOS, EOS = 254, 255  # bytes that valid UTF-8 never holds
PRESET_DIR = Path(__file__).parent / "presets"


@dataclass
class SSMConfig:
    """Mamba-2. Each value is one number or a list with one for every stage, outermost first."""

    chunk_size: int | list[int] = 256
    d_conv: int | list[int] = 4
    d_state: int | list[int] = 128
    expand: int | list[int] = 2


@dataclass
class AttnConfig:
    """Attention, one value for every stage, outermost first. window_size w: oneself and w keys before; -1: all."""

    num_heads: list[int] = field(default_factory=list)
    rotary_emb_dim: list[int] = field(default_factory=list)
    window_size: list[int] = field(default_factory=list)


@dataclass
class ConvConfig:
    """Gated short convolution, an extension the published models do not use."""

    kernel_size: int | list[int] = 6


@dataclass
class RoutingConfig:
    """Where boundaries may fall and how often, an extension the published models do not use.

    boundaries: "any" position; "char-start" or "char-end", first or last byte of a UTF-8 character (outermost stage).
    logit_bias: added to the boundary logit of every stage with routing, outermost first; a rate controller finds it.
    """

    boundaries: str = "any"
    logit_bias: list[float] | None = None


@dataclass
class NgramConfig:
    """Embeddings of the last n bytes, added to a byte's own, an extension the published models do not use.

    sizes: the n, each from 2 to 8; none: no such embeddings. rows: the n-grams of a size are hashed into so many.
    """

    sizes: list[int] = field(default_factory=list)
    rows: int = 8192


BOUNDARIES = ("any", "char-start", "char-end")


@dataclass
class HNetConfig:
    """Architecture of an H-Net. Lists run outermost stage first.

    arch_layout: e.g. ["m4", ["T1m4", ["T26"], "m4T1"], "m4"]: encoder, inner stage, decoder; innermost has one entry.
    d_model: width of each stage, not decreasing inwards. d_intermediate: SwiGLU width of each stage (0: none used).
    """

    arch_layout: list
    d_model: list[int]
    d_intermediate: list[int]
    vocab_size: int = 256
    ssm_cfg: SSMConfig = field(default_factory=SSMConfig)
    attn_cfg: AttnConfig = field(default_factory=AttnConfig)
    tie_embeddings: bool = False
    conv_cfg: ConvConfig = field(default_factory=ConvConfig)
    routing_cfg: RoutingConfig = field(default_factory=RoutingConfig)
    ngram_cfg: NgramConfig = field(default_factory=NgramConfig)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_stages(self) -> int:
        """Stages including the innermost; routing happens at num_stages - 1 of them."""
        return len(self.d_model)

    def layouts(self, stage: int) -> list[str]:
        """[encoder, decoder] of a stage, or [main network] of the innermost."""
        level = self.arch_layout
        for _ in range(stage):
            level = level[1]
        return [level[0]] if len(level) == 1 else [level[0], level[2]]

    def ssm(self, stage: int) -> dict[str, int]:
        return {k: v[stage] if isinstance(v, list) else v for k, v in asdict(self.ssm_cfg).items()}

    def attention(self, stage: int) -> dict[str, int]:
        return {k: v[stage] for k, v in asdict(self.attn_cfg).items()}

    def conv_kernel(self, stage: int) -> int:
        k = self.conv_cfg.kernel_size
        return k[stage] if isinstance(k, list) else k

    def to_dict(self) -> dict[str, Any]:
        d = asdict(self)
        if not any("c" in m or "C" in m for s in range(self.num_stages) for m in self.layouts(s)):
            del d["conv_cfg"]  # keep the published format where it suffices
        if self.routing_cfg == RoutingConfig():
            del d["routing_cfg"]
        if not self.ngram_cfg.sizes:
            del d["ngram_cfg"]
        return d

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @staticmethod
    def from_dict(d: dict[str, Any]) -> HNetConfig:
        """A config from the published dictionary form, or that of `hnet.hf`, whose other keys are left aside.

        Raises:
            ValueError: an unknown or missing key, a layout that does not parse, lists of the wrong length.
        """
        if not isinstance(d, dict):
            raise UserError(f"config must be a JSON object, got {type(d).__name__}")
        d = dict(d)
        if d.get("model_type") == HF_MODEL_TYPE:
            d = {k: v for k, v in d.items() if k in HNetConfig.__dataclass_fields__ and v is not None}
        parts = {
            "ssm_cfg": SSMConfig, "attn_cfg": AttnConfig, "conv_cfg": ConvConfig, "routing_cfg": RoutingConfig,
            "ngram_cfg": NgramConfig,
        }  # fmt: skip
        for name, cls in parts.items():
            if name in d:
                d[name] = _build(cls, d[name], name)
        return _build(HNetConfig, d, "config")

    @staticmethod
    def from_json(path: str | Path) -> HNetConfig:
        return from_json(path, HNetConfig.from_dict)

    @staticmethod
    def presets() -> list[str]:
        return sorted(p.stem for p in PRESET_DIR.glob("*.json"))

    @staticmethod
    def preset(name: str) -> HNetConfig:
        """One of the published models (hnet_1stage_L, ...) or of our small ones (tiny, small, laptop, ...)."""
        if name not in HNetConfig.presets():
            raise UserError(f"unknown preset {name!r}; there are {', '.join(HNetConfig.presets())}")
        return HNetConfig.from_json(PRESET_DIR / f"{name}.json")


def parse_layout(layout: str) -> list[tuple[str, int]]:
    """ "T1m4" -> [("T", 1), ("m", 4)]"""
    if not isinstance(layout, str) or not re.fullmatch(rf"([{MIXERS}]\d+)+", layout):
        raise UserError(f"arch_layout: {layout!r} must be letters of {MIXERS} each followed by a count, like 'T1m4'")
    return [(letter, int(n)) for letter, n in re.findall(rf"([{MIXERS}])(\d+)", layout)]


def _build(cls, d: Any, where: str):
    if not isinstance(d, dict):
        raise UserError(f"{where} must be an object, got {type(d).__name__}")
    known = cls.__dataclass_fields__
    for key in d:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")
    try:
        return cls(**d)
    except TypeError as e:
        missing = re.findall(r"'(\w+)'", str(e))
        raise UserError(f"{where}: missing {', '.join(missing)}") from None


def _depth(layout: Any) -> int:
    if not isinstance(layout, list) or len(layout) not in (1, 3):
        raise UserError(f"arch_layout must nest as [encoder, [inner], decoder] or [main], got {layout!r}")
    if len(layout) == 1:
        parse_layout(layout[0])
        return 1
    parse_layout(layout[0])
    parse_layout(layout[2])
    return 1 + _depth(layout[1])


def _check_list(name: str, value: Any, stages: int, low: int) -> None:
    if not isinstance(value, list) or len(value) != stages:
        raise UserError(f"{name} must list one value for each of the {stages} stages of arch_layout, got {value!r}")
    for v in value:
        if not isinstance(v, int) or v < low:
            raise UserError(f"{name} must hold integers >= {low}, got {v!r}")


def _check(c: HNetConfig) -> None:
    stages = _depth(c.arch_layout)
    _check_list("d_model", c.d_model, stages, 1)
    _check_list("d_intermediate", c.d_intermediate, stages, 0)
    if not isinstance(c.vocab_size, int) or c.vocab_size < 1:
        raise UserError(f"vocab_size must be an integer >= 1, got {c.vocab_size!r}")
    for a, b in zip(c.d_model, c.d_model[1:], strict=False):
        if b < a:
            raise UserError(f"d_model must not decrease inwards, got {c.d_model}")
    r = c.routing_cfg
    if r.boundaries not in BOUNDARIES:
        raise UserError(f"routing_cfg.boundaries must be one of {', '.join(BOUNDARIES)}, got {r.boundaries!r}")
    if r.logit_bias is not None and (
        not isinstance(r.logit_bias, list)
        or len(r.logit_bias) != stages - 1
        or not all(isinstance(b, int | float) for b in r.logit_bias)
    ):
        raise UserError(
            f"routing_cfg.logit_bias must list one number for each of the {stages - 1} stages with routing, "
            f"got {r.logit_bias!r}"
        )
    g = c.ngram_cfg
    distinct = isinstance(g.sizes, list) and all(type(n) is int and 2 <= n <= 8 for n in g.sizes)
    if not distinct or len(set(g.sizes)) < len(g.sizes):
        raise UserError(f"ngram_cfg.sizes must list integers from 2 to 8, each once, got {g.sizes!r}")
    if type(g.rows) is not int or g.rows < 1:
        raise UserError(f"ngram_cfg.rows must be an integer >= 1, got {g.rows!r}")
    letters = {s: "".join(m for layout in c.layouts(s) for m, _ in parse_layout(layout)) for s in range(stages)}
    if any("t" in m.lower() for m in letters.values()):
        for name, low in (("num_heads", 1), ("rotary_emb_dim", 0), ("window_size", -1)):
            _check_list(f"attn_cfg.{name}", getattr(c.attn_cfg, name), stages, low)
    for name, value in [*asdict(c.ssm_cfg).items(), *asdict(c.conv_cfg).items()]:
        _check_list(name, value if isinstance(value, list) else [value] * stages, stages, 1)
    for s, m in letters.items():
        d = c.d_model[s]
        if "t" in m.lower():
            heads, rotary = c.attn_cfg.num_heads[s], c.attn_cfg.rotary_emb_dim[s]
            if d % heads:
                raise UserError(f"attn_cfg.num_heads: {heads} heads do not divide d_model {d} of stage {s}")
            if rotary % 2 or rotary > d // heads:
                raise UserError(
                    f"attn_cfg.rotary_emb_dim must be even and at most {d // heads} in stage {s}, got {rotary}"
                )
        if "m" in m.lower() and (d * c.ssm(s)["expand"]) % MAMBA_HEADDIM:
            raise UserError(
                f"d_model {d} x expand {c.ssm(s)['expand']} of stage {s} must be a multiple of {MAMBA_HEADDIM}"
            )
        if any(x.isupper() for x in m) and c.d_intermediate[s] == 0:
            raise UserError(f"d_intermediate of stage {s} is 0 but its layout has SwiGLU blocks ({m})")
