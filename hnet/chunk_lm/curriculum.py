"""ChunkLM's frequency curriculum: training begins with low frequencies; the cutoff rises when the loss stops falling.

The question is asked at the start of every epoch from `min_epoch` on (check "step": after every step), if at least
`window` losses have been seen since the last raise: of the last `window` losses, is the mean of the second half less
than the share `threshold` below that of the first (`Plateau`)? Raises clear the history; the cutoff never falls.
"epochs" raises at fixed epochs.
"""

from __future__ import annotations

import math
from typing import Any

from hnet.errors import UserError
from hnet.events import Event
from hnet.plateau import Plateau

RECENT = 50  # losses that tell whether one has recovered


class Curriculum:
    """observe(step, loss, lr_factor, cutoff) for every optimiser step, in order -> events.

    cutoffs: rising, in bins; 0 stands for all of them.  epoch e is steps [e, e + 1) * steps_per_epoch, from 0.
    """

    def __init__(
        self,
        kind: str,
        cutoffs: list[int],
        bins: int,
        *,
        steps_per_epoch: int,
        min_epoch: int = 2,
        window: int = 50,
        threshold: float = 0.005,
        raise_epochs: list[int] | None = None,
        check: str = "epoch",
    ) -> None:
        self.kind, self.bins, self.steps_per_epoch, self.min_epoch = kind, bins, steps_per_epoch, min_epoch
        self.cutoffs = check_cutoffs(cutoffs, bins) if kind != "none" else [bins]
        self.raise_epochs, self.check = raise_epochs or [], check
        if kind == "epochs" and len(self.raise_epochs) != len(self.cutoffs) - 1:
            raise UserError(
                f"raise_epochs must have one epoch for each of the {len(self.cutoffs) - 1} raises, got {raise_epochs}"
            )
        self.plateau = Plateau(window, threshold)
        self.index = 0
        self.raised_at: int | None = None  # steps done at the last raise, until the loss has recovered
        self.before = 0.0  # the loss then
        self.rate_judged = True  # that of the first step after it

    @property
    def cutoff(self) -> int:
        return self.cutoffs[self.index]

    def epoch(self, steps_done: int) -> int:
        return steps_done // self.steps_per_epoch

    def observe(self, steps_done: int, loss: float, lr_factor: float, cutoff: int | None = None) -> list[Event]:
        """The loss of a finished step, with the fraction of the peak learning rate and the cutoff (default: the present
        one) it was trained at. A new cutoff holds for steps started from now on; those that were on their way at the
        old one count for nothing."""
        if cutoff not in (None, self.cutoff):
            return []
        events = self._recovery(steps_done, loss, lr_factor)
        self.plateau.observe(loss)
        if self.index + 1 == len(self.cutoffs):
            return events
        epoch = self.epoch(steps_done)
        if self.kind == "plateau":
            asked = epoch >= self.min_epoch and (self.check == "step" or steps_done % self.steps_per_epoch == 0)
            due, why = asked and self.plateau.fires(), "loss plateaued"
        else:
            due, why = self.kind == "epochs" and epoch >= self.raise_epochs[self.index], "by schedule"
        if not due:
            return events
        recent = list(self.plateau.losses)[-RECENT:]
        self.before = sum(recent) / len(recent) if recent else loss
        old, self.index = self.cutoff, self.index + 1
        self.raised_at, self.rate_judged = steps_done, False
        self.plateau.clear()
        message = f"Epoch {epoch} 🚀 CUTOFF RAISED: {old} -> {self.cutoff} ({why}, opening frequency gates)"
        events.append(Event("cutoff_raised", message, line=message))
        return events

    def _recovery(self, steps_done: int, loss: float, lr_factor: float) -> list[Event]:
        """Warnings of what goes wrong after a raise: a learning rate that is not back, a loss that stays up."""
        if self.raised_at is None or not math.isfinite(loss):
            return []
        events = []
        if not self.rate_judged and lr_factor < 0.999:
            message = f"after the raise to {self.cutoff} the learning rate is at {lr_factor:.2f} of its peak, not at it"
            events.append(Event("lr_not_at_peak", message))
        self.rate_judged = True
        recent = [*self.plateau.losses, loss][-min(self.plateau.window, RECENT) :]
        if len(recent) >= min(self.plateau.window, RECENT) // 2 and sum(recent) / len(recent) <= self.before:
            self.raised_at = None
        elif steps_done >= self.raised_at + self.steps_per_epoch:
            message = (
                f"an epoch after the raise to {self.cutoff} the loss has not recovered: "
                f"{sum(recent) / len(recent):.3f} against {self.before:.3f} before"
            )
            events.append(Event("not_recovered", message))
            self.raised_at = None
        return events

    def state_dict(self) -> dict[str, Any]:
        return {
            "index": self.index, "losses": self.plateau.state_dict(), "raised_at": self.raised_at,
            "before": self.before, "rate_judged": self.rate_judged,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is at a cutoff these settings do not have.
        """
        if state["index"] >= len(self.cutoffs):
            raise UserError(f"the checkpoint is at cutoff number {state['index']}, but cutoffs are {self.cutoffs}")
        self.index, self.raised_at, self.before = state["index"], state["raised_at"], state["before"]
        self.rate_judged = state.get("rate_judged", True)  # not in 0.1.0
        self.plateau.load_state_dict(state["losses"])


def check_cutoffs(cutoffs: list[int], bins: int) -> list[int]:
    """Bins for each entry, those beyond the model's left out: [128, 256, 512, 0] for 257 bins is [128, 256, 257].

    Raises:
        ValueError: empty, negative, or not rising (0, all bins, may only come last).
    """
    wanted = [c or bins for c in cutoffs]
    rising = sorted(set(cutoffs[:-1])) == cutoffs[:-1] and (len(cutoffs) < 2 or cutoffs[-1] in (0, max(cutoffs)))
    if not cutoffs or min(cutoffs) < 0 or 0 in cutoffs[:-1] or not rising:
        raise UserError(f"cutoffs must rise and be positive, 0 (all bins) only at the end, got {cutoffs}")
    kept = [c for c in wanted[:-1] if c < bins and c < max(wanted[-1], 1)]
    return [*kept, min(wanted[-1], bins)]
