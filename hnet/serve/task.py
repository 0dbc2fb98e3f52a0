"""What the body of a request asks for, checked. Every mistake in it is an `ApiError` below 500."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import Any

from hnet.errors import UserError
from hnet.generate import SamplingConfig
from hnet.generate.request import checked_options

from .errors import ApiError
from .limits import Limits

SETTINGS = tuple(f.name for f in fields(SamplingConfig))
OPENAI = ("model", "prompt", "max_tokens", "n", "echo", "stream", "stream_options", "stop", "seed", "user", "best_of",
          "suffix")  # fmt: skip
OWN = ("stop_at_eos", "chunks")
KNOWN = {*SETTINGS, *OPENAI, *OWN}
DEFAULT_TOKENS = 256
LARGEST = 1e4  # of any number that goes into logits: far beyond use, far below where fp32 ends
COLDEST = 1e-4  # a temperature; logits divided by less leave fp32
MOST_STOPS, LONGEST_STOP = 16, 256  # each costs the host time for every byte


@dataclass(frozen=True)
class Task:
    """prompts: bytes each.  n: texts for each prompt.  usage: a stream ends with what it used.  chunks: say where
    they begin.  The rest is as in `Engine.submit`; text i has seed + i."""

    prompts: list[bytes]
    config: SamplingConfig
    n: int
    max_tokens: int
    seed: int
    stop: tuple[bytes, ...]
    stop_at_eos: bool
    echo: bool
    stream: bool
    usage: bool
    chunks: bool

    @property
    def texts(self) -> int:
        return len(self.prompts) * self.n


def parse(body: bytes, limits: Limits, model: str) -> Task:
    """
    Raises:
        ApiError: 400; 404 where another model is asked for.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the body is not JSON: {e}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, "the body must be an object of JSON", code="invalid_json")
    given = {name: value for name, value in given.items() if value is not None}  # null is the default
    for name in given:
        if name not in KNOWN:
            raise ApiError(400, f"unknown option {name[:80]!r}", param=name[:80], code="unknown_option")
    if "model" in given and given["model"] != model:
        raise ApiError(404, f"model must be {model!r}", param="model", code="model_not_found")
    if given.get("suffix"):
        raise wrong("suffix", "suffix must be empty: the model writes from left to right")
    n = whole(given, "n", 1, 1, limits.texts)
    if given.get("best_of", n) != n:
        raise wrong("best_of", f"best_of must be n ({n}), got {given['best_of']!r}")
    prompts = read_prompts(given, limits)
    if len(prompts) * n > limits.texts:
        raise wrong("n", f"{len(prompts)} prompts with n {n} are more than {limits.texts} texts")
    echo, logprobs = flag(given, "echo"), given.get("logprobs")
    if echo and logprobs is not None:
        raise wrong("logprobs", "logprobs must be left out with echo: a prompt's are not known")
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise wrong("stream_options", "stream_options must be an object with include_usage")
    max_tokens = whole(given, "max_tokens", min(DEFAULT_TOKENS, limits.max_tokens), 0, limits.max_tokens)
    config, stop_at_eos = settings(given), flag(given, "stop_at_eos", True)
    check_stop(given.get("stop", []))
    try:
        seed, stop = checked_options(config, max_tokens, given.get("seed"), given.get("stop", []), stop_at_eos)
    except (UserError, UnicodeEncodeError) as e:
        raise wrong(str(e).split()[0] if isinstance(e, UserError) else "stop", str(e)) from None
    return Task(prompts, config, n, max_tokens, seed, stop, stop_at_eos, echo, flag(given, "stream"),
                flag(options, "include_usage"), flag(given, "chunks"))  # fmt: skip


def wrong(param: str, message: str) -> ApiError:
    return ApiError(400, message[:500], param=param if param in KNOWN else None)


def flag(given: dict[str, Any], name: str, default: bool = False) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, f"{name} must be true or false, got {value!r:.80}")
    return default if value is None else value


def whole(given: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = given.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise wrong(name, f"{name} must be a whole number from {low} to {high}, got {value!r:.80}")
    return value


def read_prompts(given: dict[str, Any], limits: Limits) -> list[bytes]:
    """Of a text, a list of texts, of bytes as numbers, or of lists of those."""
    prompt = given.get("prompt", "")
    one = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(b) is int for b in prompt))
    prompts = [prompt] if one else prompt
    if not isinstance(prompts, list) or not prompts or len(prompts) > limits.texts:
        raise wrong("prompt", f"prompt must be a text or a list of 1 to {limits.texts} texts")
    found = []
    for p in prompts:
        if isinstance(p, str):
            try:
                data = p.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                raise wrong("prompt", "prompt holds half of a surrogate pair") from None
        elif isinstance(p, list) and all(type(b) is int and 0 <= b <= 255 for b in p):
            data = bytes(p)
        else:
            raise wrong("prompt", "prompt must be text, or bytes as numbers from 0 to 255")
        if not data:
            raise wrong("prompt", "prompt must hold at least one byte")
        if len(data) > limits.max_prompt_bytes:
            raise ApiError(
                400, f"a prompt of {len(data)} bytes is over the limit of {limits.max_prompt_bytes}", param="prompt",
                code="context_length_exceeded",
            )  # fmt: skip
        found.append(data)
    return found


def check_stop(stop: Any) -> None:
    many = stop if isinstance(stop, list) else [stop]
    if len(many) > MOST_STOPS or any(isinstance(s, str) and len(s) > LONGEST_STOP for s in many):
        raise wrong("stop", f"stop must be at most {MOST_STOPS} texts of at most {LONGEST_STOP} characters")


def settings(given: dict[str, Any]) -> SamplingConfig:
    own = {name: given[name] for name in SETTINGS if name in given}
    if "logit_bias" in own:
        bias = own["logit_bias"]
        if not isinstance(bias, dict):
            raise wrong("logit_bias", "logit_bias must be an object of bytes and numbers")
        try:  # keys of JSON are texts
            own["logit_bias"] = {int(byte): as_float("logit_bias", value) for byte, value in bias.items()}
        except ValueError:
            raise wrong("logit_bias", 'logit_bias must have bytes as keys, "0" to "255"') from None
    for f in fields(SamplingConfig):
        if f.type == "float" and f.name in own:
            own[f.name] = as_float(f.name, own[f.name])
    if 0 < own.get("temperature", 0) < COLDEST:
        raise wrong("temperature", f"temperature must be 0 or at least {COLDEST:g}, got {own['temperature']}")
    try:
        return SamplingConfig(**own)
    except (UserError, OverflowError) as e:
        raise wrong(next((name for name in own if name in str(e)), ""), str(e)) from None


def as_float(name: str, value: Any) -> float:
    """What goes to the device must fit it: an overflow there would end the texts of others."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or (isinstance(value, float) and not math.isfinite(value)) or abs(value) > LARGEST:
        raise wrong(name, f"{name} must be a number of at most {LARGEST:g}, got {value!r:.80}")
    return float(value)
