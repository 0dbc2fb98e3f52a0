"""The MODEL argument of the commands: a run directory, a checkpoint, a weights file; of an H-Net or a ChunkLM."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hnet.chunk_lm import ChunkLM
from hnet.chunk_lm.config import MODEL_TYPE
from hnet.errors import MissingPath, UserError, user_path
from hnet.model.causal_lm import HNetForCausalLM
from hnet.model.checkpoint_format import CONFIG, read_weights
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
        return json.loads(file.read_text()).get("model_type") == MODEL_TYPE
    if Path(path).suffix == ".pt" and Path(path).is_file():
        try:
            saved = torch.load(path, map_location="meta", weights_only=True)
        except Exception:  # a published pickle; whatever is wrong, the H-Net's reader says it better
            return False
        config = saved.get("config") if isinstance(saved, dict) else None
        return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE
    return False


def load_hnet(model: str) -> HNetForCausalLM:
    return HNetForCausalLM.from_pretrained(checkpoint_of(model)).eval()


def load(path: str, device: torch.device) -> HNetForCausalLM | ChunkLM:
    if is_chunk_lm(path):
        return ChunkLM.from_pretrained(path, device=device).eval()
    return HNetForCausalLM.from_pretrained(path, device=device).eval()


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
