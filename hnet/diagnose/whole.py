"""A log with all that lies around it: the text it read, its checkpoint, and what the model writes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hnet.chunk_lm.train_config import ChunkLMTrainConfig
from hnet.config import BOS
from hnet.config.architecture import targets
from hnet.config.keys import fields, parse
from hnet.config.run import RunConfig
from hnet.data.corpus import Corpus
from hnet.data.pack_stream import PackStream
from hnet.data.packing import eval_batches
from hnet.data.sources import open_corpus
from hnet.errors import UserError
from hnet.train.config import TrainConfig

from .checkpoint import Material
from .data import files_of
from .findings import Finding, by_severity
from .generation import generation, samples
from .leakage import leak
from .report import Report, examine
from .reproduce import reproduced
from .runs import Log
from .texts import draw, examine_texts
from .weights import describe, routers, weights

READ = 1 << 28  # bytes of data files that are read, at most
POSITIONS = 4096  # of a pack that goes through the model


def config_class(log: Log) -> type[RunConfig]:
    return ChunkLMTrainConfig if log.config.keys() & {"cutoffs", "kernel_len"} else TrainConfig


def examine_run(log: Log, material: Material | None = None, generate: bool = False) -> Report:
    """`examine`, and the analyses that a log alone does not allow: of the text where it can be found, of weights,
    routers and packs with `material`, of samples with `generate`."""
    more: list[Finding] = []
    numbers: dict[str, Any] = {}
    left: list[dict[str, str]] = []
    found, data, why = _texts(log, material)
    more += found
    if data:
        numbers["data"] = data
    elif why:
        left.append({"what": "the text", "why": why})
    if material is not None:
        found, numbers["architecture"] = _model(log, material)
        more += found
        more += reproduced(log, material)
        found, why = _leak(material)
        more += found
        if why:
            left.append({"what": "whether documents of a pack see each other", "why": why})
    elif log.kind == "run":
        what = "weights, routers, and whether documents of a pack see each other"
        left.append({"what": what, "why": "no checkpoint was loaded; --checkpoint loads it, or says why not"})
    rows = samples(material.model, material.held_out, material.source) if material and generate else None
    report = examine(log, more + (generation(rows) if rows else []), rows)
    if "held_out" in data and not any(f.name == "split_shift" for f in more):
        report.findings = by_severity([_of_few(f) for f in report.findings])
    report.findings = _once(report.findings)
    report.summary |= numbers
    report.unexamined += left
    return report


def _once(findings: list[Finding]) -> list[Finding]:
    """Without what log and text both say, of which the worse stays, and without "ok" where the log knows otherwise."""
    out: list[Finding] = []
    for f in findings:  # worst first
        said = any(f.name == g.name for g in out)
        if not (said and (f.severity == "ok" or f.name.startswith("split_"))):
            out.append(f)
    return out


def _of_few(f: Finding) -> Finding:
    """A gap between held-out and training loss where the documents themselves are of one kind."""
    if f.name != "split_shift":
        return f
    why = "Pairs of bytes of the documents themselves differ no more than documents do: eval_bytes covers few of them."
    keys = {"eval_bytes": 65536}
    return dataclasses.replace(f, severity="note", evidence=[*f.evidence, why], change=[], keys=keys, confidence="low")


def _texts(log: Log, material: Material | None) -> tuple[list[Finding], dict[str, Any], str]:
    """Findings, numbers, and why there are none."""
    seq_len = int(log.number("seq_len", default=1024))
    if material is not None and isinstance(material.train, Corpus) and material.val is not None:
        return *examine_texts(material.train, material.val, seq_len), ""
    files = [*files_of(log, "data"), *files_of(log, "val_data")]
    if not files:
        return [], {}, ""  # said by `unexamined`
    if (size := sum(p.stat().st_size for p in files)) > READ:
        return [], {}, f"{size:,} bytes of files, more than the {READ:,} that are read here"
    cls = config_class(log)
    types = {f.name: str(f.type) for f in fields(cls)}
    try:
        known = {k: parse(k, v, types[k]) for k, v in log.config.items() if k in types}
        train, val = open_corpus(cls(**known), lambda line: None)
    except (UserError, OSError, TypeError) as e:
        return [], {}, str(e)
    return *examine_texts(train, val, seq_len), ""


def _model(log: Log, material: Material) -> tuple[list[Finding], dict[str, Any]]:
    numbers = describe(material.model)
    found = weights(material.model, material.step, bool(material.config and material.config.freeze))
    if material.val is None or material.config is None or any(f.severity == "critical" for f in found):
        return found, numbers
    size = min(POSITIONS, material.config.batch_bytes)
    seq_len = min(material.config.seq_len, size)
    batch = next(iter(eval_batches(material.val, seq_len, size, size)))
    wanted = targets(material.config.compression, material.model.config.num_stages - 1)
    more, routed = routers(material.model, batch, wanted, material.step)
    for kept, seen in zip(numbers["routers"], routed, strict=True):
        kept.update(seen)
    return found + more, numbers


def _leak(material: Material) -> tuple[list[Finding], str]:
    """Of a pack as the run's own loader makes it."""
    config = material.config
    if material.train is None or config is None:
        return [], "the run's data cannot be read"
    if isinstance(material.train, Corpus) and (draw(material.train).text == BOS).any():
        return [], f"the text holds the byte {BOS}, which cannot be told from the beginning of a document"
    size = min(POSITIONS, config.batch_bytes)
    batch = next(PackStream(material.train, min(config.seq_len, size), size, config.seed))

    def forward(input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        return material.model(input_ids, cu_seqlens=cu_seqlens).logits

    try:
        with torch.no_grad():
            return leak(forward, batch.input_ids, batch.cu_seqlens), ""
    except ValueError as e:
        return [], str(e)
