"""The MODEL argument of the commands: a run directory, a checkpoint, a weights file; of an H-Net or a ChunkLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hnet.chunk_lm import ChunkLM
from hnet.chunk_lm.config import MODEL_TYPE
from hnet.config.keys import read_json
from hnet.errors import MissingPath, UserError, user_path
from hnet.model.causal_lm import HNetForCausalLM
from hnet.model.checkpoint_format import CONFIG, read_weights
from hnet.model.int8 import quantize
from hnet.train.checkpoint import EMA, latest_checkpoint


def checkpoint_of(model: str) -> str:
    """The latest checkpoint of a run directory; anything else as it is."""
    root = Path(model) / "checkpoints"
    with user_path(model):
        return str(latest_checkpoint(root)) if root.is_dir() else model


def is_chunk_lm(path: str) -> bool:
    """By its config.json; a lone .pt file by what is in it."""
    file = (Path(path) if Path(path).is_dir() else Path(path).parent) / CONFIG
    if file.is_file():
        config = read_json(file)
        return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE
    if Path(path).suffix == ".pt" and Path(path).is_file():
        try:
            saved = torch.load(path, map_location="meta", weights_only=True)
        except Exception:  # a published pickle; whatever is wrong, the H-Net's reader says it better
            return False
        config = saved.get("config") if isinstance(saved, dict) else None
        return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE
    return False


def load(model: str, device: torch.device, dtype: str = "fp32") -> HNetForCausalLM | ChunkLM:
    """The model, whichever it is, in evaluation mode, with weights of `dtype`: fp32, bf16, int8 (an H-Net's projections
    on a CPU) or auto, which is bf16 on a GPU and fp32 on a CPU (a byte at a time, casting every weight anew as
    autocast does would cost more than it saves).

    Raises:
        UserError: int8 for a ChunkLM or on a GPU.
    """
    path = checkpoint_of(model)
    if dtype == "int8" and (device.type != "cpu" or is_chunk_lm(path)):
        raise UserError("--dtype int8 is for an H-Net on a CPU")
    lm: Any = (ChunkLM if is_chunk_lm(path) else HNetForCausalLM).from_pretrained(path, device=device).eval()
    if dtype == "bf16" or (dtype == "auto" and device.type == "cuda"):
        getattr(lm, "cast", lm.to)(torch.bfloat16)
    return quantize(lm) if dtype == "int8" else lm


def load_hnet(model: str, device: torch.device, dtype: str = "fp32") -> HNetForCausalLM:
    """`load` where only an H-Net will do.

    Raises:
        UserError: it is a ChunkLM.
    """
    lm = load(model, device, dtype)
    if isinstance(lm, ChunkLM):
        raise UserError(f"{model} is a ChunkLM, which makes no chunks of its own: this needs an H-Net")
    return lm


@torch.no_grad()
def load_average(model: torch.nn.Module, path: str) -> None:
    """Replace the weights by the average beside them.

    Raises:
        FileNotFoundError: the checkpoint has none.
        ValueError: it is not that of this model.
    """
    file = Path(path) / EMA
    if not file.is_file():
        raise MissingPath(f"{path} holds no {EMA}: --ema needs a checkpoint of a run with weight_ema")
    average = read_weights(file)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if average.keys() != own.keys() or any(average[n].shape != p.shape for n, p in own.items()):
        raise UserError(f"{file} does not hold the parameters of the model beside it")
    for name, p in own.items():
        p.copy_(average[name])
