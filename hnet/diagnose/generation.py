"""What a checkpoint writes: samples at several temperatures, measured against held-out text, and how to sample it."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch

from hnet.config import BOS
from hnet.errors import UserError
from hnet.generate import generate
from hnet.model.causal_lm import HNetForCausalLM
from hnet.model.score import bits_per_byte

from .findings import Finding

TEMPERATURES = (0.5, 0.8, 1.0)
COPY = 64  # bytes in a row from the training text: by heart, not by chance
GRAMS = 8  # bytes: longer than most words


def repetition(text: bytes, n: int = GRAMS) -> float:
    """Share of the n-grams of `text` that were there before; 0 for a text shorter than n."""
    return 1 - distinct(text, n) if len(text) >= n else 0.0


def distinct(text: bytes, n: int) -> float:
    """Different n-grams over n-grams; 1 for a text shorter than n."""
    count = len(text) - n + 1
    return len({text[i : i + n] for i in range(count)}) / count if count > 0 else 1.0


def longest_run(text: bytes) -> int:
    """The most times that one byte stands in a row."""
    best = run = 0
    last = -1
    for byte in text:
        run = run + 1 if byte == last else 1
        last, best = byte, max(best, run)
    return best


def entropy(text: bytes) -> float:
    """Bits a byte of its histogram; 0 for an empty text."""
    return -sum(c / len(text) * math.log2(c / len(text)) for c in Counter(text).values()) + 0.0


def utf8_validity(text: bytes) -> float:
    """Share of the bytes that belong to whole UTF-8 characters; one cut by the end counts as whole. 1 for no bytes."""
    bad = at = 0
    while at < len(text):
        try:
            text[at:].decode()
            break
        except UnicodeDecodeError as e:
            if e.reason != "unexpected end of data":
                bad += e.end - e.start
            at += e.end
    return 1 - bad / len(text) if text else 1.0


def longest_copy(text: bytes, source: bytes) -> int:
    """Bytes of the longest piece of `text` that `source` has too."""
    best = 0
    for start in range(len(text)):
        while start + best < len(text) and text[start : start + best + 1] in source:
            best += 1
    return best


def measure(text: bytes, source: bytes = b"") -> dict[str, float]:
    """All of the above for one text; `copy` where there is a training text to copy from."""
    out = {
        "bytes": len(text),
        f"repetition_{GRAMS}": repetition(text),
        "distinct_1": distinct(text, 1),
        "distinct_2": distinct(text, 2),
        "distinct_4": distinct(text, 4),
        "longest_run": longest_run(text),
        "entropy": entropy(text),
        "utf8_validity": utf8_validity(text),
    }
    return out | ({"copy": longest_copy(text, source)} if source else {})


@torch.no_grad()
def completion_bpb(model: HNetForCausalLM, prompt: bytes, text: bytes) -> float:
    """Bits a byte of `text` under the model, given BOS and the prompt; NaN for no text."""
    if not text:
        return float("nan")
    given = bytes([BOS]) + prompt
    ids = torch.tensor(list(given + text), device=model.embeddings.weight.device)
    cu = torch.tensor([0, len(ids)], dtype=torch.int32, device=ids.device)
    logits = model(ids, cu_seqlens=cu).logits[len(given) - 1 : -1].float()
    nats = torch.nn.functional.cross_entropy(logits, ids[len(given) :], reduction="sum")
    return bits_per_byte(float(nats), len(text))


def samples(
    model: HNetForCausalLM,
    held_out: bytes,
    source: bytes = b"",
    *,
    num_bytes: int = 256,
    prompts: int = 4,
    **options: Any,
) -> list[dict[str, Any]]:
    """A row for each of TEMPERATURES, and a last one, named "text", of held-out text that was not generated: means over
    the prompts of `measure` and of `bpb`; "text" holds the first completion.

    Args:
        held_out: text, of which prompts and what they are compared with are taken, evenly.
        source: training text that may have been copied.
        **options: of `hnet.generate.stream`: top_p, repetition_penalty.

    Raises:
        UserError: too little text for so many prompts.
    """
    size = min(64, num_bytes)
    piece = size + num_bytes
    if len(held_out) < piece * prompts:
        raise UserError(f"generation takes {piece * prompts} bytes of held-out text, got {len(held_out)}")
    starts = [i * (len(held_out) - piece) // max(prompts - 1, 1) for i in range(prompts)]
    given = [held_out[s : s + size] for s in starts]
    rows = []
    for t in TEMPERATURES:
        texts = generate(model, list(given), num_bytes, temperature=t, seed=0, stop_at_eos=False, **options)
        rows.append(_row({"temperature": t}, model, given, texts, source))
    real = [held_out[s + size : s + piece] for s in starts]
    rows.append(_row({"temperature": None}, model, given, real, b""))
    return rows


def _row(
    head: dict[str, Any], model: HNetForCausalLM, prompts: list[bytes], texts: list[bytes], source: bytes
) -> dict[str, Any]:
    found = [measure(t, source) | {"bpb": completion_bpb(model, p, t)} for p, t in zip(prompts, texts, strict=True)]
    means = {k: sum(f[k] for f in found) / len(found) for k in found[0]}
    worst: dict[str, Any] = {k: max(f[k] for f in found) for k in ("longest_run", "copy") if k in found[0]}
    return {**head, **means, **worst, "text": texts[0].decode(errors="replace")}


def generation(rows: list[dict[str, Any]]) -> list[Finding]:
    """What `samples` shows, and how to sample: the temperature whose text is most like the text in entropy and
    repetition."""
    out: list[Finding] = []
    *made, text = rows
    key = f"repetition_{GRAMS}"
    best = min(made, key=lambda r: abs(r["bpb"] - text["bpb"]) + 4 * abs(r[key] - text[key]))
    flags = {"temperature": best["temperature"], "top_p": 0.9}
    cold, hot = made[0], made[-1]
    if any(r["utf8_validity"] < text["utf8_validity"] - 0.02 for r in made):
        r = min(made, key=lambda r: r["utf8_validity"])
        why = [
            f"{r['utf8_validity']:.1%} of the bytes at temperature {r['temperature']}, {text['utf8_validity']:.1%} of "
            "the text's belong to whole characters."
        ]
        change = ["hnet generate --valid-utf8 draws only bytes that go on with a character"]
        out.append(Finding("warning", "invalid_utf8", "Samples break UTF-8 characters", why, change, sampling=flags))
    if hot["bpb"] > 1.3 * text["bpb"] + 0.2:
        why = [
            f"At temperature {hot['temperature']} the model gives its own text {hot['bpb']:.2f} bits a byte, held-out "
            f"text {text['bpb']:.2f}: once off the track it does not find back."
        ]
        out.append(Finding("warning", "hot_samples", "Samples at temperature 1 derail", why, sampling=flags))
    loops = [r for r in made if r[key] > text[key] + 0.2]
    if loops:
        r = max(loops, key=lambda r: r[key])
        why = [
            f"{r[key]:.0%} of {GRAMS}-grams at temperature {r['temperature']} were there before, {text[key]:.0%} in "
            f"the text; distinct-4 {r['distinct_4']:.2f} against {text['distinct_4']:.2f}, run {r['longest_run']}."
        ]
        flags = flags | {"dry_multiplier": 0.8}
        change = ["DRY acts on repetitions of 12 bytes and more; a repetition_penalty on bytes hurts spaces and e, too"]
        everywhere = len(loops) == len(made)
        severity, title = ("warning", "Samples repeat themselves") if everywhere else ("note", "Cold samples repeat")
        out.append(Finding(severity, "repetition", title, why, change, sampling=flags))
    copied = max((r.get("copy", 0) for r in made), default=0)
    if copied >= COPY:
        why = [f"{copied:.0f} bytes in a row are in the training text."]
        change = ["fewer passes over the data, or more data"]
        out.append(Finding("warning", "copies", "Samples copy the training text", why, change, keys={"dropout": 0.1}))
    if cold["entropy"] < 0.5 * text["entropy"]:
        why = [
            f"{cold['entropy']:.2f} bits a byte at temperature {cold['temperature']}, {text['entropy']:.2f} in "
            "the text."
        ]
        out.append(Finding("warning", "low_entropy", "Samples have few different bytes", why, sampling=flags))
    if not any(f.severity == "warning" for f in out):
        why = [
            f"At temperature {best['temperature']}: {best['bpb']:.2f} bits a byte against {text['bpb']:.2f} of "
            f"held-out text, {best[key]:.0%} repeated {GRAMS}-grams against {text[key]:.0%}."
        ]
        out.append(Finding("ok", "samples", "Samples look like the text in these numbers", why, sampling=flags))
    return out
