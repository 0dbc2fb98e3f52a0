"""Sampling once more, a byte at a time in plain Python from the definitions; shares no code with hnet.generate."""

import math


def is_utf8_so_far(text: bytes) -> bool:
    """Could be the beginning of valid UTF-8, by Python's own decoder."""
    try:
        text.decode()
    except UnicodeDecodeError as e:
        return e.reason == "unexpected end of data"
    return True


def is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def longest_repeat(text: bytes, byte: int, window: int) -> int:
    """The longest end of the text that was in it before, followed by `byte` at one of the last `window` positions."""
    best = 0
    for at in range(max(0, len(text) - window), len(text)):
        if text[at] == byte:
            n = 0
            while n < at and text[at - 1 - n] == text[len(text) - 1 - n]:
                n += 1
            best = max(best, n)
    return best


def probabilities(logits, config, prompt: bytes, new: bytes, limit=None, bos=False, eos=True) -> list[float]:
    """Of every byte, after everything but the draw."""
    text, x = prompt + new, [float(v) for v in logits]
    window = text[-config.repetition_window :] if config.repetition_window else b""
    for b in set(window):
        x[b] = x[b] / config.repetition_penalty if x[b] > 0 else x[b] * config.repetition_penalty
    for b in range(256):
        x[b] -= config.frequency_penalty * new.count(b) + (config.presence_penalty if b in new else 0)
        x[b] += config.logit_bias.get(b, 0.0)
        if config.dry_multiplier:
            n = longest_repeat(text, b, config.dry_window)
            if n >= config.dry_allowed:
                x[b] -= min(config.dry_multiplier * config.dry_base ** (n - config.dry_allowed), 1e4)
    allowed = {b for b in range(256) if bos or b != 254}
    if config.valid_utf8:
        allowed = {b for b in allowed if is_utf8_so_far(new + bytes([b]))}  # of prompts that end between characters
        if eos and is_utf8(new):
            allowed.add(255)
        if limit is not None:  # completions of every length that is left
            ends = [bytes(tail) for k in range(limit - len(new)) for tail in fillings(k)]
            allowed = {b for b in allowed if b == 255 or any(is_utf8(new + bytes([b]) + end) for end in ends)}
    if n := config.no_repeat_ngram:
        grams = {text[i : i + n] for i in range(len(text) - n + 1)}
        free = {b for b in allowed if len(text) < n - 1 or (text[len(text) - n + 1 :] + bytes([b])) not in grams}
        allowed = free or allowed
    if config.temperature == 0:
        best = max(allowed, key=lambda b: (x[b], -b))
        return [float(b == best) for b in range(256)]
    top = max(x[b] for b in allowed)
    p = [math.exp((x[b] - top) / config.temperature) if b in allowed else 0.0 for b in range(256)]
    p = [v / sum(p) for v in p]
    order = sorted(range(256), key=lambda b: (-p[b], b))
    if config.top_k:
        order = order[: config.top_k]
    share, kept, total = 0.0, [], sum(p[b] for b in order)
    for b in order:
        if config.top_p == 1 or share < config.top_p * total:
            kept.append(b)
        share += p[b]
    kept = [b for b in kept if p[b] >= config.min_p * p[order[0]]]
    return [p[b] if b in kept else 0.0 for b in range(256)]


def fillings(count: int):
    """Continuation bytes that end any character which can still end."""
    for first in (0x80, 0x90, 0xA0):
        yield [first] * min(count, 1) + [0x80] * (count - 1)


def splitmix64(seed: int):
    """The generator as published (Steele, Lea, Flood 2014)."""
    mask = 2**64 - 1
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        yield z ^ (z >> 31)


def noises(seed: int, drawn: int, count: int) -> list[float]:
    """Exponential numbers of the byte after `drawn` others."""
    start = next(splitmix64(seed))
    numbers = splitmix64((start + drawn * 256 * 0x9E3779B97F4A7C15) % 2**64)
    return [-math.log(((next(numbers) >> 12) + 0.5) / 2**52) for _ in range(count)]
