"""The runs: one fault each, with the findings that would name it; and healthy ones, which must have none critical."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import drivers

TWO_STAGES = {"arch": "c1 c1 T1", "d_model": [32, 64, 96], "compression": [3.0, 2.0]}
BASE: dict[str, Any] = {
    "arch": "c1 T1", "d_model": [48, 64], "compression": [4.0], "ratio_weight": "auto", "steps": 120,
    "warmup_steps": 6, "learning_rate": 3e-3, "seq_len": 256, "batch_bytes": 2048, "eval_every": 30,
    "eval_bytes": 8192, "checkpoint_every": 120, "sample_bytes": 0, "plots": False, "device": "cpu",
    "val_fraction": 0.08, "surprisal_weight": [0.1], "entropy_weight": [0.2],
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """found_by: ids of findings any of which names the fault; none for a healthy run. keys: of the config, over BASE.
    text: which of `texts`. drive: bends the trainer before its first step. after: changes the run directory."""

    name: str
    found_by: tuple[str, ...] = ()
    keys: dict[str, Any] = field(default_factory=dict)
    text: str = "plain"
    drive: Callable[[Any], None] | None = None
    after: Callable[[Any], None] | None = None
    chunk_lm: bool = False
    small: bool = False  # also a test
    unseen: str = ""  # see UNSEEN: "learnt" or "fresh"
    at_first: tuple[str, ...] = ()


FAULTS = (
    Run("multiplier spread", ("lr_multipliers",), TWO_STAGES | {"lr_multipliers": [9.0, 3.0, 1.0]}),
    Run("multipliers grow inwards", ("lr_multipliers",), TWO_STAGES | {"lr_multipliers": [1.0, 1.5, 2.0]}),
    Run("no warm-up", ("warmup",), {"warmup_steps": 0, "learning_rate": 1e-2}),
    Run("warm-up as long as the run", ("warmup_all",), {"warmup_steps": 120}),
    Run(
        "gradients not zeroed", ("grad_sawtooth",), {"learning_rate": 1e-3, "clipping": "off"},
        drive=drivers.zero_rarely, small=True,
    ),
    Run("gradients not zeroed, clipped", ("grad_sawtooth",), {"learning_rate": 1e-3}, drive=drivers.zero_rarely),
    Run("leaking documents", ("leak",), drive=drivers.leak, small=True),
    Run("clip too tight", ("clip_tight",), {"max_grad_norm": 0.02}),
    Run("no clipping", ("no_clipping",), {"clipping": "off"}),
    Run("stopped early", ("unfinished",), drive=drivers.stop_at_a_third),
    Run("collapse to bytes", ("collapse_open",), {"ratio_weight": 0.0}, drive=drivers.biased(12.0)),
    Run("collapse to documents", ("collapse_closed",), {"ratio_weight": 0.0}, drive=drivers.biased(-12.0)),
    Run("undecided router", ("undecided",), {"surprisal_weight": [0.0], "entropy_weight": [0.0]}),
    Run("dead router", ("router_dead",), drive=drivers.dead_router),
    Run("frozen router", ("router_frozen",), drive=drivers.frozen_router),
    Run("equal widths", ("widths",), {"d_model": [64, 64]}),
    Run("alpha 0", ("ratio_weight", "target_missed"), {"ratio_weight": 0.0}),
    Run("validation not random", ("split_shift", "split_tail"), {"held_out": True}, text="another_kind"),
    Run("validation trained on", ("split_overlap",), {"held_out": True}, text="held_out_copies"),
    Run("duplicates", ("duplicates",), text="duplicated"),
    Run("near-duplicates", ("near_duplicates",), text="nearly_duplicated"),
    Run("invalid bytes", ("invalid_bytes",), text="invalid"),
    Run("too hot sampling", ("sampling",), after=drivers.write_sampling),
    Run("learning rate too high", ("lr_high", "non_finite", "loss_spike", "grad_explosion"), {"learning_rate": 0.1}),
    Run(
        "plateau, rate still up", ("plateau", "lr_end"), {"schedule": "constant", "steps": 160}, text="random_bytes"
    ),
    Run(
        "over-fitting", ("overfitting", "many_passes"),
        {"held_out": True, "steps": 300, "learning_rate": 1e-2, "d_model": [96, 128]}, text="few",
    ),
    Run("batch too small", ("small_batch",), {"batch_bytes": 256, "seq_len": 256}),
    Run("short patience", ("patience",), {"patience": 2}),
    Run(
        "resumed without its state", ("resume_lr", "resume_loss", "lr_jump", "loss_spike"),
        drive=drivers.forget_on_resume,
    ),
    Run(
        "stages logged as one", ("stage_norms", "ratio_blind"), TWO_STAGES | {"lr_multipliers": [2.0, 1.5, 1.0]},
        after=drivers.drop_stages,
    ),
)  # fmt: skip

# Faults that no rule was made for. `at_first`: what named each when it was trained and judged for the first time; the
# first twelve then had rules made for them, the rest were written down after that and have had none.
UNSEEN = (
    Run("weight decay far too high", ("weight_decay",), {"weight_decay": 10.0}, unseen="learnt"),
    Run("moments swapped", ("betas",), {"betas": [0.999, 0.9]}, unseen="learnt"),
    Run("sorted by length", ("data_order",), {"documents": "paragraph"}, drive=drivers.by_length, unseen="learnt"),
    Run(
        "model sees what it predicts", ("too_good", "not_reproduced"), drive=drivers.sees_what_it_predicts,
        unseen="learnt",
    ),
    Run(
        "evaluated on training text", ("not_reproduced",),
        {"held_out": True, "steps": 300, "learning_rate": 1e-2, "d_model": [96, 128]}, text="few",
        drive=drivers.evaluates_on_training_text, unseen="learnt",
    ),
    Run("dropout 0.9", ("dropout",), {"dropout": 0.9}, unseen="learnt"),
    Run("schedule ends at once", ("lr_gone",), drive=drivers.decays_at_once, unseen="learnt"),
    Run("some batches are NaN", ("non_finite",), drive=drivers.some_nan, unseen="learnt", at_first=("non_finite",)),
    Run("ratio loss far too strong", ("ratio_weight",), {"ratio_weight": 40.0}, unseen="learnt"),
    Run("innermost network not trained", ("weights_untrained",), drive=drivers.inner_left_out, unseen="learnt"),
    Run(
        "one batch again and again", ("overfitting", "same_batch"), drive=drivers.one_batch, unseen="learnt",
        at_first=("overfitting",),
    ),
    Run("learning rate far too low", ("not_learning", "plateau"), {"learning_rate": 1e-6}, unseen="learnt"),
    Run("outermost stage not trained", ("weights_untrained",), drive=drivers.outer_left_out, unseen="fresh"),
    Run("targets two ahead", ("not_reproduced", "same_batch"), drive=drivers.two_ahead, unseen="fresh"),
    Run(
        "router learns 1,000 times faster", ("drift", "target_missed", "grad_explosion", "collapse_open"),
        {"router_lr": 100.0}, unseen="fresh",
    ),
    Run("text in UTF-16", ("invalid_bytes",), text="utf16", unseen="fresh"),
    Run("optimiser forgets every 10 steps", ("loss_spike", "resume_loss"), drive=drivers.forgetful, unseen="fresh"),
    Run("loss summed, not averaged", ("clip_tight",), drive=drivers.summed, unseen="fresh"),
    Run(
        "evaluated in training mode", ("not_reproduced",), {"dropout": 0.3},
        drive=drivers.evaluates_in_training_mode, unseen="fresh",
    ),
    Run("slower and slower", ("slow",), drive=drivers.slower_and_slower, unseen="fresh"),
)  # fmt: skip

HEALTHY = (
    Run(
        "laptop",
        keys={
            "arch": "", "d_model": [], "preset": "laptop", "ngrams": [2, 3, 4], "ngram_rows": 4096, "steps": 200,
            "rate_control": "bias", "optimizer": "muon", "learning_rate": 1e-2, "decay_fraction": 0.4,
        },
    ),
    Run(
        "small",
        keys={
            "arch": "", "d_model": [], "preset": "small", "steps": 80, "batch_bytes": 1024, "learning_rate": 1e-3,
        },
    ),
    Run("two stages", keys=TWO_STAGES | {"lr_multipliers": [2.0, 1.5, 1.0]}),
    Run("ChunkLM", chunk_lm=True),
    Run("Muon", keys={"optimizer": "muon", "learning_rate": 5e-3}, small=True),
    Run("char-start", keys={"boundaries": "char-start"}),
)  # fmt: skip
