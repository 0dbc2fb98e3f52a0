"""A ChunkLM on disk: config.json, which holds the cutoff too, and model.safetensors; formats shared with the H-Net."""

from __future__ import annotations

from pathlib import Path

import torch

from hnet.model.checkpoint_format import CONFIG, WEIGHTS, load_state, read_weights, save_pretrained

from .config import ChunkLMConfig
from .model import ChunkLM

__all__ = ["load_pretrained", "save_pretrained"]


def load_pretrained(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> ChunkLM:
    """A model from a directory with config.json and model.safetensors, from that .safetensors file, or from the one
    file of `hnet train-chunk-lm --ckpt`.

    Raises:
        FileNotFoundError: no such path, or a file of the two is not there.
        ValueError: a damaged file, the config of another model; a missing, unknown or misshapen tensor (named).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".pt":
        return _load_file(path, dtype).to(device)
    weights = path / WEIGHTS if path.is_dir() else path
    if not weights.is_file():
        raise FileNotFoundError(f"{path} holds no {WEIGHTS}")
    config = ChunkLMConfig.from_json(weights.with_name(CONFIG))
    state = read_weights(weights)
    model = ChunkLM(config, dtype=dtype)
    load_state(model, state, str(weights))
    return model.to(device)


def _load_file(path: Path, dtype: torch.dtype | None) -> ChunkLM:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        config, state = saved["config"], saved["model"]
    except Exception as e:  # the zip reader and the unpickler raise many kinds
        raise ValueError(f"{path} is not a whole ChunkLM file: {str(e).splitlines()[0]}") from None
    model = ChunkLM(ChunkLMConfig.from_dict(config), dtype=dtype)
    load_state(model, state, str(path))
    return model
