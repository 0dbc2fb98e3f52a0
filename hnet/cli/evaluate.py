"""`hnet eval`: how well a model predicts files, by training's own evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from hnet.chunk_lm import ChunkLM
from hnet.chunk_lm.evaluation import evaluate_chunk_lm
from hnet.config.keys import read_json
from hnet.data.corpus import Corpus
from hnet.data.files import DOCUMENTS, read_corpus
from hnet.data.perturb import PERTURBATIONS, beginning, perturb
from hnet.data.streaming import DocumentStream
from hnet.device import pick_autocast, pick_device
from hnet.errors import UserError
from hnet.model.causal_lm import HNetForCausalLM
from hnet.model.int8 import quantize
from hnet.model.score import Score
from hnet.train.checkpoint import RUN
from hnet.train.evaluation import evaluate_hnet
from hnet.train.flips import Flips

from .models import checkpoint_of, load, load_average, load_hnet

SEQ_LEN = 8192  # of the published models, where no run says otherwise


@click.command("eval")
@click.argument("model", type=click.Path())
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--bytes", "limit", type=click.IntRange(min=1), help="Stop after about so many bytes; default: all.")
@click.option("--pattern", default="*", show_default=True, help="Which files below a folder.")
@click.option("--documents", type=click.Choice(DOCUMENTS), help="What a document is; default: as in training.")
@click.option("--text-key", help="Where JSONL lines and Parquet rows have their text; default: as in training.")
@click.option("--seq-len", type=int, help="Longest sequence in bytes; default: as in training, or 8192.")
@click.option(
    "--stride", type=int, metavar="BYTES",
    help="Slide the context: every byte is predicted once, after at least seq-len - stride bytes of its document. "
    "Default: each seq-len bytes start afresh, as in training. (H-Nets and causal ChunkLMs)",
)  # fmt: skip
@click.option("--batch-bytes", default=16384, show_default=True, help="Bytes that go through the model at once.")
@click.option("--ema", is_flag=True, help="Evaluate the average of the weights that weight_ema keeps.")
@click.option(
    "--since", type=click.Path(), metavar="MODEL",
    help="Also say how many boundaries are others than this model's, perhaps an earlier checkpoint's. (H-Nets)",
)  # fmt: skip
@click.option(
    "--robustness", is_flag=True,
    help="Also bits per byte of the text in upper and random case, spaced out, with dropped and repeated characters.",
)  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--dtype", type=click.Choice(["auto", "fp32", "bf16", "int8"]), default="auto", show_default=True,
    help="Of activations, by autocast; int8: weights as `hnet generate --dtype int8` has them.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    model: str, files: tuple[str, ...], limit: int | None, pattern: str, documents: str | None, text_key: str | None,
    seq_len: int | None, stride: int | None, batch_bytes: int, ema: bool, since: str | None, robustness: bool,
    device: str, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Bits per byte, chunks and how decided routers are, for MODEL on files, folders, or one hf: stream (with --bytes).

    MODEL is a run directory (its latest checkpoint), a checkpoint (also RUN/checkpoints/best), or a weights file,
    of an H-Net or a ChunkLM; for an H-Net also a repository.

    Bits per byte are the nats of everything predicted / ln 2 / bytes of text, as papers have them: an H-Net predicts
    the end of a document too, which costs bits and is no byte. Perplexity is 2 to the bits per byte. Nats a symbol is
    the mean over predictions, training's ce.

    p is the probability of a boundary: a decided router has it near 1 on boundaries and near 0 elsewhere.
    """
    where = pick_device(device)
    path = checkpoint_of(model)
    trained = trained_with(path)
    documents, text_key = documents or trained.get("documents", "file"), text_key or trained.get("text_key", "text")
    corpus = read_text(files, limit, pattern, documents, text_key)
    lm = load(path, where)
    if ema:
        load_average(lm, path)
    if dtype == "int8":
        if where.type != "cpu" or isinstance(lm, ChunkLM):
            raise UserError("--dtype int8 is for an H-Net on a CPU")
        quantize(lm)
    low = None if dtype == "int8" else pick_autocast(dtype, where)

    def autocast() -> AbstractContextManager:
        return nullcontext() if low is None else torch.autocast(where.type, dtype=low)

    known = lm.config.seq_len if isinstance(lm, ChunkLM) else trained.get("seq_len", SEQ_LEN)
    seq_len = known if seq_len is None else seq_len

    def score_of(model: HNetForCausalLM | ChunkLM, corpus: Corpus, limit: int | None, see: Any = None) -> Score:
        if isinstance(model, ChunkLM):
            how: dict[str, Any] = {"batch_size": max(batch_bytes // max(seq_len, 1), 1)}
            return evaluate_chunk_lm(model, corpus, autocast, seq_len=seq_len, max_bytes=limit, stride=stride, **how)
        how = {"batch_bytes": batch_bytes, "see": see}
        return evaluate_hnet(model, corpus, autocast, seq_len=seq_len, max_bytes=limit, stride=stride, **how)

    flips = None
    if since is not None:
        if isinstance(lm, ChunkLM):
            raise UserError("since must be left out for a ChunkLM: it has no boundaries")
        flips = Flips()
        score_of(load_earlier(since, lm, where), corpus, limit, flips.see)
        flips.compare()
    score = score_of(lm, corpus, limit, flips and flips.see)
    about = {"model": path, "ema": ema, "documents": len(corpus), "seq_len": seq_len, "stride": stride}
    result = about | rates(lm, score)
    if flips is not None:
        result |= {"since": since, "flips": flips.compare() or []}
    if robustness:
        result["robustness"] = perturbed(partial(score_of, lm), beginning(corpus, limit))
    click.echo(json.dumps(result) if as_json else report(result))


def perturbed(score: Callable[[Corpus, None], Score], corpus: Corpus) -> list[dict[str, Any]]:
    """A row for the text as it is and for every way to change it."""
    rows = []
    for how in ("as it is", *PERTURBATIONS):
        text = perturb(corpus, how) if how in PERTURBATIONS else corpus
        found = score(text, None)
        per_byte = found.bpb * text.num_bytes / corpus.num_bytes
        rows.append(
            {"text": how, "bytes": found.num_bytes, "bits_per_byte": found.bpb, "bits_per_original_byte": per_byte}
        )
    return rows


# --- what is evaluated --------------------------------------------------------------------------------------------


def trained_with(path: str) -> dict[str, Any]:
    """The configuration of the run that wrote a checkpoint, empty for other models."""
    file = (Path(path) if Path(path).is_dir() else Path(path).parent) / RUN
    return read_json(file).get("config", {}) if file.is_file() else {}


def load_earlier(since: str, model: HNetForCausalLM, device: torch.device) -> HNetForCausalLM:
    """The model to compare boundaries with.

    Raises:
        UserError: it is a ChunkLM, or has other stages.
    """
    earlier = load_hnet(since, device)
    if earlier.config.num_stages != model.config.num_stages:
        stages = f"{model.config.num_stages} stages, got {earlier.config.num_stages}"
        raise UserError(f"since must be an H-Net of as many stages as the model, {stages}: {since}")
    return earlier


def read_text(files: tuple[str, ...], limit: int | None, pattern: str, documents: str, text_key: str) -> Corpus:
    """Documents in the order of the files.

    Raises:
        FileNotFoundError, ValueError: as training's reading; a stream beside something else, or without a limit.
    """
    if not any(f.startswith("hf:") for f in files):
        return read_corpus(files, pattern, (), documents, text_key)
    if len(files) > 1 or limit is None:
        raise UserError(f"an hf: stream must stand alone and needs --bytes, got {', '.join(files)}")
    return DocumentStream(files[0], text_key, limit, 0.0, 0).take(limit)


# --- the answer ---------------------------------------------------------------------------------------------------


def rates(model: HNetForCausalLM | ChunkLM, score: Score) -> dict[str, Any]:
    """The fields of --json that come from the numbers."""
    found: dict[str, Any] = {
        "bits_per_byte": score.bpb,
        "nats_per_byte": score.bpb * math.log(2),
        "perplexity_per_byte": 2**score.bpb,
        "nats_per_symbol": score.ce,
        "bytes": score.num_bytes,
        "predictions": score.targets,
    }
    if isinstance(model, ChunkLM):
        return {"kind": "ChunkLM", **found, "cutoff": model.cutoff, "bins": model.bins}
    shares = [inner / max(outer, 1) for outer, inner in zip(score.positions, score.positions[1:], strict=False)]
    found = {"kind": "H-Net", **found, "bytes_per_chunk": score.bytes_per_chunk, "boundary_share": shares}
    for stage in score.decisiveness:
        for name, x in stage.items():
            found.setdefault(name, []).append(x if math.isfinite(x) else None)
    return found


def report(r: dict[str, Any]) -> str:
    detail = f", cutoff {r['cutoff']} of {r['bins']}" if "cutoff" in r else ""
    windows = f"windows of {r['seq_len']:,}"
    windows += " that start afresh" if r["stride"] is None else f" every {r['stride']:,} bytes"
    lines = [
        f"model          {r['model']} ({r['kind']}{detail}{', average of the weights' if r['ema'] else ''})",
        f"text           {r['bytes']:,} bytes in {r['documents']:,} documents, {r['predictions']:,} predictions",
        f"context        {windows}",
        f"bits per byte  {r['bits_per_byte']:.4f}, perplexity {r['perplexity_per_byte']:.3f}",
        f"nats per byte  {r['nats_per_byte']:.4f}; a symbol {r['nats_per_symbol']:.4f}",
    ]
    for i, (size, share) in enumerate(zip(r.get("bytes_per_chunk", []), r.get("boundary_share", []), strict=True)):
        lines.append(f"stage {i}        {size:.2f} bytes a chunk; {share:.1%} of its positions begin one")
        on, off, gap = ("-" if (x := r[k][i]) is None else f"{x:.3f}" for k in ("p_on", "p_off", "G_minus_F"))
        near = f"within 0.1 of 1/2 at {r['undecided'][i]:.1%} of positions"
        lines.append(f"  router       p {on} on boundaries, {off} elsewhere, {near}; G - F {gap}")
        if "flips" in r:
            lines.append(f"  flips        {r['flips'][i]:.1%} of its boundaries are others than in {r['since']}")
    if "robustness" in r:
        lines.append("robustness     bytes        bits a byte  a byte of the text as it is")
    for row in r.get("robustness", []):
        sizes = f"{row['bits_per_byte']:<12.4f} {row['bits_per_original_byte']:.4f}"
        lines.append(f"  {row['text']:<12} {row['bytes']:<12,} {sizes}")
    return "\n".join(lines)
