"""`hnet generate --prompts IN.jsonl --out OUT.jsonl`: many prompts, a batch at a time.

What is finished is written to `OUT.jsonl.unfinished` as it comes; at the end OUT.jsonl, in the order of the prompts,
takes its place in one go. Stopped before, the same command goes on with the prompts that are not in it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hnet.disk import replacing
from hnet.errors import PathTaken, RunFailed, UserError, user_path
from hnet.generate import Engine, Request, SamplingConfig
from hnet.generate.request import checked_options
from hnet.model.causal_lm import HNetForCausalLM

from .sampling_options import checked_prompt

SETTINGS = {f.name for f in fields(SamplingConfig)}
OTHERS = {"max_new_bytes", "seed", "stop", "stop_at_eos"}
PREFILL_BYTES = 1 << 15


def generate_file(
    model: HNetForCausalLM, source: str, out: str, config: SamplingConfig, asked: dict[str, Any], *, batch: int,
    limit: int,
) -> None:  # fmt: skip
    """Continue every prompt of `source`.

    A line is {"prompt": text, "id": anything, and any option of this text: temperature, stop, seed, ...}. Bytes that
    are no UTF-8 are lone surrogates, dc80 to dcff, in answers too. With a seed, line n is given seed + n.

    Raises:
        UserError: a line that is not this; OUT exists; the unfinished file is of other prompts or options. Before
            anything is written.
        RunFailed: some prompts ended in an error; their lines say which.
    """
    with user_path(source):
        data = Path(source).read_bytes()
    tasks = [
        task(f"{source} line {n + 1}", line, n, config, asked, limit)
        for n, line in enumerate(data.splitlines()) if line.strip()
    ]  # fmt: skip
    if not tasks:
        raise UserError(f"{source} holds no prompts")
    target = Path(out)
    if target.exists():
        raise PathTaken(f"{out} exists: remove it, or give another --out")
    whole = repr((asdict(config), sorted(asked.items()), data))
    journal = Journal(target, hashlib.sha256(whole.encode()).hexdigest())
    longest = max(len(t["prompt"]) + t["max_new_bytes"] for t in tasks)
    engine = Engine(model, slots=min(batch, len(tasks)), max_length=1 + longest, prefill_bytes=PREFILL_BYTES)
    with journal, Progress(
        MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[written]:,} bytes"), TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as progress:  # fmt: skip
        bar = progress.add_task("", total=len(tasks), completed=len(journal.done), written=0)
        written = 0
        asked_by: dict[Request, dict[str, Any]] = {}

        def ended(requests: list[Request]) -> None:
            nonlocal written
            for request in requests:
                if request.finish is not None:
                    journal.add(answer(asked_by.pop(request), request))
                    written += len(request.text)
            progress.update(bar, completed=len(journal.done), written=written)

        for t in tasks:
            if t["index"] not in journal.done:
                request = engine.submit(t["prompt"], t["config"], **{name: t[name] for name in OTHERS})
                asked_by[request] = t
                ended([request])  # it may have nothing to do
        while engine.busy:
            ended(engine.step())
    journal.finish()
    if failed := sum("error" in line for line in journal.done.values()):
        raise RunFailed(f"{failed} of {len(tasks)} prompts ended in an error: see {out}")


def task(where: str, line: bytes, n: int, config: SamplingConfig, asked: dict[str, Any], limit: int) -> dict[str, Any]:
    """What a line asks for, checked."""
    try:
        entry = json.loads(line)
    except ValueError as e:
        raise UserError(f"{where} is not JSON: {e}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise UserError(f'{where} must be an object with a text "prompt"')
    if unknown := entry.keys() - SETTINGS - OTHERS - {"prompt", "id"}:
        known = ", ".join(sorted(SETTINGS | OTHERS | {"id"}))
        raise UserError(f"{where} has an unknown option {sorted(unknown)[0]!r}; there are {known}")
    try:
        prompt = entry["prompt"].encode("utf-8", "surrogateescape")
        checked_prompt(prompt, limit)
        own = {name: value for name, value in entry.items() if name in SETTINGS}
        if "logit_bias" in own:  # keys of JSON are texts
            own["logit_bias"] = {int(byte): value for byte, value in dict(own["logit_bias"]).items()}
        options = dict(asked) | {name: entry[name] for name in OTHERS & entry.keys()}
        if "seed" not in entry and options["seed"] is not None:
            options["seed"] = (options["seed"] + n) % 2**63
        found = {"index": n, "prompt": prompt, "config": replace(config, **own), **options}
        if "id" in entry:
            found["id"] = entry["id"]
        # what `submit` would say later, said before anything runs
        checked_options(found["config"], **{name: found[name] for name in OTHERS})
        return found
    except (UserError, TypeError, ValueError) as e:
        raise UserError(f"{where}: {e}") from None


def answer(t: dict[str, Any], request: Request) -> dict[str, Any]:
    line: dict[str, Any] = {"index": t["index"]}
    if "id" in t:
        line["id"] = t["id"]
    line |= {name: bytes(b).decode("utf-8", "surrogateescape") for name, b in
             (("prompt", request.prompt), ("text", request.text))}  # fmt: skip
    line |= {"finish": request.finish, "seed": request.seed}
    if request.error:
        line["error"] = request.error
    if request.config.logprobs is not None:
        line["logprobs"] = [{"byte": c.byte, "logprob": c.logprob, "top": dict(c.top)} for c in request.logprobs]
    return line


class Journal:
    """Answers so far, in a file beside OUT that begins with a line of what they answer."""

    def __init__(self, target: Path, digest: str) -> None:
        self.target, self.path = target, target.with_name(f"{target.name}.unfinished")
        self.header = json.dumps({"prompts and options": digest}).encode() + b"\n"
        self.done: dict[int, dict[str, Any]] = {}
        self.file: BinaryIO | None = None

    def __enter__(self) -> Journal:
        with user_path(self.target, "write"):
            kept = self.path.read_bytes() if self.path.exists() else b""
            kept = kept[: kept.rfind(b"\n") + 1]  # the last line may have been cut
            if kept and not kept.startswith(self.header):
                raise UserError(f"{self.path} is of other prompts or options: remove it to begin anew")
            for line in kept.splitlines()[1:]:
                found = json.loads(line)
                self.done[found["index"]] = found
            self.file = self.path.open("r+b" if kept else "wb")
            self.file.truncate(len(kept))
            self.file.seek(len(kept))
            if not kept:
                self.file.write(self.header)
        return self

    def add(self, line: dict[str, Any]) -> None:
        assert self.file is not None
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        self.done[line["index"]] = line

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def finish(self) -> None:
        """All answers in order take the place of OUT; the journal goes."""
        with user_path(self.target, "write"), replacing(self.target) as partial:
            partial.write_bytes(b"".join(json.dumps(self.done[n]).encode() + b"\n" for n in sorted(self.done)))
        self.path.unlink()
