"""Other trainers' configs under our keys: files of TOML, JSON or YAML, and what a log prints before its first step."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from hnet.config.keys import parse_toml, read_json
from hnet.errors import UserError, user_path

ENDINGS = (".toml", ".json", ".yaml", ".yml")
_KEYS = {
    "steps": "steps max_steps total_steps num_steps train_steps training_steps num_train_steps max_train_steps "
    "max_iters total_iters train_iters num_iterations planned_steps total_training_steps",
    "learning_rate": "learning_rate lr base_lr max_lr peak_lr base_learning_rate max_learning_rate peak_learning_rate",
    "lr_multipliers": "lr_multipliers lr_multiplier lr_mults lr_mult stage_lr_multipliers lr_multipliers_per_stage "
    "lr_scales lr_modulation",
    "warmup_steps": "warmup_steps warmup_iters num_warmup_steps warmup lr_warmup_steps lr_warmup_iters",
    "warmup_fraction": "warmup_fraction warmup_ratio warmup_frac",
    "max_grad_norm": "max_grad_norm grad_clip clip_grad gradient_clip gradient_clipping gradient_clip_val "
    "clip_grad_norm grad_clip_norm clip_norm clip_grad_max_norm grad_clipping max_norm",
    "seq_len": "seq_len sequence_length seq_length block_size max_seq_len max_seq_length context_length",
    "accumulation": "accumulation gradient_accumulation_steps grad_accum_steps grad_accum gradient_accumulation "
    "accumulate_grad_batches",
    "batch_size": "batch_size micro_batch_size per_device_train_batch_size train_batch_size global_batch_size "
    "device_batch_size",
    "weight_decay": "weight_decay wd adam_weight_decay",
    "dropout": "dropout hidden_dropout resid_dropout",
    "betas": "betas adam_betas",
    "beta1": "beta1 adam_beta1",
    "beta2": "beta2 adam_beta2",
    "zero_grad_every": "zero_grad_every zero_grad_interval zero_grad_steps zero_grad_freq",
    "ratio_weight": "ratio_weight ratio_loss_weight lb_weight lb_loss_weight load_balancing_weight lb_coef "
    "load_balancing_loss_weight",
    "compression": "compression target_compression compression_ratios target_ratios downsampling_factors",
    "temperature": "temperature sample_temperature gen_temperature sampling_temperature generation_temperature",
    "top_p": "top_p sample_top_p gen_top_p sampling_top_p generation_top_p",
    "repetition_penalty": "repetition_penalty rep_penalty generation_repetition_penalty",
    "packing": "packing pack packed sample_packing pack_sequences packed_sequences use_packing pack_documents",
    "cu_seqlens": "cu_seqlens use_cu_seqlens pass_cu_seqlens document_mask document_masking doc_mask varlen "
    "reset_attention_mask intra_document_masking mask_documents",
    "split": "split val_split split_by validation_split",
    "parameters": "parameters num_parameters n_params num_params total_params total_parameters params model_parameters "
    "parameter_count model_size n_parameters model_size_params",
}  # fmt: skip
_NOT_OURS = {"zero_grad_every", "temperature", "top_p", "repetition_penalty", "packing", "cu_seqlens", "parameters"}
_OURS = {name: ours for ours, names in _KEYS.items() for name in names.split()}
_PAIR = re.compile(
    r"([A-Za-z_][\w.]*(?:[ ][a-z_]+)?)['\"]?\s*[:=]\s*(\[[^\]]*\]|\([^)]*\)|'[^']*'|\"[^\"]*\"|[^\s,;|)}]+)"
)
_COUNT = re.compile(r"([\d.,]*\d)\s*([kKmMbB](?:illion)?)?\s*(?:trainable |total )?(?:params\b|parameters\b)", re.I)
_SCALE = {"k": 1e3, "m": 1e6, "b": 1e9}


def is_foreign(keys: dict[str, Any]) -> bool:
    """Some key of these is another trainer's name for one of ours, or one that only others have."""
    return any(_OURS.get(_plain(k), k) != k or k in _NOT_OURS for k in keys)


def ours(values: dict[str, Any]) -> dict[str, Any]:
    """The values with our keys beside those of others; ours win."""
    out = dict(values)
    for name, value in values.items():
        key = _OURS.get(_plain(name))
        if key and key not in out:
            out[key] = value
    if isinstance(m := out.get("lr_multipliers"), (dict, tuple)):
        out["lr_multipliers"] = list(m.values()) if isinstance(m, dict) else list(m)
    if isinstance(m, str) and re.fullmatch(r"[\d.]+([,/ ]+[\d.]+)+", m):
        out["lr_multipliers"] = [float(v) for v in re.findall(r"\d+\.?\d*|\.\d+", m)]
    if isinstance(size := out.get("parameters"), str):
        out["parameters"] = count(size)
    return out


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower()).rsplit(".", 1)[-1]


def count(text: str) -> float | None:
    """ "1.6B", "1,600,000,000" -> 1.6e9; None for anything else."""
    m = re.fullmatch(r"\s*([\d.,]*\d)\s*([kKmMbB])?\w*\s*", text)
    try:
        return float(m[1].replace(",", "")) * _SCALE.get((m[2] or "").lower(), 1.0) if m else None
    except ValueError:
        return None


def read_any(path: Path) -> dict[str, Any]:
    """Keys of a config file, tables flattened. W&B's {"key": {"value": v}} is its v.

    Raises:
        UserError: it does not hold keys and values.
    """
    if path.suffix == ".toml":
        values: Any = parse_toml(path)
    elif path.suffix == ".json":
        values = read_json(path)
    else:
        with user_path(path):
            values = _yaml(path.read_text(errors="replace"))
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no keys and values")
    flat: dict[str, Any] = {}
    _flatten(values, flat)
    return flat


def _flatten(values: dict[str, Any], flat: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and "value" in value and value.keys() <= {"value", "desc"}:
            value = value["value"]
        if isinstance(value, dict) and _OURS.get(_plain(str(key))) != "lr_multipliers":
            _flatten(value, flat)
        else:
            flat.setdefault(str(key), value)


def _yaml(text: str) -> dict[str, Any]:
    """Keys and values of a YAML file, one a line, lists in brackets or below; all tables as one."""
    flat: dict[str, Any] = {}
    last = ""
    for line in text.splitlines():
        line = line.split(" #")[0].rstrip()
        if (m := re.match(r"\s*-\s+(.*)", line)) and last:
            kept = flat.get(last)
            flat[last] = [*kept, literal(m[1])] if isinstance(kept, list) else [literal(m[1])]
        elif m := re.match(r"\s*['\"]?([\w./-]+)['\"]?\s*:\s*(.*)", line):
            if m[1] == "value" and last:  # W&B
                flat[last] = literal(m[2]) if m[2] else None
            elif m[1] != "desc":
                last = m[1]
                flat[last] = literal(m[2]) if m[2] else None
    return {k: v for k, v in flat.items() if v is not None}


def literal(text: str) -> Any:
    """A number, truth value, list or string as it is written in a config."""
    text = text.strip().rstrip(",")
    if text.lower() in ("true", "false", "yes", "no", "on", "off"):
        return text.lower() in ("true", "yes", "on")
    for parse in (ast.literal_eval, json.loads, lambda t: float(t.replace(",", "").replace("_", ""))):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        return list(value) if isinstance(value, tuple) else value
    return text.strip("'\"")


def printed(lines: list[str]) -> dict[str, Any]:
    """What a log says of its config before its first step: "max_steps: 100000", Namespace(lr=3e-4, ...), "1.6B
    parameters". Only keys that are known."""
    out: dict[str, Any] = {}
    for line in lines:
        for m in _PAIR.finditer(line):
            key = _OURS.get(_plain(m[1])) or _OURS.get(_plain(m[1].split()[-1]))
            if key and key not in out:
                value = literal(m[2])
                out[key] = count(m[2]) if key == "parameters" else value
        if (said := _COUNT.search(line)) and "parameters" not in out:
            out["parameters"] = count(said[1] + (said[2] or "")[:1])
    return {k: v for k, v in out.items() if v is not None}
