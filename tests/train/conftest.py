import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from hnet.train.config import TrainConfig

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def tiny(out: Path) -> TrainConfig:
    """A tiny run on real text: the email package of the standard library."""
    return TrainConfig(
        data=[str(STDLIB / "email")],
        pattern="*.py",
        device="cpu",
        preset="tiny",
        ratio_weight=0.5,
        sample_bytes=0,
        plots=False,
        compression=[3.0],
        steps=8,
        seq_len=128,
        batch_bytes=512,
        warmup_steps=2,
        eval_every=4,
        eval_bytes=1024,
        checkpoint_every=4,
        out=str(out),
    )


@pytest.fixture
def config(tmp_path):
    return tiny(tmp_path / "run")


@pytest.fixture(scope="module")
def one_thread():
    """As the processes of `processes.run` have: the order of sums is theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 48 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left: int = 0) -> None:
    """Leave `left` bytes, to a page."""
    (disk / "ballast").unlink(missing_ok=True)
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(max(free - left, 0)))


def make_room(disk: Path) -> None:
    (disk / "ballast").unlink()
