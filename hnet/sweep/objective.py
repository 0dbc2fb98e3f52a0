"""The number that a sweep makes small or large: a formula over the metrics of an evaluation."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hnet.errors import UserError
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer

from .parameters import closest

OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: math.pow, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., float]] = {
    "abs": abs, "min": min, "max": max, "log": math.log, "log2": math.log2, "exp": math.exp, "sqrt": math.sqrt,
}  # fmt: skip
GPU_ONLY = ("mfu", "peak_memory")


class Formula:
    """Arithmetic (+ - * / **), numbers, `FUNCTIONS`, and metrics under the names of metrics.jsonl: `val_bpb`,
    `stage1/val_bytes_per_chunk`; a name without a stage that the run as a whole does not have is the outermost stage's.

    Raises:
        UserError: anything else.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self.tree = ast.parse(re.sub(r"\bstage(\d+)/(?=[A-Za-z_])", r"stage\1_", text.strip()), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
            raise self._error(f"not a formula ({getattr(e, 'msg', e)})") from None
        self.names: set[str] = set()
        self._look(self.tree)

    def check(self, known: Iterable[str]) -> None:
        """
        Raises:
            UserError: it has a metric that is not among `known`, keys of metrics.jsonl.
        """
        usable = _names(dict.fromkeys(known, 0.0))
        for name in sorted(self.names):
            if name not in usable:
                listed = ", ".join(sorted(known))
                raise self._error(f"unknown metric {name!r}{closest(name, usable)}; known are {listed}")

    def __call__(self, row: dict[str, Any]) -> float:
        """Its value for a line of metrics.jsonl.

        Raises:
            UserError: a metric is missing or not a number there, or the formula has no value for them.
        """
        found = _names(row)
        for name in sorted(self.names):
            if not isinstance(found.get(name), int | float):
                raise self._error(f"{name} is not a number in step {row.get('step')}")
        try:
            value = self._value(self.tree, found)
        except (ArithmeticError, ValueError) as e:
            raise self._error(f"{e} in step {row.get('step')}") from None
        if not math.isfinite(value):
            raise self._error(f"{value} in step {row.get('step')}")
        return value

    def _error(self, what: str) -> UserError:
        return UserError(f"objective {self.text!r}: {what}")

    def _look(self, node: ast.AST) -> None:
        """Walk the tree; what is not listed here is refused."""
        match node:
            case ast.BinOp(left, op, right) if type(op) in OPERATORS:
                self._look(left)
                self._look(right)
            case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
                self._look(operand)
            case ast.Call(ast.Name(name), args, []) if name in FUNCTIONS:
                if (len(args) < 2) if name in ("min", "max") else (len(args) != 1):
                    raise self._error(f"{name}() of {len(args)} numbers")
                for a in args:
                    self._look(a)
            case ast.Call(ast.Name(name)):
                raise self._error(f"no function {name}(); there are {', '.join(FUNCTIONS)}")
            case ast.Name(name):
                self.names.add(name)
            case ast.Constant(int() | float() as value) if not isinstance(value, bool) and abs(value) < 2**63:
                pass
            case _:
                raise self._error(f"{ast.unparse(node)!r} is not arithmetic over metrics")

    def _value(self, node: Any, found: dict[str, Any]) -> float:
        match node:
            case ast.BinOp(left, op, right):
                return OPERATORS[type(op)](self._value(left, found), self._value(right, found))
            case ast.UnaryOp(op, operand):
                return OPERATORS[type(op)](self._value(operand, found))
            case ast.Call(ast.Name(name), args):
                return FUNCTIONS[name](*(self._value(a, found) for a in args))
            case ast.Name(name):
                return float(found[name])
            case _:
                return float(node.value)


def _names(row: dict[str, Any]) -> dict[str, Any]:
    """A row under the names that a formula may use."""
    outermost = {k.removeprefix("stage0/"): v for k, v in row.items() if k.startswith("stage0/")}
    return outermost | {k.replace("/", "_"): v for k, v in row.items()}


def known_metrics(configs: list[TrainConfig]) -> list[str]:
    """What the evaluations of such runs hold, asked of one step of a tiny one with as many stages, in a folder that is
    removed again."""
    stages = max(c.model().num_stages for c in configs)
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()), torch.random.fork_rng(devices=[]):
        text = Path(folder) / "text"
        text.write_text("a few words to read\n" * 40)
        tiny = TrainConfig(
            data=[str(text)], arch=" ".join(["c1"] * stages), d_model=[16] * stages, d_intermediate=[16] * stages,
            compression=[2.0] * (stages - 1), steps=1, seq_len=32, batch_bytes=64, eval_bytes=64, device="cpu",
            weight_ema=0.5 if any(c.weight_ema for c in configs) else 0.0, out=folder,
            max_chunks=[1.0] * (stages - 1) if any(c.max_chunks for c in configs) else [],
            rate_control=next((c.rate_control for c in configs if c.rate_control != "none"), "none"),
        )  # fmt: skip
        trainer = Trainer(tiny)
        try:
            rows = [trainer.evaluate(), trainer.train_step(), trainer.evaluate()]  # the second one has flips
        finally:
            trainer.task.stream.close()
    gpu = GPU_ONLY if torch.cuda.is_available() else ()
    return sorted({k for row in rows for k in row} | set(gpu))
