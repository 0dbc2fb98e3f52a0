"""Checkpoints: a folder each, complete or not there at all.

    checkpoints/step_00000250/  config.json  model.safetensors  trainer.pt  run.json  manifest.json  [ema.safetensors]
    checkpoints/best/           the same, of the best evaluation
    .../sharded/                with fsdp: the optimiser state, by torch.distributed.checkpoint

The first two are a model directory for `from_pretrained`; ema.safetensors is the weight average; trainer.pt holds
everything else a run needs to go on exactly where it was; run.json says what wrote it; manifest.json has size and
SHA-256 of every other file, checked on load. A checkpoint is written beside its place, flushed to disk, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hnet.errors import MissingPath, PathError, UserError
from hnet.model.checkpoint_format import WEIGHTS, read_weights

TRAINER, EMA, MANIFEST, RUN = "trainer.pt", "ema.safetensors", "manifest.json", "run.json"
SHARDED, BEST = "sharded", "best"


class NotWritten(PathError):
    """The disk is full, and checkpoint `step`, or what goes with it, did not fit; those before it are untouched."""

    def __init__(self, code: int, step: int, root: Path) -> None:
        there = [p.name for p in list_checkpoints(root, until=step)]
        if there and there[-1] == name_of(step):
            what, rest = f"what goes with the checkpoint of step {step} (best, ckpt)", "the checkpoint itself is whole"
        else:
            what = f"checkpoint of step {step}"
            rest = f"the one before it, {there[-1]}, is whole" if there else "there is none before it"
        super().__init__(f"{what} not written: {os.strerror(code)}; {rest} ({root})")
        self.errno, self.step = code, step


def save_checkpoint(root: Path, step: int, write: Callable[[Path], None], about: dict[str, Any], keep: int) -> Path:
    """Write checkpoint `step`, and of those up to it remove all but the latest `keep`, which is at least 1.

    write(folder) puts the files there; `about` goes to run.json with versions and git state.

    Raises:
        Exception: whatever `write` raised, OSError for lack of space or permission; what was there before is untouched.
    """
    final = root / name_of(step)
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
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _replace(partial, final)
    for old in list_checkpoints(root, until=step)[:-keep]:
        shutil.rmtree(old)
    return final


def mark_best(checkpoint: Path) -> None:
    """Keep this checkpoint as `best`, beside the latest."""
    link(checkpoint, checkpoint.parent / BEST)


def link(checkpoint: Path, final: Path) -> None:
    """The same checkpoint under another name; its files are linked, not copied."""
    partial = final.parent / f".partial_{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, partial, copy_function=_link)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _replace(partial, final)


class Background:
    """Runs one save at a time in a thread; an error of it is raised by the next `start`, once that has started, or by
    the next `wait`."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        self.join()
        error, self.error = self.error, None

        def run() -> None:
            try:
                job()
            except BaseException as e:
                self.error = e

        self.thread = threading.Thread(target=run, name="checkpoint")
        self.thread.start()
        if error is not None:
            raise error

    def join(self) -> None:
        """Until the save under way has ended, well or not."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def wait(self) -> None:
        self.join()
        if self.error is not None:
            error, self.error = self.error, None
            raise error


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """By its name; that of `best`, and of any other name, by its run.json. None where that cannot be read."""
    if re.fullmatch(r"step_\d+", checkpoint.name):
        return int(checkpoint.name[5:])
    try:
        return int(json.loads((checkpoint / RUN).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def list_checkpoints(root: Path, until: float = math.inf) -> list[Path]:
    """Complete checkpoints up to step `until`, oldest first; without `best`, which is also one of them or was."""
    found = [p for p in root.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and (p / MANIFEST).is_file()]
    steps = {p: int(p.name[5:]) for p in found}
    return sorted((p for p in found if steps[p] <= until), key=lambda p: steps[p])


def latest_checkpoint(root: Path) -> Path:
    found = list_checkpoints(root)
    if not found:
        raise MissingPath(f"no checkpoint in {root}")
    return found[-1]


def fingerprint(path: Path) -> str | None:
    """SHA-256 of the manifest, which has those of all files; None if there is no complete checkpoint."""
    return _digest(path / MANIFEST) if (path / MANIFEST).is_file() else None


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
    step = step_of(path)
    others = [p for p in (*list_checkpoints(path.parent), path.parent / BEST) if p != path and (p / MANIFEST).is_file()]
    if step is not None:
        others = [p for p in others if (step_of(p) or 0) < step]
    if not others:
        return " No earlier checkpoint is left."
    last = max(others, key=lambda p: step_of(p) or 0)
    what = f"The one before it is {last}" if step is not None else f"Another is {last}"
    return f" {what}: resume with --resume {last}"


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
