"""What `make learning` runs, and how long runs take: less than an hour in all."""

from __future__ import annotations

from typing import NamedTuple

from .run import Run, read

WITHOUT_CHUNKS = ("isotropic", "isotropic+ngrams")


class Part(NamedTuple):
    models: tuple[str, ...]
    seconds: tuple[float, ...]
    seeds: int


# nanoGPT is far behind, so one seed tells; of five minutes, the two that are nearest to each other
PLAN = (
    Part(("hnet", *WITHOUT_CHUNKS), (30, 60, 120), 3),
    Part(("nanogpt",), (30, 60, 120), 1),
    Part(("hnet", "isotropic+ngrams"), (300,), 1),
)

# Of a run besides its steps, on 2 cores: a process, the data, a model to throw away, four evaluations. With 111,540
# bytes held out nine runs took 8 s each besides; this is 13 for them.
START, SCORED = 6.0, 60e3  # seconds; bytes a second


def planned(corpus: str, eval_bytes: int) -> list[Run]:
    """Short runs first; models take turns, so that a machine that slows down slows all of them."""
    runs = [
        Run(model, corpus, amount, "seconds", seed, eval_bytes)
        for models, seconds, seeds in PLAN
        for amount in seconds
        for seed in range(seeds)
        for model in models
    ]
    return sorted(runs, key=lambda run: (run.amount, run.seed))


def besides(held_out: int, evaluations: int = 4) -> float:
    """Seconds of a run that are not of its steps, when so many bytes are held out and scored"""
    return START + evaluations * held_out / SCORED


def minutes(runs: list[Run]) -> float:
    """About how long these take, one after the other; those that end by their arithmetic are not counted."""
    held_out = {(r.corpus, r.eval_bytes): r.eval_bytes or len(read(r.corpus)[1]) for r in runs}
    timed = [r for r in runs if r.unit == "seconds"]
    return sum(r.amount + besides(held_out[r.corpus, r.eval_bytes]) for r in timed) / 60


def estimate(runs: list[Run]) -> str:
    """For whoever starts them"""
    untimed = sum(r.unit != "seconds" for r in runs)
    text = f"{len(runs)} runs, about {minutes(runs):.0f} minutes on a machine with nothing else to do"
    return text + (f", without {untimed} that end by their FLOPs, however long that takes" if untimed else "")
