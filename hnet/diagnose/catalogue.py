"""Every finding there is: the analysis it belongs to, how sure it can be, and what would show it to be wrong."""

from __future__ import annotations

from typing import NamedTuple

ANALYSES = ("training", "architecture", "configuration", "data", "generation", "segmentation")


class Entry(NamedTuple):
    analysis: str
    confidence: str  # unless a rule knows better
    meaning: str
    refute: str


def _entries(analysis: str, rows: dict[str, tuple[str, str, str]]) -> dict[str, Entry]:
    return {name: Entry(analysis, *row) for name, row in rows.items()}


CATALOGUE: dict[str, Entry] = {
    **_entries(
        "training",
        {
            "non_finite": (
                "high",
                "a loss or gradient norm was NaN or infinite",
                "the trainer writes NaN for what it did not measure",
            ),
            "loss_spike": ("high", "the loss jumped far above its noise", "a change of data or loss at that step"),
            "warmup": (
                "medium",
                "the warm-up is short for the model's size, or the first steps are unstable",
                "the same run with the longer warm-up shows the same first steps",
            ),
            "grad_explosion": (
                "high",
                "the gradient norm grew, or burst, far above its median",
                "one bad document at each burst, which the same seed shows again at any learning rate",
            ),
            "lr_multipliers": (
                "medium",
                "multipliers of the learning rate lie far apart, or grow inwards",
                "gradient norms and losses by stage are as steady as with multipliers closer together",
            ),
            "stage_norms": (
                "high",
                "several stages and one gradient norm: which of them bursts stays unknown",
                "the norms of the stages are logged elsewhere",
            ),
            "clip_tight": (
                "medium",
                "clipping acts at most steps, or cuts bursts to a sliver of themselves",
                "a run with the higher limit reaches no lower loss: AdamW divides a constant factor out",
            ),
            "grad_sawtooth": (
                "medium",
                "the gradient norm rises and falls back in equal periods: gradients are not zeroed at every step",
                "the training loop zeroes gradients at every update, and batches have a period of their own",
            ),
            "not_learning": (
                "high",
                "the loss stays where an untrained model's is",
                "the text is random, so that there is nothing to learn",
            ),
            "too_good": (
                "medium",
                "the held-out loss is lower than any model of text reaches",
                "the text is so regular that bits a byte of a compressor are as few",
            ),
            "not_reproduced": (
                "high",
                "the checkpoint does not have the held-out loss that was logged at its step",
                "the data or the split changed since",
            ),
            "unfinished": (
                "high",
                "the log ends before the steps that were planned",
                "the run is still going on, or its log was cut",
            ),
            "early_stop_metric": (
                "high",
                "it stopped early, or would, on cross entropy plus ratio loss",
                "the monitored quantity is the held-out cross entropy alone",
            ),
            "early_stop_noise": (
                "medium",
                "it stopped early on the noise of its evaluations",
                "resuming brings no better evaluation",
            ),
            "overfitting": (
                "high",
                "the held-out loss rises while the training loss falls",
                "the held-out text changed, or is of another kind than the training text",
            ),
            "plateau": (
                "medium",
                "the loss is flat while the learning rate is still up",
                "with the rate brought down the loss stays where it is",
            ),
            "out_of_memory": ("high", "it ran out of memory", "the message in the log is of another process"),
            "disk_full": ("high", "a checkpoint could not be written", "the message in the log is of another process"),
            "lr_end": (
                "medium",
                "the learning rate ends high, or never decays",
                "a decay of the last part brings no lower loss",
            ),
            "lr_gone": (
                "high",
                "the learning rate is zero, or down long before the last step",
                "the last part was meant to be without learning, to average weights say",
            ),
            "cutoff_regressed": ("high", "the cutoff of a ChunkLM went back", "two runs write into one log"),
            "resume_lr": ("high", "resuming changed the learning rate", "the change was asked for"),
            "resume_loss": ("medium", "the loss jumped on resuming", "the data changed on purpose"),
            "step_regressed": ("medium", "the steps of the log go back", "the log was put together from several"),
            "lr_restart": ("high", "a restart of the learning rate lasts one step", "the restart was meant to be one"),
            "lr_jump": ("medium", "the learning rate jumps up", "the jump was planned"),
            "cutoff_lr": (
                "medium",
                "the cutoff rose while the learning rate was not at its peak",
                "the loss recovers as fast as after other raises",
            ),
            "cutoff_loss": (
                "medium",
                "an epoch after a raise of the cutoff the loss had not recovered",
                "it recovers in the epochs after",
            ),
        },
    ),
    **_entries(
        "architecture",
        {
            "widths": (
                "medium",
                "widths do not grow inwards",
                "a run of equal cost with growing widths is no better",
            ),
            "weights_broken": ("high", "weights hold NaN or infinity", "another checkpoint of that step is whole"),
            "weights_untrained": (
                "high",
                "matrices are zero after training, or norms of a stage all 1",
                "they are not used, or frozen, on purpose",
            ),
            "weights_grown": ("medium", "matrices grew a hundredfold", "the loss is as good as with smaller ones"),
            "router_dead": (
                "high",
                "a router whose p is the same everywhere, or whose projections lost their rank",
                "p differs from place to place on other text",
            ),
            "router_frozen": (
                "high",
                "a router is the identity it began as",
                "its rate was 0 on purpose",
            ),
            "router_saturated": (
                "medium",
                "p is 0 or 1 almost everywhere, and the rate is far from its target",
                "the rate comes back with more steps",
            ),
        },
    ),
    **_entries(
        "configuration",
        {
            "warmup_all": ("high", "the warm-up is as long as the run", "the run was planned to go on"),
            "warmup_decay": ("high", "warm-up and decay overlap", "the schedule is of another kind"),
            "lr_high": ("medium", "a high learning rate for the optimiser", "the loss falls no faster at half of it"),
            "no_clipping": ("high", "gradients are not clipped", "the norms of the log have no bursts"),
            "weight_decay": (
                "medium",
                "weight decay takes away what is learnt within a few steps",
                "with a weight decay of 0.1 the loss is no lower",
            ),
            "betas": ("medium", "moments of the optimiser far from the usual ones", "0.9 and 0.95 are no better"),
            "dropout": ("high", "most of the network is dropped in training", "with a dropout of 0.1 it is no better"),
            "ratio_weight": (
                "medium",
                "a ratio loss that is weak, or ten times too strong, for the size of the model",
                "the realised bytes per chunk are at their targets",
            ),
            "target_range": ("low", "an unusual compression target", "the run reaches it at no worse a loss"),
            "patience": ("medium", "a short patience", "evaluations have next to no noise"),
            "eval_bytes": ("medium", "small evaluations", "two evaluations of one checkpoint on other text agree"),
            "eval_every": ("high", "few evaluations", "evaluations were made elsewhere"),
            "zero_grad": (
                "high",
                "the config zeroes gradients at other steps than the optimiser takes",
                "the key means something else in that trainer",
            ),
            "leak": (
                "low",
                "documents of a pack see each other, or nothing says that they are kept apart",
                "perturb one document of a pack: the logits of the others do not move",
            ),
            "sampling": (
                "medium",
                "text is sampled too hot: from the model's whole distribution, without a penalty",
                "samples at the cooler settings are no better",
            ),
        },
    ),
    **_entries(
        "data",
        {
            "many_passes": ("medium", "many passes over the data", "the held-out loss still falls"),
            "few_passes": ("high", "little of the data is seen", "the run is a trial"),
            "few_bytes": ("medium", "few training bytes for the model", "a smaller model is worse at equal compute"),
            "small_batch": ("medium", "the batch is too small for its noise", "a larger one is no less noisy"),
            "split_overlap": ("high", "held-out text is trained on", "the files only have the same names"),
            "split_tail": ("medium", "the tail of the corpus is held out", "the corpus was shuffled by document"),
            "split_shift": (
                "medium",
                "the held-out text differs in kind from the training text",
                "held-out documents drawn at random show the same gap",
            ),
            "invalid_bytes": ("high", "the text is not all UTF-8", "the files are in another encoding on purpose"),
            "duplicates": (
                "high",
                "documents are in the training text several times",
                "they are weighted so on purpose",
            ),
            "near_duplicates": (
                "medium",
                "documents have most of their text in common with others",
                "what they share is a form that every document has",
            ),
            "cut_documents": (
                "medium",
                "documents are much longer than seq_len",
                "nothing in them depends on its start",
            ),
            "data_order": (
                "medium",
                "sequences get longer or shorter over the whole run: the data are not shuffled",
                "a curriculum of lengths was meant",
            ),
            "same_batch": (
                "medium",
                "text is learnt by heart within one pass: the same batches come again",
                "the training text holds copies of itself",
            ),
            "slow": ("medium", "throughput dropped", "sequences grew longer there"),
            "data_wait": ("high", "steps wait for data", "the wait is hidden behind the device's work"),
        },
    ),
    **_entries(
        "generation",
        {
            "invalid_utf8": ("high", "samples break UTF-8 characters", "the text itself is no UTF-8"),
            "hot_samples": (
                "medium",
                "the model finds its own samples far less probable than held-out text",
                "more samples, at other prompts, do not",
            ),
            "repetition": ("medium", "samples repeat themselves more than text does", "texts of that kind repeat, too"),
            "copies": ("medium", "samples copy the training text", "the piece stands in held-out text as well"),
            "low_entropy": ("medium", "samples have few different bytes", "the prompts are of that kind"),
            "samples": ("low", "samples are like text in what is measured", "a reader finds them incoherent"),
        },
    ),
    **_entries(
        "segmentation",
        {
            "collapse_open": ("high", "one chunk per position", "the target is one position a chunk"),
            "collapse_closed": ("high", "one chunk per document", "documents are as short as a chunk"),
            "target_missed": ("high", "the compression target is missed", "the target changed during the run"),
            "ratio_blind": (
                "high",
                "a ratio loss near 1, without F or bytes per chunk beside it, shows no compression",
                "F, G or bytes per chunk of the same steps, at their targets",
            ),
            "drift": ("medium", "F and G drift apart", "the gap closes again with more steps"),
            "budget_overflow": ("high", "boundaries were dropped for the budget", "the drops end with the warm-up"),
            "undecided": (
                "medium",
                "a router that does not decide",
                "boundaries of two late checkpoints are the same",
            ),
        },
    ),
}
