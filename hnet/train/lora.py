"""`lora_rank`: low-rank adapters (LoRA, arXiv 2106.09685) on linear maps, through peft (extra `lora`).

A map becomes W x + (alpha / rank) B A x; A and B train, W does not, and B starts at zero. A checkpoint's weights are
merged, W + (alpha / rank) B A, so that everything that reads checkpoints reads these; what a run goes on from is beside
them:

    checkpoints/step_*/lora/  adapter_config.json  adapter_model.safetensors    as peft writes them
                              base.safetensors                                 the W of what has adapters, to the bit
"""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hnet.errors import UserError
from hnet.model.checkpoint_format import read_weights, save_pretrained

from .config import TrainConfig
from .freeze import matches, names_of

FOLDER, ADAPTERS, BASE = "lora", "adapter_model.safetensors", "base.safetensors"
NAME = "default"  # of the adapter, in peft
ROOT = "base_model.model."  # what peft puts before names in its files
BLOCKS = "*.layers.*"  # the default: linear maps of blocks


def adapt(model: Any, config: TrainConfig) -> str:
    """Adapters into the model, in place; nothing else trains but what `lora_full` names. Returns that in words.

    Raises:
        UserError: peft is missing; lora_targets or lora_full names nothing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("lora_rank needs peft: pip install 'hnet-kernels[lora]' (Python 3.11 or newer)") from None

    full = [n for n, p in model.named_parameters() if any(matches(f, n) for f in _known(model, config.lora_full))]
    chosen = [n for n in targets(model, config.lora_targets) if n + ".weight" not in full]
    if not chosen:
        raise UserError(f"lora_targets must leave a linear map to adapt, got {config.lora_targets} and lora_full")
    alpha: Any = config.lora_alpha or 2 * config.lora_rank  # peft's hint says int, its code takes any number
    settings = LoraConfig(
        r=config.lora_rank, lora_alpha=alpha, lora_dropout=config.lora_dropout, target_modules=chosen,
        task_type="CAUSAL_LM", base_model_name_or_path=config.init_from,
    )  # fmt: skip
    inject_adapter_in_model(settings, model)
    layers = [m for m in model.modules() if isinstance(m, nn.Module) and hasattr(m, "base_layer")]
    assert len(layers) == len(chosen), "peft has another notion of a name"
    wanted = {n: p for n, p in model.named_parameters() if _plain(n) in full}
    for p in wanted.values():
        p.requires_grad_(True)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n)
    beside = f" and {sum(p.numel() for p in wanted.values()):,} whole parameters" if wanted else ""
    return (
        f"{count:,} numbers train beside {total:,}: adapters of rank {config.lora_rank} on {len(chosen)} maps{beside}"
    )


def targets(model: Any, patterns: list[str]) -> list[str]:
    """Names of the linear maps that `patterns` name: by their own last name (in_proj), or as `freeze` names parts and
    modules. Default: all of blocks.

    Raises:
        UserError: a pattern that names none, or a head that is tied to the embeddings.
    """
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]

    def fits(pattern: str, name: str) -> bool:
        return fnmatchcase(name.rpartition(".")[2], pattern) or matches(pattern, name + ".weight")

    for pattern in patterns:
        if not any(fits(pattern, name) for name in linears):
            known = dict.fromkeys(n.rpartition(".")[2] for n in linears)
            known |= dict.fromkeys(n for name in linears for n in names_of(name + ".weight"))
            raise UserError(f"lora_targets must name linear maps, got {pattern!r}; known are {', '.join(known)}")
    chosen = [name for name in linears if any(fits(p, name) for p in patterns or [BLOCKS])]
    if "lm_head" in chosen and model.config.tie_embeddings:
        raise UserError(f"lora_targets must leave out lm_head, which is tied to the embeddings here, got {patterns}")
    return chosen


def _known(model: nn.Module, patterns: list[str]) -> list[str]:
    names = [n for n, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(matches(pattern, n) for n in names):
            known = ", ".join(dict.fromkeys(n for name in names for n in names_of(name)))
            raise UserError(f"lora_full must name parts of this model, got {pattern!r}; known are {known}")
    return patterns


def adapted(model: nn.Module) -> bool:
    return any(".lora_" in n for n, _ in model.named_parameters())


@torch.no_grad()
def merged(model: nn.Module) -> dict[str, Tensor]:
    """Weights by the names of a model without adapters, with these in them."""
    state = {_plain(k): v for k, v in model.state_dict().items() if ".lora_" not in k}
    for name, m in model.named_modules():
        if hasattr(m, "base_layer"):
            layer: Any = m
            state[name + ".weight"] = state[name + ".weight"] + layer.get_delta_weight(NAME)
    return state


def save(model: Any, folder: Path) -> None:
    """config.json and merged model.safetensors, and lora/ beside them."""
    from safetensors.torch import save_file

    save_pretrained(model, folder, merged(model))
    beside, state = folder / FOLDER, model.state_dict()
    model.peft_config[NAME].save_pretrained(str(beside))  # makes the folder
    adapters = {ROOT + k.replace(f".{NAME}.", "."): v.contiguous() for k, v in state.items() if ".lora_" in k}
    save_file(adapters, str(beside / ADAPTERS), metadata={"format": "pt"})
    base = {_plain(k): v.contiguous() for k, v in state.items() if k.endswith(".base_layer.weight")}
    save_file(base, str(beside / BASE))


def start_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`, of a model without adapters, by the names this one has, with its adapters as they are."""
    own = model.state_dict()
    names = {_plain(k): k for k in own if ".lora_" not in k}
    return {names.get(k, k): v for k, v in state.items()} | {k: v for k, v in own.items() if ".lora_" in k}


def resumed_state(model: Any, state: dict[str, Tensor], checkpoint: Path) -> dict[str, Tensor]:
    """As `start_state`, with base weights and adapters as they were when `checkpoint` was saved, whose `state` it is.

    Raises:
        UserError: it has no adapters, or others.
    """
    where = checkpoint / FOLDER
    if not where.is_dir():
        raise UserError(f"lora_rank must be 0 as in the run that goes on, which has no adapters: {checkpoint}")
    read = read_weights(where / ADAPTERS).items()
    adapters = {k.removeprefix(ROOT).replace(".weight", f".{NAME}.weight"): v for k, v in read}
    own = {k: v for k, v in model.state_dict().items() if ".lora_" in k}
    there = json.loads((where / "adapter_config.json").read_text())
    same = adapters.keys() == own.keys() and all(adapters[k].shape == v.shape for k, v in own.items())
    if not same or there["lora_alpha"] != model.peft_config[NAME].lora_alpha:
        raise UserError(
            f"lora_rank, lora_alpha, lora_targets and lora_full must be those of the run that goes on ({checkpoint}); "
            "to change them start anew, with init_from"
        )
    return start_state(model, {**state, **read_weights(where / BASE)}) | adapters


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")
