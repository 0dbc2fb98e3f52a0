"""Watching a run for the ways H-Net runs die. Every finding is an event in metrics.jsonl and a line on the console.

non_finite        the loss or a gradient is not a number; the step was not taken. An event for each such step (the
                  console hears of it again after QUIET steps). Too many in a row end the run.
loss_spike        the loss stays far above its recent median; the loop may go back to the last checkpoint.
collapse_open     nearly every byte is a chunk (F -> 1): the inner stages see no compression
collapse_closed   nearly every document is one chunk (F -> 0): the inner stages see nothing
target_missed     realised positions per chunk are over 25 % off although the ratio loss is near 1
grad_explosion    the gradient of a stage is far above its recent median
budget_overflow   max_chunks drops boundaries

A planned jump of the loss (cutoff, target, learning rate) is not a spike: `forget` says where the history begins anew.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from hnet.events import Event

WINDOW = 100  # steps of history
PERSISTENT = 20  # steps that a collapse lasts before it is one
OPEN = 0.9  # share of boundaries that is a collapse
CLOSED = 1.1  # chunks a sequence that is a collapse
MISS = 0.25
EXPLOSION = 20.0
QUIET = 200  # steps before the same thing is said again
SPIKE = 3  # steps far above the median that are a spike


class Guards:
    """check(row) -> events. `warmup`: steps before targets are judged. All state is small and saved with the run."""

    def __init__(self, *, warmup: int, max_bad_steps: int = 10, spike_factor: float = 6.0) -> None:
        self.warmup, self.max_bad_steps, self.spike_factor = warmup, max_bad_steps, spike_factor
        self.bad = self.spiking = 0
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.recent: dict[str, deque[float]] = {}
        self.said: dict[str, int] = {}
        self.fresh: int | None = None  # the first step of a history that is yet to begin
        self.sound = 0  # the last step whose weights came before the spike last seen

    def forget(self, step: int) -> None:
        """From `step` on rows are compared with each other only: before it the run was at other settings."""
        self.fresh = step

    def check(self, row: dict[str, Any]) -> list[Event]:
        """row: a line of metrics.jsonl."""
        if self.fresh is not None and row["step"] >= self.fresh:
            self.fresh, self.spiking = None, 0
            self.losses.clear()
            for key in [k for k in self.recent if k.endswith(("/rate", "/ratio_loss"))]:
                del self.recent[key]
        events = self._finite(row)
        if not events:
            events = self._spike(row["loss"], row["step"])
            stages = sorted({k.split("/")[0] for k in row if k.startswith("stage")})
            for s in stages:
                events += [*self._compression(row, s), *self._gradient(row, s)]
        told = [e if e.action or self._news(e, row["step"]) else e._replace(quiet=True) for e in events]
        return [e for e in told if e.name == "non_finite" or not e.quiet]

    def _news(self, event: Event, step: int) -> bool:
        key = event.name + event.message.split(":")[0]
        if step - self.said.get(key, -QUIET) < QUIET:
            return False
        self.said[key] = step
        return True

    def _history(self, key: str, value: float, size: int = WINDOW) -> deque[float]:
        history = self.recent.setdefault(key, deque(maxlen=size))
        history.append(value)
        return history

    def _finite(self, row: dict[str, Any]) -> list[Event]:
        if _finite(row["loss"]) and _finite(row["grad_norm"]):
            self.bad = 0
            return []
        self.bad += 1
        what = "gradient" if _finite(row["loss"]) else "loss"
        message = f"non-finite {what}: the step was not taken ({self.bad} in a row)"
        if self.bad >= self.max_bad_steps:
            return [
                Event("non_finite", message + "; giving up: lower the learning rate or lengthen the warm-up", "abort")
            ]
        return [Event("non_finite", message)]

    def _spike(self, loss: float, step: int) -> list[Event]:
        if self.spike_factor and len(self.losses) >= WINDOW // 2:
            middle = median(self.losses)
            spread = max(1.48 * median(abs(x - middle) for x in self.losses), 0.02 * abs(middle))
            if loss > middle + self.spike_factor * spread:
                self.spiking += 1
                if self.spiking < SPIKE:
                    return []
                self.spiking = 0
                self.losses.clear()
                self.sound = step - SPIKE - 1  # the first loss that was high is of the weights of the step before it
                message = f"loss spike: {loss:.3f} for {SPIKE} steps against {middle:.3f} before"
                return [Event("loss_spike", message, "rollback")]
        self.spiking = 0
        self.losses.append(loss)
        return []

    def _compression(self, row: dict[str, Any], s: str) -> list[Event]:
        if f"{s}/F" not in row:
            return []
        events = []
        F = self._history(f"{s}/F", row[f"{s}/F"], PERSISTENT)
        per_sequence = self._history(f"{s}/chunks_per_sequence", row[f"{s}/chunks_per_sequence"], PERSISTENT)
        if len(F) == PERSISTENT:
            if min(F) > OPEN and row[f"{s}/target"] > 1 / OPEN:
                events.append(Event(
                    "collapse_open", f"{s} collapsed to one position per chunk: F is {F[-1]:.2f}; raise ratio_weight, "
                    "use rate_control='bias', or lower the outer stages' learning rate",
                ))  # fmt: skip
            if max(per_sequence) < CLOSED:
                events.append(Event(
                    "collapse_closed", f"{s} collapsed to one chunk per document: {per_sequence[-1]:.2f} a sequence; "
                    "use rate_control='bias' or a smaller compression",
                ))  # fmt: skip
        if row["step"] > self.warmup:
            rates = self._history(f"{s}/rate", row[f"{s}/F"])
            ratio = self._history(f"{s}/ratio_loss", row[f"{s}/ratio_loss"])
            if len(rates) == WINDOW:
                realised, target = WINDOW / max(sum(rates), 1e-9), row[f"{s}/target"]
                if abs(realised / target - 1) > MISS and abs(sum(ratio) / WINDOW - 1) < 0.1:
                    events.append(Event(
                        "target_missed", f"{s} misses its target: {realised:.2f} positions a chunk, not {target:g}, "
                        f"though the ratio loss is {sum(ratio) / WINDOW:.3f}; raise ratio_weight or use "
                        "rate_control='bias'",
                    ))  # fmt: skip
        if row.get(f"{s}/dropped"):
            events.append(Event(
                "budget_overflow", f"{s} drops boundaries: {row[f'{s}/dropped']:g} past max_chunks; raise one",
            ))  # fmt: skip
        return events

    def _gradient(self, row: dict[str, Any], s: str) -> list[Event]:
        value = row.get(f"{s}/grad_norm")
        if value is None:
            return []
        history = self.recent.get(f"{s}/grad_norm", deque())
        middle = median(history) if len(history) >= WINDOW // 2 else math.inf
        self._history(f"{s}/grad_norm", value)
        if value <= EXPLOSION * middle:
            return []
        return [Event(
            "grad_explosion", f"{s} gradient exploded: norm {value:.3g} against {middle:.3g}; lower this stage's "
            "lr_multiplier or max_grad_norm",
        )]  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {
            "bad": self.bad, "spiking": self.spiking, "losses": list(self.losses), "said": dict(self.said),
            "recent": {k: [v.maxlen, *v] for k, v in self.recent.items()}, "fresh": self.fresh,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bad, self.spiking, self.said = state["bad"], state["spiking"], dict(state["said"])
        self.fresh = state.get("fresh")  # not in 0.1.0
        self.losses = deque(state["losses"], maxlen=WINDOW)
        self.recent = {k: deque(v[1:], maxlen=v[0]) for k, v in state["recent"].items()}


def _finite(x: Any) -> bool:
    return x is not None and math.isfinite(x)
