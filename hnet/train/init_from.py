"""`init_from`: a run that starts from weights that are there, with a fresh optimiser and schedule.

The network is that of the weights. Keys that name one (preset, model_config, arch) may say the same again, with other
attention windows; n-gram embeddings may be added to a network without (their table starts at zero, so that the model
is at first what it was), and `boundaries` may change.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hnet.config import HNetConfig, RoutingConfig, parse_layout
from hnet.config.keys import parse_toml, read_json
from hnet.errors import MissingPath, UserError, user_path
from hnet.model.causal_lm import HNetForCausalLM
from hnet.model.checkpoint_format import CONFIG, WEIGHTS, find_config, find_weights, read_weights

from .checkpoint import EMA, latest_checkpoint, list_checkpoints

NGRAMS = "ngrams.weight"


def weights_file(init_from: str) -> Path:
    """The file that `init_from` names: itself; that of a model directory, of a checkpoint, of a run's latest
    checkpoint, or of a Hugging Face repository.

    Raises:
        MissingPath: there is none.
        UserError: it is a ChunkLM's.
    """
    place = Path(init_from)
    try:
        with user_path(init_from):
            root = place / "checkpoints"
            file = find_weights(latest_checkpoint(root) if root.is_dir() else init_from)
    except MissingPath as e:
        raise MissingPath(f"init_from: {e}") from None
    beside = file.with_name(CONFIG)
    about = read_json(beside) if beside.is_file() else None
    if isinstance(about, dict) and about.get("model_type") == "chunk_lm":
        raise UserError(f"init_from must be an H-Net's weights, got a ChunkLM's: {file}")
    return file


def architecture(init_from: str, out: Path, given: HNetConfig | None) -> HNetConfig | None:
    """That of the weights; of a run in `out` that started from them, and needs them no more, its own. None for a lone
    file, of which nothing says it but `given`: its shapes are compared on loading.

    Raises:
        MissingPath: there are no weights, or nothing says their architecture.
        UserError: they are a ChunkLM's.
    """
    run, own = out / "config.toml", list_checkpoints(out / "checkpoints")
    if own and run.is_file() and parse_toml(run).get("init_from") == init_from:
        return find_config(own[-1] / WEIGHTS)
    file = weights_file(init_from)
    try:
        return find_config(file)
    except MissingPath:
        if given is not None:
            return None
        raise MissingPath(
            f"init_from: nothing says the architecture of {file}: put {CONFIG} or {file.stem}.json beside it, or give "
            "preset, model_config or arch"
        ) from None


def agree(wanted: HNetConfig, found: HNetConfig, init_from: str) -> HNetConfig:
    """`wanted`, which weights of `found` can be loaded into, with the logit biases (and unless it has others the
    n-grams and boundaries) that these were trained with.

    Raises:
        UserError: they differ where they must not; names both.
    """
    if not wanted.ngram_cfg.sizes:
        wanted = dataclasses.replace(wanted, ngram_cfg=found.ngram_cfg)
    said, there = _shape(wanted), _shape(found)
    for name, value in said.items():
        new = name == "ngrams" and not found.ngram_cfg.sizes
        if value != there[name] and not new:
            raise UserError(f"{name} must be that of init_from, {there[name]}, got {value} ({init_from})")
    routing = RoutingConfig(
        wanted.routing_cfg.boundaries if wanted.routing_cfg.boundaries != "any" else found.routing_cfg.boundaries,
        wanted.routing_cfg.logit_bias or found.routing_cfg.logit_bias,
    )
    return dataclasses.replace(wanted, routing_cfg=routing)


def _shape(c: HNetConfig) -> dict[str, Any]:
    """What decides the shapes of weights, or how they were meant, by the key to name: first what a reader looks at
    first."""
    stages = range(c.num_stages)
    letters = ["".join(m for layout in c.layouts(s) for m, _ in parse_layout(layout)) for s in stages]

    def where(mixers: str, value: list[Any]) -> list[Any]:
        """None for the stages without these letters, where the value means nothing."""
        return [v if set(mixers) & set(m) else None for v, m in zip(value, letters, strict=True)]

    shape: dict[str, Any] = {
        "vocab_size": c.vocab_size, "arch_layout": c.arch_layout, "d_model": c.d_model,
        "d_intermediate": where("MTC", c.d_intermediate), "tie_embeddings": c.tie_embeddings,
        "ngrams": (c.ngram_cfg.sizes, c.ngram_cfg.rows),
    }  # fmt: skip
    for name in ("d_conv", "d_state", "expand"):
        shape[f"ssm_cfg.{name}"] = where("mM", [c.ssm(s)[name] for s in stages])
    for name in ("num_heads", "rotary_emb_dim"):
        shape[f"attn_cfg.{name}"] = where("tT", getattr(c.attn_cfg, name) or [None] * c.num_stages)
    shape["conv_cfg.kernel_size"] = where("cC", [c.conv_kernel(s) for s in stages])
    return shape


def start_weights(init_from: str, model: HNetForCausalLM) -> tuple[dict[str, Tensor], str]:
    """Tensors by name, and what they are in words. Of a folder with the average that weight_ema keeps: the average; to
    have the weights beside it, name model.safetensors itself.

    Raises:
        UserError: a damaged file, or an average that does not belong to the weights.
    """
    file = weights_file(init_from)
    state, what = read_weights(file), f"the weights {file}"
    average = file.with_name(EMA)
    if Path(init_from) != file and average.is_file():
        ema = read_weights(average)
        if any(k not in state or state[k].shape != v.shape for k, v in ema.items()):
            raise UserError(f"init_from: {average} does not hold the parameters of {file.name} beside it")
        state, what = {**state, **ema}, f"the average of the weights, {average} (for the last weights name {file})"
    if model.ngrams is not None and NGRAMS not in state:
        state[NGRAMS] = torch.zeros(model.ngrams.weight.shape)
        what += "; its n-gram embeddings are new"
    return state, what
