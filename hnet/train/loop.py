"""The training loop, the same for every task.

A step is started (queued on the device), finished (its numbers have arrived: a row, which is reported) and answered
(what the row sets off: guards, curriculum, learning rate). On a GPU a step is finished `delay` = 1 steps after it was
started, so that the device never waits; hence the row of step s is answered when step s + delay has been started, and
what it sets off holds from step s + delay + 1 on and is logged as of step s + delay. Nothing is left for later at an
evaluation, at a checkpoint, at the last step, and where the task asks for it (`settles`): there the row is answered
before the next step starts, on a GPU as on a CPU. What a step was trained at (rate, target, cutoff, epoch) is written
down when it starts. A run stopped in between saves the rows that are not yet answered.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

import hnet_kernels as hk
from hnet.config.run import RunConfig
from hnet.device import out_of_memory, pick_autocast, pick_device, set_matmul_precision
from hnet.errors import RunFailed
from hnet.events import Event
from hnet.model.cost import peak_flops
from hnet.model.score import bits_per_byte
from hnet.plateau import ValidationPlateau

from . import checkpoint, distributed
from .capturable import capture
from .clipping import Clipper
from .device_step import DeviceStep
from .guards import Guards
from .journal import Journal
from .metrics import Reading
from .optim import Optimizers
from .run_state import RunState
from .schedule import make_schedule
from .shards import sharded
from .stopping import EarlyStopping
from .task import HNetTask
from .weight_ema import WeightEMA

PLANNED = ("cutoff_raised", "target_annealed", "lr_drop", "lr_restart")  # the loss may jump: what was seen is history
RESTARTS = ("cutoff_raised", "lr_restart")  # the learning rate returns to its peak


@dataclasses.dataclass
class RunningStep:
    """A step that was started; its numbers may still be on the device."""

    step: int
    positions: int  # of all processes
    waited: float  # seconds for its data
    row: dict[str, Any]  # what it was trained at
    reading: Reading
    told: dict[str, float]  # what the host knew already


class Unanswered:
    """Finished rows, oldest first, whose answer is due after a later step has been started."""

    def __init__(self) -> None:
        self.rows: deque[dict[str, Any]] = deque()

    def state_dict(self) -> list[dict[str, Any]]:
        return list(self.rows)

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self.rows = deque(state)


class Trainer:
    """A run: task, optimiser, schedule, guards and their joint state. `train()` runs it to the end.

    Args:
        config: validated here, before anything is written.
        resume: False; True or "latest" for the latest checkpoint of config.out; "auto": the same, or a fresh start
            where there is none; or the path of one. What config.out holds of later steps is moved to its abandoned/.
        make_task: builds what is trained. Default: an H-Net.
    """

    def __init__(
        self, config: RunConfig, resume: bool | str | Path = False, make_task: Callable[..., Any] | None = None
    ) -> None:
        self.config = config.validate()
        self.out = Path(config.out)
        self.device = pick_device(config.device)
        self.world = distributed.start(self.device.type)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", self.world.local_rank)
        self.autocast_dtype = pick_autocast(config.dtype, self.device)
        set_matmul_precision(self.device, config.tf32)
        if self.device.type == "cpu":
            hk.keep_memory()
        if config.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # of its class
        torch.manual_seed(config.seed)
        task: Any = make_task or HNetTask
        self.task = task(config, self.device, self.autocast, self.world)
        self.model = self.task.model
        alone = self.world.size == 1 and self.device.type == "cpu"
        router_lr = getattr(config, "router_lr", 1.0)
        self.optimizers = Optimizers(self.model, config, self.task.multipliers, router_lr, tables_by_row=alone)
        self.clipper = Clipper(config, self.task.stages, self.device)
        self.device_step = DeviceStep(self.task, self.model, self.optimizers, self.clipper, self.world)
        self.captured, self.not_captured = capture(config, self.device_step, self.device, self.world)
        self.schedule = make_schedule(config)
        self.plateau = ValidationPlateau(config.plateau_patience, config.plateau_cooldown, config.plateau_min_gain)
        self.guards = Guards(warmup=config.warmup, max_bad_steps=config.max_bad_steps, spike_factor=config.spike_factor)
        self.stopping = EarlyStopping(config.patience, config.min_delta, config.stop_smoothing)
        self.ema = WeightEMA(self.model, config.weight_ema) if config.weight_ema else None
        self.delay = 1 if self.device.type == "cuda" else 0
        self.running: deque[RunningStep] = deque()
        self.unanswered = Unanswered()
        self.peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        parts: dict[str, Any] = {
            "data": self.task.stream, "schedule": self.schedule, "plateau": self.plateau, "guards": self.guards,
            "stopping": self.stopping, "clipper": self.clipper, "unanswered": self.unanswered,
        }  # fmt: skip
        if self.captured is not None:
            parts["captured"] = self.captured
        self.state = RunState(config, self.world, self.device, self.task, self.optimizers, self.ema, parts)
        self.mark: float | None = None  # when the last step was finished; None after a pause
        self.interrupted = self.stop = False
        torch.manual_seed(config.seed + 7919 * self.world.rank)
        self.beginning: list[Event] = []
        if path := self.state.find(resume):
            self.state.load(path)
        elif events := self.task.begin():
            self.beginning = events
            if self.ema is not None:
                self.ema.restart()
        self.replica = self.device_step.replica = distributed.replicate(self.model, config, self.world)
        distributed.barrier(self.world)  # nobody writes before all have looked

    @property
    def step(self) -> int:
        """Optimiser steps so far."""
        return self.state.step

    def autocast(self) -> AbstractContextManager:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    # --- one step -------------------------------------------------------------------------------------------------

    def start_step(self) -> RunningStep:
        """Queue one optimiser step; waits for the device nowhere."""
        c, begin = self.config, time.perf_counter()
        if self.mark is None:
            self.mark = begin
        trained_at = self.task.trained_at(self.step)
        batches = [next(self.task.stream) for _ in range(c.accumulation)]
        waited = time.perf_counter() - begin
        positions = sum(b.num_targets for b in batches)  # packs have one size: all processes have as many
        text = sum(b.num_bytes for b in batches)  # but not as many ends of documents
        factor = self.schedule.factor(self.step)
        rates = self.optimizers.set_lr(factor)
        self.task.prepare(self.step)
        if self.captured is not None:
            values = self.captured.run(batches, self.step)
        else:
            values = self.device_step.run([b.to(self.device) for b in batches], self.step)
        names = self.device_step.names
        if self.ema is not None:
            self.optimizers.settle()
            self.ema.update()
        self.task.after_step(self.step, dict(zip(names, values.unbind(), strict=True)))
        self.state.step += 1
        row = {
            "step": self.step, "epoch": self.task.stream.epochs, "lr": c.learning_rate * factor,
            **{f"stage{i}/lr": rate for i, rate in rates.items()}, **trained_at,
        }  # fmt: skip
        told = {"bytes": float(text), "stop": float(self.interrupted)}
        if self.world.size > 1:  # what each process knows is added up where they can
            sums = [torch.full((), x, dtype=torch.float64, device=self.device) for x in told.values()]
            values = torch.cat([values, distributed.add_up(torch.stack(sums), self.world)])
            names, told = [*names, *told], {}
        return RunningStep(self.step, positions * self.world.size, waited, row, Reading(names, values), told)

    def finish_step(self, running: RunningStep) -> dict[str, Any]:
        """The line of metrics.jsonl of a step, once its numbers have arrived."""
        means = running.reading.read() | running.told
        now = time.perf_counter()
        took, self.mark = now - (now if self.mark is None else self.mark), now
        self.state.seconds += took
        self.stop = self.stop or means.pop("stop") > 0  # all stop at the step where one does
        text = round(means.pop("bytes"))
        self.state.bytes += text
        row = {
            **running.row, "bytes": self.state.bytes, "time": self.state.seconds,
            "bytes_per_second": text / max(took, 1e-9),
            "data_wait_share": running.waited / max(took, 1e-9),
            "loss": means["loss"], "ce": means["ce"], "bpb": bits_per_byte(means["ce"] * running.positions, text),
        }  # fmt: skip
        row |= self.task.row(running.step - 1, means)
        row |= {k: v for k, v in means.items() if k.endswith("grad_norm")}
        if "flops_per_position" in row:
            row["flops_per_byte"] = row.pop("flops_per_position") * running.positions / max(text, 1)
            row["flops_per_second"] = row["flops_per_byte"] * row["bytes_per_second"]
            if self.peak is not None:
                row["mfu"] = row["flops_per_second"] / (self.peak * self.world.size)
        if self.device.type == "cuda":
            row["peak_memory"] = torch.cuda.max_memory_allocated(self.device)
        return row

    def train_step(self) -> dict[str, Any]:
        """One optimiser step; returns its line of metrics.jsonl."""
        return self.finish_step(self.start_step())

    def respond(self, row: dict[str, Any]) -> list[Event]:
        """What a finished row sets off: guards, the task's own curriculum. It holds from the next step started on."""
        if self.schedule.begins(row["step"] - 1):
            self.guards.forget(row["step"])
        return [*self.guards.check(row), *self.task.observe(row)]

    def evaluate(self) -> dict[str, float]:
        """Held-out cross entropy (nats a symbol) and bits per byte; with weight_ema also those of the average."""
        result = self.task.evaluate(self.model)
        if self.ema is not None:
            with self.ema.applied():
                result |= {f"ema_{k}": v for k, v in self.task.evaluate(self.model).items() if k.startswith("val_")}
        return result

    # --- the run --------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Run to the last step, to early stopping, or to Ctrl-C; the last state is saved. Returns the last evaluation.

        Raises:
            RunFailed: given up (non-finite steps in a row), or out of memory; with advice.
            OSError: the last checkpoint could not be written.
        """
        c, result = self.config, {}
        before = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        self.journal = Journal(c, self.step, main=self.world.main, plain=not self.task.prints)
        profiler = self._profiler()
        try:
            left = self.state.set_aside(self.stopping.best_step)
            with self.journal:
                self.journal.abandoned(left)
                try:
                    result = self._run(profiler)
                except (RuntimeError, MemoryError) as e:
                    if not out_of_memory(e):
                        raise
                    message = (
                        f"out of memory at step {self.step}: lower batch_bytes or raise accumulation, or use recompute"
                    )
                    self.journal.event(self.step, Event("out_of_memory", message))
                    raise RunFailed(message) from None
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
            if profiler is not None:
                profiler.__exit__(None, None, None)
            self.task.stream.close()
        if c.plots and self.world.main:
            self.journal.plots()
        return result

    def _run(self, profiler: Any) -> dict[str, float]:
        c, journal = self.config, self.journal
        result: dict[str, float] = {}
        for event in self.beginning:
            journal.event(self.step, event)
        if self.step == 0:
            result = self.evaluate()
            journal.row({"step": 0, "bytes": 0, "time": 0.0, **result})
            journal.held_out(0, self.task.held_out)
            journal.say(f"held-out bits per byte before training: {result['val_bpb']:.3f}")
        if self.not_captured:
            message = f"the training step runs without a CUDA graph: {self.not_captured}"
            journal.event(self.step, Event("not_captured", message))
        while self.step < c.steps and not self.stop:
            self.running.append(self.start_step())
            while self.captured is not None and self.captured.events:
                journal.event(self.step, self.captured.events.pop(0))
            if profiler is not None:
                profiler.step()
            last = self.step == c.steps
            evaluating = last or self.step % c.eval_every == 0
            saving = last or self.step % c.checkpoint_every == 0
            settled = evaluating or saving or self.task.settles(self.step)
            result = self._finish(0 if settled else self.delay, evaluating) or result
            rows = self.unanswered.rows
            while rows and (settled or rows[0]["step"] + self.delay <= self.step):
                self._answer(self.respond(rows.popleft()))
            if evaluating:
                self._after_evaluation(result)
            if saving or self.stop or self.stopping.best_step == self.step:
                self._save_and_report(last=last or self.stop)
            if not self.running:
                self.mark = None
        self.state.background.wait()
        if self.stop and self.step < c.steps:
            journal.say(f"stopped at step {self.step}; saved. Go on with: hnet train --resume --out {self.out}")
        return result

    def _profiler(self):
        if not self.config.profile or not self.world.main:
            return None
        schedule = torch.profiler.schedule(wait=9, warmup=1, active=self.config.profile, repeat=1)
        profiler = torch.profiler.profile(
            schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(str(self.out / "trace.json"))
        )
        return profiler.__enter__()

    def _finish(self, leave: int, evaluating: bool = False) -> dict[str, float]:
        """Rows of all but the `leave` latest of the running steps; the evaluation, if there is one, joins the last."""
        result: dict[str, float] = {}
        while len(self.running) > leave:
            row = self.finish_step(self.running.popleft())
            if evaluating and not self.running:
                result = self.evaluate()
                row |= result
            self._report(row)
            self.unanswered.rows.append(row)
        return result

    def _report(self, row: dict[str, Any]) -> None:
        c, journal = self.config, self.journal
        for line in self.task.lines(row):
            journal.say(line)
        if (
            row["step"] == c.steps
            or self.task.prints
            or row["step"] % c.log_every == 0
            or "val_bpb" in row
            or self.stop
        ):
            journal.row(row)
        if "val_bpb" in row:
            journal.held_out(row["step"], self.task.held_out)
            journal.say(f"step {row['step']}: held-out bits per byte {row['val_bpb']:.3f}")
        journal.console.update(row)

    def _answer(self, events: list[Event]) -> None:
        """Log events as of now, and do what they ask for."""
        for e in events:
            self.journal.event(self.step, e)
        if any(e.name in PLANNED for e in events):
            self.guards.forget(self.step + 1)
        if any(e.name in RESTARTS for e in events):
            self.schedule.restart(self.step)
        for e in events:
            if e.action == "abort":
                raise RunFailed(f"step {self.step}: {e.message}")
            if e.action != "rollback" or not self.config.spike_rollback:
                continue
            if path := self.state.roll_back(until=self.guards.sound):
                self.guards.forget(self.step + 1)
                if self.captured is not None:
                    self.captured.forget()
                self.schedule.cut *= self.config.spike_lr_cut
                message = f"rolled back to the weights of {path.name}; learning rate x {self.schedule.cut:g}"
                self.journal.event(self.step, Event("rollback", message))

    def _after_evaluation(self, result: dict[str, float]) -> None:
        if self.config.sample_bytes and self.world.main and not sharded(self.model):
            self.journal.sample(self.step, *self.task.sample())
        val_ce = result["val_ce"]
        events = self.task.evaluated(val_ce)
        held = bool(events)  # what is trained for has changed: let it settle before judging
        hold = held or self.schedule.can_drop
        events += self._plateau(val_ce, held)
        self.stopping.observe(self.step, val_ce, hold)
        if self.stopping.stop and self.step < self.config.steps:
            message = f"early stop: no better validation cross entropy in {self.config.patience} evaluations"
            events.append(Event("early_stop", message))
            self.stop = True
        self._answer(events)

    def _plateau(self, val_ce: float, held: bool) -> list[Event]:
        """The learning rate's answer to an evaluation."""
        c = self.config
        if held:
            self.plateau.clear()
        judged = not held and (c.schedule == "plateau" or c.restart_on_plateau) and self.step > c.warmup
        if not judged or not self.plateau.observe(val_ce):
            return []
        if c.restart_on_plateau:
            self.plateau.clear()
            return [Event("lr_restart", "plateau: the learning rate returns to its peak")]
        if not self.schedule.can_drop:
            return []
        self.schedule.drop()
        return [Event("lr_drop", f"plateau: the learning rate drops to {self.schedule.drops:g} of its peak")]

    def save(self) -> Path:
        """A checkpoint of now, with the rows of all steps started; see `RunState.save`."""
        self._finish(0)
        return self.state.save(best=self.stopping.best_step == self.step)

    def _save_and_report(self, last: bool) -> None:
        """Save; a full disk costs this checkpoint, not the run, unless it is the last."""
        for job in (self.save, self.state.background.wait) if last else (self.save,):
            try:
                job()
            except checkpoint.NotWritten as e:  # with async_checkpoints perhaps of the save before
                self.journal.event(self.step, Event("disk_full", str(e)))
                if last and e.step == self.step:
                    raise

    def _interrupt(self, *_: object) -> None:
        if self.interrupted:  # a second Ctrl-C does not wait for the step to end
            raise KeyboardInterrupt
        self.interrupted = True
