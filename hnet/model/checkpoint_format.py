"""Weights on disk: a directory with config.json and model.safetensors, or a published `.pt` pickle.

Pickles are read with PyTorch's weights-only unpickler, which runs no code. Objects of omegaconf, which the published
files carry next to their tensors, become inert placeholders.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hnet.config import HNetConfig
from hnet.errors import MissingPath, UserError, user_path

WEIGHTS, CONFIG = "model.safetensors", "config.json"
SHARDS = WEIGHTS + ".index.json"  # of a folder that transformers wrote: which file has which tensor
REPOSITORY = r"\w[\w.-]*/\w[\w.-]*(?<!\.pt)(?<!\.json)(?<!\.safetensors)"  # "owner/name"; names have dots too


def save_pretrained(model: Any, directory: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """config.json and model.safetensors; each appears complete or not at all. `state`: instead of the model's own."""
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous() for k, v in (state or model.state_dict()).items()}
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    partial = directory / (WEIGHTS + ".partial")
    save_file(state, str(partial), metadata={"format": "pt"})
    os.replace(partial, directory / WEIGHTS)
    partial = directory / (CONFIG + ".partial")
    model.current_config().to_json(partial)
    os.replace(partial, directory / CONFIG)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or .pt file, by name."""
    with user_path(path), path.open("rb"):  # what readers say of a file that cannot be opened is worth little
        pass
    if path.name == SHARDS:
        return _read_shards(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(str(path))
        except SafetensorError as e:
            raise UserError(f"{path} is not a whole safetensors file: {e}") from None
    try:
        state = _unpickle(path)
    except Exception as e:  # the unpickler and the zip reader raise many kinds
        raise UserError(f"{path} is not a whole PyTorch weights file: {str(e).splitlines()[0]}") from None
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} does not hold a dictionary of tensors")
    return {str(k).removeprefix("module."): v.detach() for k, v in state.items()}


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        files = set(json.loads(index.read_text())["weight_map"].values())
        if not all(Path(f).name == f for f in files):
            raise ValueError("a name of a file leads elsewhere")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{index} is not an index of safetensors files: {e}") from None
    return {k: v for f in sorted(files) for k, v in read_weights(index.with_name(f)).items()}


def load_state(model: Any, state: dict[str, Tensor], where: str) -> None:
    """Copy `state` into the model, exactly: every parameter once, every shape right."""
    own = model.state_dict()
    if model.config.tie_embeddings:
        state = {**state}
        if "embeddings.weight" in state:
            state.setdefault("lm_head.weight", state["embeddings.weight"])
    missing = [k for k in own if k not in state]
    if missing:
        raise UserError(f"{where} lacks {_some(missing)}, which this config needs")
    unknown = [k for k in state if k not in own]
    if unknown:
        raise UserError(f"{where} has {_some(unknown)}, which this config does not")
    for k, v in own.items():
        if state[k].shape != v.shape:
            raise UserError(f"{where}: {k} must have shape {tuple(v.shape)}, got {tuple(state[k].shape)}")
    model.load_state_dict(state)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def find_weights(path_or_repo: str | Path) -> Path:
    """The file with the weights: itself, the one in a directory, or that of a repository, which is fetched."""
    path = Path(path_or_repo)
    with user_path(path):
        if not path.exists():
            if not re.fullmatch(REPOSITORY, str(path_or_repo)):
                raise MissingPath(f"{path} does not exist")
            path = _download(str(path_or_repo))
        if path.is_file():
            return path
        for name in (WEIGHTS, SHARDS):
            if (path / name).is_file():
                return path / name
        pickles = sorted([*path.glob("*.safetensors"), *path.glob("*.pt")])
    if len(pickles) != 1:
        raise MissingPath(f"{path} must hold {WEIGHTS} or exactly one .pt file, found {len(pickles)}")
    return pickles[0]


def find_config(weights: Path) -> HNetConfig:
    """The architecture beside a weights file, or the preset of its name."""
    for candidate in (weights.with_name(CONFIG), weights.with_suffix(".json")):
        if candidate.is_file():
            return HNetConfig.from_json(candidate)
    if weights.stem in HNetConfig.presets():
        return HNetConfig.preset(weights.stem)
    raise MissingPath(f"no architecture for {weights}: pass config=, or put {CONFIG} or {weights.stem}.json beside it")


def _download(repo: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingPath(
            f"{repo} does not exist here; fetching it as a repository needs `pip install huggingface_hub`"
        ) from None
    try:
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors", "*.pt"]))
    except Exception as e:  # no network, no such repository, no access: the client raises many kinds
        raise MissingPath(f"{repo} does not exist here, nor could it be fetched: {type(e).__name__}: {e}") from e


class _Inert:
    """Stands where a pickle holds an omegaconf object; keeps nothing, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _unpickle(path: Path) -> Any:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    foreign = [n for n in names if n.split(".")[0] in ("omegaconf", "typing", "collections")]
    with torch.serialization.safe_globals([(_Inert, n) for n in foreign]):
        return torch.load(path, map_location="cpu", weights_only=True)
