import sysconfig
from pathlib import Path

import pytest

from hnet.train.config import TrainConfig

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def tiny(out: Path) -> TrainConfig:
    """A tiny run on real text: the email package of the standard library."""
    return TrainConfig(
        data=[str(STDLIB / "email")],
        pattern="*.py",
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
