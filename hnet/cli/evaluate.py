"""`hnet eval`: how well a model predicts files, read and summed as training's own evaluation does."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F

from hnet.chunk_lm import ChunkLM, chunk_lm_loss, eval_windows
from hnet.config.keys import read_json
from hnet.data.corpus import Corpus
from hnet.data.files import DOCUMENTS, read_corpus
from hnet.data.packing import eval_batches
from hnet.data.streaming import DocumentStream
from hnet.device import pick_autocast, pick_device
from hnet.errors import UserError
from hnet.model.causal_lm import HNetForCausalLM
from hnet.train.checkpoint import RUN

from .models import checkpoint_of, load, load_average

SEQ_LEN = 8192  # of the published models, where no run says otherwise


@click.command("eval")
@click.argument("model", type=click.Path())
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--bytes", "limit", type=click.IntRange(min=1), help="Stop after about so many bytes; default: all.")
@click.option("--pattern", default="*", show_default=True, help="Which files below a folder.")
@click.option("--documents", type=click.Choice(DOCUMENTS), help="What a document is; default: as in training.")
@click.option("--text-key", help="Where JSONL lines and Parquet rows have their text; default: as in training.")
@click.option("--seq-len", type=int, help="Longest sequence in bytes; default: as in training, or 8192.")
@click.option("--batch-bytes", default=16384, show_default=True, help="Bytes that go through the model at once.")
@click.option("--ema", is_flag=True, help="Evaluate the average of the weights that weight_ema keeps.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    model: str, files: tuple[str, ...], limit: int | None, pattern: str, documents: str | None, text_key: str | None,
    seq_len: int | None, batch_bytes: int, ema: bool, device: str, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Bits per byte and chunk statistics of MODEL on files, folders, or one hf: stream (with --bytes).

    MODEL is a run directory (its latest checkpoint), a checkpoint (also RUN/checkpoints/best), or a weights file,
    of an H-Net or a ChunkLM; for an H-Net also a repository. The end of a document is predicted too and counts as one
    byte, as in training.
    """
    where = pick_device(device)
    path = checkpoint_of(model)
    trained = trained_with(path)
    documents, text_key = documents or trained.get("documents", "file"), text_key or trained.get("text_key", "text")
    corpus = read_text(files, limit, pattern, documents, text_key)
    lm = load(path, where)
    if ema:
        load_average(lm, path)
    budget = corpus.num_bytes + len(corpus) if limit is None else limit
    if isinstance(lm, ChunkLM):
        result = evaluate_chunk_lm(lm, corpus, seq_len or lm.config.seq_len, batch_bytes, budget, dtype)
    else:
        result = evaluate_hnet(lm, corpus, seq_len or trained.get("seq_len", SEQ_LEN), batch_bytes, budget, dtype)
    result = {"model": path, "ema": ema, "documents": len(corpus), **result}
    click.echo(json.dumps(result) if as_json else report(result))


# --- what is evaluated --------------------------------------------------------------------------------------------


def trained_with(path: str) -> dict[str, Any]:
    """The configuration of the run that wrote a checkpoint, empty for other models."""
    file = (Path(path) if Path(path).is_dir() else Path(path).parent) / RUN
    return read_json(file).get("config", {}) if file.is_file() else {}


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


# --- evaluation ---------------------------------------------------------------------------------------------------


def _autocast(dtype: str, device: torch.device):
    low = pick_autocast(dtype, device)
    return nullcontext() if low is None else torch.autocast(device.type, dtype=low)


@torch.no_grad()
def evaluate_hnet(
    model: HNetForCausalLM, corpus: Corpus, seq_len: int, batch_bytes: int, max_bytes: int, dtype: str = "auto"
) -> dict[str, Any]:
    """Mean over the predicted symbols (bytes, and one end a document) of the first `max_bytes` of `corpus`.

    Returns:
        bits_per_byte, nats_per_byte, predictions; per stage with routing, outermost first: bytes_per_chunk, and
        boundary_share, the part of the stage's own positions that begin a chunk.
    """
    if seq_len < 2 or batch_bytes < 1:
        raise UserError(f"seq_len must be at least 2 and batch_bytes at least 1, got {seq_len} and {batch_bytes}")
    device, routed = model.embeddings.weight.device, model.config.num_stages - 1
    sums = torch.zeros(2 + routed, dtype=torch.float64, device=device)
    for batch in eval_batches(corpus, seq_len, batch_bytes, max_bytes):
        batch = batch.to(device)
        with _autocast(dtype, device):
            out = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
        ce = F.cross_entropy(out.logits.float(), batch.targets)
        n = batch.num_targets
        sums += torch.stack([ce.double() * n, ce.new_tensor(n), *(r.num_chunks for r in out.routing)])
    total, count, *chunks = sums.tolist()
    positions = [count, *chunks]
    return {
        "kind": "H-Net",
        **_rates(total / count),
        "predictions": round(count),
        "seq_len": seq_len,
        "bytes_per_chunk": [count / max(c, 1) for c in chunks],
        "boundary_share": [c / max(p, 1) for c, p in zip(chunks, positions, strict=False)],
    }


@torch.no_grad()
def evaluate_chunk_lm(
    model: ChunkLM, corpus: Corpus, seq_len: int, batch_bytes: int, max_bytes: int, dtype: str = "auto"
) -> dict[str, Any]:
    """Mean over about `max_bytes` bytes, predicted by windows spread over `corpus`, at the model's cutoff."""
    c, device = model.config, model.head.weight.device
    if not (1 <= seq_len <= c.seq_len):
        raise UserError(f"seq_len must be 1 to {c.seq_len} for this ChunkLM, got {seq_len}")
    per_window = seq_len if c.causal else c.chunk
    total, windows = 0.0, 0
    batch_size = max(batch_bytes // seq_len, 1)
    for batch in eval_windows(corpus, seq_len, c.chunk, batch_size, max(max_bytes // per_window, 1)):
        batch = batch.to(device)
        with _autocast(dtype, device):
            _, ce = chunk_lm_loss(model, batch)
        total, windows = total + ce.item() * len(batch.input_ids), windows + len(batch.input_ids)
    return {
        "kind": "ChunkLM",
        **_rates(total / windows),
        "predictions": windows * per_window,
        "seq_len": seq_len,
        "cutoff": model.cutoff,
        "bins": model.bins,
    }


def _rates(nats: float) -> dict[str, float]:
    return {"bits_per_byte": nats / math.log(2), "nats_per_byte": nats}


def report(r: dict[str, Any]) -> str:
    detail = f", cutoff {r['cutoff']} of {r['bins']}" if "cutoff" in r else ""
    lines = [
        f"model          {r['model']} ({r['kind']}{detail}{', average of the weights' if r['ema'] else ''})",
        f"text           {r['predictions']:,} predictions in {r['documents']:,} documents, windows of {r['seq_len']:,}",
        f"bits per byte  {r['bits_per_byte']:.4f}",
        f"nats per byte  {r['nats_per_byte']:.4f}",
    ]
    for i, (size, share) in enumerate(zip(r.get("bytes_per_chunk", []), r.get("boundary_share", []), strict=True)):
        lines.append(f"stage {i}        {size:.2f} bytes a chunk; {share:.1%} of its positions begin one")
    return "\n".join(lines)
