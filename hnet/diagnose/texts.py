"""Data: what the text itself shows - bytes, copies, lengths, and whether the held-out part is a fair sample."""

from __future__ import annotations

import hashlib
import re
from typing import Any, NamedTuple

import numpy as np

from hnet.config import BOS, EOS
from hnet.data.corpus import Corpus

from .findings import Finding
from .series import percent

MOST = 1 << 22  # bytes that are looked at, of documents drawn at random
WINDOW, ONE_IN = 48, 16  # bytes of a fingerprint, and how many pieces of that length have one
ALIKE = 0.8  # share of its fingerprints that a near-duplicate has in common with earlier documents
COPIED, COPIED_NOTE = 0.05, 0.01  # share of the bytes
SIGMA, GAP, GAP_OF_ONE = 4.0, 0.05, 0.15  # of a held-out part that is no sample: standard errors, and share of the mean
CUT = 0.9  # of the bytes are in documents of more than LONG times seq_len
LONG = 4


class Looked(NamedTuple):
    """Documents that were drawn, end to end."""

    text: np.ndarray  # (bytes,) uint8
    begin: np.ndarray  # (documents,) int64
    end: np.ndarray

    def document(self, i: int) -> bytes:
        return self.text[self.begin[i] : self.end[i]].tobytes()

    def __len__(self) -> int:
        return len(self.begin)


def draw(corpus: Corpus, most: int = MOST) -> Looked:
    """Whole documents at random, the same every time, until they have `most` bytes; the last one is cut there."""
    order = np.random.default_rng(0).permutation(len(corpus))
    sizes = corpus.sizes[order]
    count = int(np.searchsorted(sizes.cumsum(), most)) + 1
    parts = [corpus.document(int(i))[:most] for i in np.sort(order[:count])]
    ends = np.cumsum([len(p) for p in parts], dtype=np.int64)
    text = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)
    return Looked(text, ends - np.array([len(p) for p in parts], dtype=np.int64), ends)


def fingerprints(looked: Looked) -> tuple[np.ndarray, np.ndarray]:
    """(hash, document) of pieces of WINDOW bytes within documents, one in ONE_IN, chosen by the hash itself, so that
    equal pieces are chosen wherever they are. Each pair once, by document."""
    n = len(looked.text)
    if n < WINDOW:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    base = np.uint64(0x9E3779B97F4A7C15)
    inverse = np.uint64(pow(int(base), -1, 1 << 64))
    powers, inverses = (np.cumprod(np.full(n, b)) for b in (base, inverse))  # modulo 2^64
    sums = np.cumsum((looked.text.astype(np.uint64) + np.uint64(1)) * inverses)
    rolled = sums[WINDOW - 1 :].copy()
    rolled[1:] -= sums[:-WINDOW]
    rolled *= powers[: len(rolled)]
    for shift in (29, 32):
        rolled ^= rolled >> np.uint64(shift)
        rolled *= np.uint64(0xBF58476D1CE4E5B9)
    at = np.flatnonzero((rolled >> np.uint64(40)) % np.uint64(ONE_IN) == 0)
    document = np.searchsorted(looked.end, at, side="right")
    inside = at + WINDOW <= looked.end[document]
    pairs = np.unique(np.stack([document[inside].astype(np.uint64), rolled[at[inside]]]), axis=1)
    return pairs[1], pairs[0].astype(np.int64)


def copies(looked: Looked) -> tuple[np.ndarray, np.ndarray]:
    """(documents,) bool each: a document before is the same; most of it is in documents before."""
    seen: set[bytes] = set()
    same = np.zeros(len(looked), dtype=bool)
    for i in range(len(looked)):
        digest = hashlib.blake2b(looked.document(i), digest_size=16).digest()
        same[i] = digest in seen
        seen.add(digest)
    found, document = fingerprints(looked)
    order = np.lexsort((document, found))
    first = np.ones(len(found), dtype=bool)
    first[order[1:]] = found[order[1:]] != found[order[:-1]]
    return same, _alike(document, ~first, len(looked)) & ~same


def overlap(train: Looked, held_out: Looked) -> np.ndarray:
    """(held-out documents,) bool: most of it is in the training documents."""
    there, _ = fingerprints(train)
    found, document = fingerprints(held_out)
    return _alike(document, np.isin(found, there), len(held_out))


def _alike(document: np.ndarray, known: np.ndarray, count: int) -> np.ndarray:
    of = np.bincount(document, minlength=count)
    return (of >= 8) & (np.bincount(document, known, minlength=count) >= ALIKE * of)


def invalid(text: bytes) -> int:
    """Bytes that are no part of a UTF-8 character."""
    return len(re.findall("[\udc80-\udcff]", text.decode("utf-8", "surrogateescape")))


def examine_texts(train: Corpus, held_out: Corpus, seq_len: int) -> tuple[list[Finding], dict[str, Any]]:
    """Findings, and numbers that are none: `data` of the summary, docs/diagnose.md."""
    a, b = draw(train), draw(held_out)
    if not len(a):
        return [], {}
    numbers = _bytes(a) | {
        "documents": len(train), "bytes": train.num_bytes, "examined_bytes": len(a.text),
        "document_bytes": {
            "median": float(np.median(train.sizes)), "p90": float(np.quantile(train.sizes, 0.9)),
            "longest": int(train.sizes.max()),
        },
    }  # fmt: skip
    out = _invalid(numbers)
    same, near = copies(a)
    sizes = a.end - a.begin
    for name, which in (("duplicate", same), ("near_duplicate", near)):
        numbers[f"{name}_share"] = share = float(sizes[which].sum() / max(len(a.text), 1))
        if share > COPIED_NOTE:
            out.append(_copied(f"{name}s", share, int(which.sum()), len(a)))
    if len(b):
        over = overlap(a, b)
        share = float((b.end - b.begin)[over].sum() / len(b.text))
        numbers["held_out"] = {"documents": len(held_out), "bytes": held_out.num_bytes, "overlap_share": share}
        if share > COPIED_NOTE:
            out.append(_overlap(share, int(over.sum()), len(b), len(a.text) < train.num_bytes))
        out += not_a_sample(a, b)
    longer = train.sizes > LONG * seq_len
    numbers["cut_share"] = float(train.sizes[train.sizes > seq_len].sum() / max(train.num_bytes, 1))
    if (share := float(train.sizes[longer].sum() / max(train.num_bytes, 1))) > CUT:
        why = [
            f"{percent(share)} of the bytes are in documents longer than {LONG} x seq_len {seq_len}; the median is "
            f"{np.median(train.sizes):,.0f} bytes. Each is cut, and a piece begins without what came before it."
        ]
        out.append(
            Finding("note", "cut_documents", "Documents are much longer than seq_len", why, ["a longer seq_len"])
        )
    return out, numbers


def _bytes(a: Looked) -> dict[str, Any]:
    histogram = np.bincount(a.text, minlength=256)
    p = histogram[histogram > 0] / max(len(a.text), 1)
    bad = [invalid(a.document(i)) for i in range(len(a))]
    return {
        "histogram": histogram.tolist(),
        "entropy": float(-(p * np.log2(p)).sum()),
        "ascii_share": float(histogram[:128].sum() / max(len(a.text), 1)),
        "invalid_bytes": sum(bad),
        "invalid_documents": sum(n > 0 for n in bad),
    }


def _invalid(numbers: dict[str, Any]) -> list[Finding]:
    bad, seen, histogram = numbers["invalid_bytes"], numbers["examined_bytes"], numbers["histogram"]
    if not bad:
        return []
    why = [
        f"{bad:,} of {seen:,} bytes ({100 * bad / seen:.2g} %) are no part of a UTF-8 character, in "
        f"{numbers['invalid_documents']:,} documents."
    ]
    if special := histogram[BOS] + histogram[EOS]:
        why.append(
            f"{special:,} of them are {BOS} or {EOS}, which mean the beginning and the end of a document to the model."
        )
    change = ["decode the text with the encoding it has and write UTF-8; leave out what is binary"]
    severity = "warning" if bad > 1e-4 * seen or special else "note"
    return [Finding(severity, "invalid_bytes", "The text is not all UTF-8", why, change)]


def _copied(name: str, share: float, count: int, of: int) -> Finding:
    what = (
        "are the same as one before"
        if name == "duplicates"
        else f"have {percent(ALIKE)} and more in common with others"
    )
    why = [f"{count:,} of {of:,} documents looked at, {percent(share)} of the bytes, {what}."]
    change = ["keep one of each; copies on both sides of the split make the held-out loss too good"]
    title = "Documents are there several times" + ("" if name == "duplicates" else ", almost")
    return Finding("warning" if share > COPIED else "note", name, title, why, change)


def _overlap(share: float, count: int, of: int, part: bool) -> Finding:
    least = ", at least: not all of the training text was looked at" if part else ""
    why = [
        f"{count:,} of {of:,} held-out documents, {percent(share)} of their bytes, are in the training text for "
        f"{percent(ALIKE)} or more{least}."
    ]
    change = ["remove copies before the split, or hold out by source"]
    severity = "critical" if share > 0.1 else "warning"
    return Finding(severity, "split_overlap", "Held-out text is trained on", why, change)


def not_a_sample(train: Looked, held_out: Looked) -> list[Finding]:
    """Held-out documents against training documents: bits a byte of each under pairs of bytes of other training
    documents. A part that was drawn at random is as probable as the rest."""
    halves = [np.arange(len(train)) % 2 == i for i in (0, 1)]
    few = len(held_out) < 5 or halves[1].sum() < 5  # documents: then pieces of them, which are alike
    size = 4096 if few else 0
    if few and min(len(train.text), len(held_out.text)) < 5 * size:
        return []
    if few:
        train, held_out = _blocks(train, size), _blocks(held_out, size)
        halves = [np.arange(len(train)) % 2 == i for i in (0, 1)]
    pairs = np.full((256, 256), 0.1)
    for i in np.flatnonzero(halves[0]):
        text = train.text[train.begin[i] : train.end[i]]
        np.add.at(pairs, (text[:-1], text[1:]), 1)
    cost = -np.log2(pairs / pairs.sum(1, keepdims=True))
    rest, held = (_bits(x, cost, which) for x, which in ((train, halves[1]), (held_out, np.ones(len(held_out), bool))))
    if min(len(rest), len(held)) < 5:
        return []
    gap = held.mean() - rest.mean()
    error = max(rest.std(), held.std()) * np.sqrt(1 / len(rest) + 1 / len(held))
    if abs(gap) < max(SIGMA * error, (GAP_OF_ONE if few else GAP) * rest.mean()):
        return []
    what = "pieces" if few else "documents"
    why = [
        f"Under pairs of bytes of other training {what}, {len(held)} held-out {what} take {held.mean():.3f} bits a "
        f"byte and {len(rest)} training {what} {rest.mean():.3f}: {percent(gap / rest.mean())} apart, "
        f"{abs(gap) / max(error, 1e-12):.0f} standard errors. Drawn at random they would not be."
    ]
    change = ["leave val_data empty, which holds out documents at random; a tail is one author, one date or one topic"]
    title = "The held-out text differs in kind from the training text"
    return [Finding("warning", "split_shift", title, why, change, confidence="low" if few else "")]


def _blocks(looked: Looked, size: int) -> Looked:
    begin = np.arange(0, len(looked.text) - size + 1, size, dtype=np.int64)
    return Looked(looked.text, begin, begin + size)


def _bits(looked: Looked, cost: np.ndarray, which: np.ndarray) -> np.ndarray:
    out = []
    for i in np.flatnonzero(which):
        text = looked.text[looked.begin[i] : looked.end[i]]
        if len(text) > 64:
            out.append(cost[text[:-1], text[1:]].mean())
    return np.array(out)
