"""Reading a ChunkLM from disk: config.json, which holds the cutoff too, and model.safetensors, or both in one file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hnet.errors import MissingPath, UserError
from hnet.model.checkpoint_format import CONFIG, WEIGHTS, read_weights

from .config import ChunkLMConfig


def read_checkpoint(path: Path) -> tuple[ChunkLMConfig, dict[str, Tensor]]:
    """What a directory, its .safetensors file, or the one .pt file of `--ckpt` holds.

    Raises:
        FileNotFoundError: no such path, or a file of the two is not there.
        ValueError: a damaged file, or the config of another model.
    """
    if not path.exists():
        raise MissingPath(f"{path} does not exist")
    if path.suffix == ".pt":
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            return ChunkLMConfig.from_dict(saved["config"]), saved["model"]
        except Exception as e:  # the zip reader and the unpickler raise many kinds
            raise UserError(f"{path} is not a whole ChunkLM file: {str(e).splitlines()[0]}") from None
    weights = path / WEIGHTS if path.is_dir() else path
    if not weights.is_file():
        raise MissingPath(f"{path} holds no {WEIGHTS}")
    return ChunkLMConfig.from_json(weights.with_name(CONFIG)), read_weights(weights)
