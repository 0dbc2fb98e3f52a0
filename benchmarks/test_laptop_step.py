"""The laptop's training step: bytes a second, share of the peak of bf16 products, and which part takes how much."""

import pytest

from . import laptop
from .parts import watch_steps


@pytest.fixture(scope="module")
def state(request, tmp_path_factory):
    return laptop.learnt(tmp_path_factory.mktemp("learnt"), request.config.getoption("--smoke"))


@pytest.mark.parametrize("positions", laptop.PACKS)
def test_laptop_step(keep_row, rounds, smoke, tmp_path, state, positions):
    trainer = laptop.trainer(tmp_path, 512 if smoke else positions, state, smoke)
    steps = 1 if smoke else laptop.PACKS[-1] // positions
    step = laptop.measure(trainer, rounds, steps, (64,) if smoke else laptop.SIDES)
    watched = watch_steps(trainer, 2 * steps)
    trainer.task.stream.close()
    keep_row(
        {"ours": step.seconds}, ours="ours", op="laptop step", model=trainer.config.preset,
        dtype=str(trainer.autocast_dtype or "torch.float32")[6:], T=trainer.config.batch_bytes,
        L=trainer.config.seq_len, of_peak=step.of_peak, parts=watched.shares, watched=watched.seconds,
        **{name: x for name, x in step._asdict().items() if name not in ("seconds", "bytes")}, text_bytes=step.bytes,
    )  # fmt: skip
