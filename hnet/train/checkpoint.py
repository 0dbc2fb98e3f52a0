"""Checkpoints: a folder each, complete or not there at all.

    checkpoints/step_00000250/  config.json  model.safetensors  trainer.pt  run.json  manifest.json  [ema.safetensors]
    checkpoints/best/           the same, of the best evaluation
    .../sharded/                with fsdp: optimiser state and weight average, by torch.distributed.checkpoint

The first two are a model directory for `from_pretrained`; trainer.pt holds everything else a run needs to go on exactly
where it was; run.json says what wrote it; manifest.json has size and SHA-256 of every other file, checked on load. A
checkpoint is written beside its place, flushed to disk, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hnet.errors import MissingPath, UserError
from hnet.model.checkpoint_format import WEIGHTS, read_weights

TRAINER, EMA, MANIFEST, RUN = "trainer.pt", "ema.safetensors", "manifest.json", "run.json"
SHARDED = "sharded"


def save_checkpoint(root: Path, step: int, write: Callable[[Path], None], about: dict[str, Any], keep: int) -> Path:
    """Write checkpoint `step` and remove all but the latest `keep`.

    write(folder) puts the files there; `about` goes to run.json with versions and git state.

    Raises:
        OSError: no space, no permission; what was there before is untouched.
    """
    final = root / f"step_{step:08d}"
    partial = root / f".partial_{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        (partial / RUN).write_text(json.dumps({"step": step, **about, **provenance()}, indent=2) + "\n")
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        manifest = {p.relative_to(partial).as_posix(): {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in partial.rglob("*"):
            _flush(path)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _replace(partial, final)
    for old in list_checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return final


def mark_best(checkpoint: Path) -> None:
    """Keep this checkpoint as `best`, beside the latest; its files are linked, not copied."""
    partial = checkpoint.parent / ".partial_best"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial, copy_function=_link)
    _replace(partial, checkpoint.parent / "best")


class Background:
    """Runs one save at a time in a thread; an error of it is raised by the next `wait`."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        self.wait()

        def run() -> None:
            try:
                job()
            except BaseException as e:
                self.error = e

        self.thread = threading.Thread(target=run, name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in root.glob("step_*") if (p / MANIFEST).is_file())


def latest_checkpoint(root: Path) -> Path:
    found = list_checkpoints(root)
    if not found:
        raise MissingPath(f"nothing to resume: no checkpoint in {root}")
    return found[-1]


def verify(path: Path) -> None:
    """Raises ValueError naming the file that is missing, cut short or altered, and the checkpoint before it."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path / MANIFEST} cannot be read ({e}).{_previous(path)}") from None
    for name, wanted in manifest.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            problem = "is missing"
        elif size != wanted["bytes"]:
            problem = f"is damaged: {size} bytes instead of {wanted['bytes']}"
        elif _digest(file) != wanted["sha256"]:
            problem = "is damaged: its bytes are not those that were saved"
        else:
            continue
        raise UserError(f"{file} {problem}.{_previous(path)}")


def load_trainer(path: Path) -> dict[str, Any]:
    """The trainer state of a verified checkpoint."""
    verify(path)
    try:
        return torch.load(path / TRAINER, map_location="cpu", weights_only=True)
    except Exception as e:  # the zip reader and the unpickler raise many kinds
        raise UserError(f"{path / TRAINER} is damaged: {str(e).splitlines()[0]}.{_previous(path)}") from None


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    return read_weights(path / WEIGHTS)


def provenance() -> dict[str, Any]:
    """Versions and git state of what is running."""
    import hnet_kernels

    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "hnet_kernels": hnet_kernels.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "git": git.stdout.strip() or None,
    }  # fmt: skip


def _previous(path: Path) -> str:
    before = [p for p in list_checkpoints(path.parent) if p.name < path.name]
    if not before:
        return " No earlier checkpoint is left."
    return f" The one before it is {before[-1]}: resume with --resume {before[-1]}"


def _replace(partial: Path, final: Path) -> None:
    """A crash between the two renames leaves the old folder as .old_NAME."""
    old = final.parent / f".old_{final.name}"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(partial, final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
