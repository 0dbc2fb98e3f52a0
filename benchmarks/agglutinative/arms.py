"""Settings that are compared, in the order of the table."""

from __future__ import annotations

from typing import Any

# What two cores can train in minutes, in place of the recipe's m4 T4: the laptop's network and optimiser
SMALL: dict[str, Any] = {
    "arch": "", "d_model": [], "preset": "laptop", "dropout": 0.0, "optimizer": "muon", "learning_rate": 1e-2,
    "lr_multipliers": [], "schedule": "wsd", "decay_fraction": 0.4, "min_lr": 0.0, "warmup_fraction": 0.05,
    "batch_bytes": 4096, "seq_len": 256, "patience": 0, "device": "cpu", "plots": False, "sample_bytes": 0,
}  # fmt: skip
DECIDED = {
    "surprisal_weight": [0.1], "surprisal_warmup": 0.1, "entropy_weight": [0.2], "entropy_start": 0.3,
    "entropy_warmup": 0.3,
}  # fmt: skip
UNDECIDED = {"surprisal_weight": [0.0], "entropy_weight": [0.0]}
ARMS: dict[str, dict[str, Any]] = {
    "recipe": DECIDED | {"boundaries": "char-end"},
    "recipe, char-start": DECIDED | {"boundaries": "char-start"},
    "recipe, no mask": DECIDED | {"boundaries": "any"},
    "old": UNDECIDED | {"boundaries": "any", "rate_control": "none", "ratio_weight": 0.03},
    # a target just above 1 weighs every position that is no boundary a hundredfold
    "one byte a chunk": UNDECIDED | {"boundaries": "any", "rate_control": "none", "compression": [1.01]},
}
