"""The keys of an H-Net's run, on top of `hnet.config.run.RunConfig`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from hnet.config import BOUNDARIES, HNetConfig, NgramConfig
from hnet.config.architecture import from_shorthand, targets
from hnet.config.keys import key
from hnet.config.run import RunConfig

from .init_from import agree, architecture


@dataclass
class TrainConfig(RunConfig):
    """An H-Net's run."""

    # model
    preset: str = key("", "architecture by name; `hnet info` lists them; default: small, or that of init_from")
    model_config: str = key("", "architecture from a JSON file of the published format, instead of a preset")
    arch: str = key("", "architecture as one layout a stage, outermost first: 'm4 T4', 'm4 T1m4 T26', 'c2/c1T1 T2'")
    d_model: list[int] = key([], "with arch: width of every stage, growing inwards")
    heads: list[int] = key([], "with arch: attention heads of every stage; default: 64 channels each")
    windows: list[int] = key([], "with arch: attention window of every stage; default: 1023, innermost -1 (all)")
    d_intermediate: list[int] = key([], "with arch: SwiGLU width of every stage; default: 8/3 of d_model, up to 128s")
    ngrams: list[int] = key(
        [],
        "embeddings of the last n bytes, added to a byte's own: 2,3,4; default: what the architecture has, mostly none",
    )
    ngram_dropout: float = key(
        0.0,
        "share of the n-grams dropped in training; a small corpus, read many times, is learnt by heart",
        low=0,
        high=0.9,
    )
    ngram_rows: int = key(0, "rows of the table that the ngrams of a size are hashed into; default: 8192", low=0)
    # start
    init_from: str = key(
        "",
        "start from these weights, and with their architecture: a run or a checkpoint (of which the average, if it has "
        "one), a model directory, a .safetensors or .pt file, a Hugging Face repository; steps, optimiser and schedule "
        "begin anew",
    )
    freeze: list[str] = key(
        [],
        "parameters that stay as they are: embeddings, ngrams, lm_head, encoder, router, residual, decoder, pad, inner "
        "(the innermost network), of all stages, or stage0, stage0.router, or as in the model, with *: "
        "backbone.encoder.layers.0",
    )
    lora_rank: int = key(
        0, "train adapters of this rank (LoRA, through peft) instead of the weights of init_from; 0: none", low=0
    )
    lora_alpha: float = key(0.0, "adapters are scaled by lora_alpha / lora_rank; default: twice the rank", low=0)
    lora_dropout: float = key(0.0, "share of what enters an adapter dropped in training", low=0, high=0.99)
    lora_targets: list[str] = key(
        [],
        "linear maps that get an adapter: in_proj, out_proj, Wqkv, fc1, fc2, or as with freeze: encoder, stage1, "
        "*.mixer.*; default: all of blocks",
    )
    lora_full: list[str] = key([], "parts that train whole beside the adapters, named as with freeze: router, lm_head")
    # compression
    compression: list[float] = key(
        [4.0],
        "positions per chunk to aim at, every stage with routing, outermost first; or bytes a unit of every "
        "stage, the byte included: 1,3,9 is 3,3",
    )
    ratio_weight: float | str = key(
        "auto",
        "weight alpha of the ratio loss; auto: 1 below 10M parameters, falling to 0.2 at 1B (the paper's 0.03 "
        "undershoots, most of all small models)",
    )
    ratio_warmup: int = key(0, "steps over which alpha grows from 0", low=0)
    ratio_reduction: str = key(
        "batch",
        "F and G over the micro-batch, one loss a sequence, or global: over processes",
        choices=("batch", "sequence", "global"),
    )
    straight_through: bool = key(False, "let F carry G's gradient in the ratio loss")
    compression_start: list[float] = key([], "anneal the target from here to compression; default: no annealing")
    compression_anneal: str = key(
        "steps",
        "when the target moves: over steps, or one notch at each plateau of the validation loss",
        choices=("steps", "plateau"),
    )
    compression_anneal_steps: int = key(0, "length of the annealing; 0: half the run", low=0)
    compression_notches: int = key(4, "plateau annealing: how many plateaus until the final target", low=1)
    rate_control: str = key(
        "none",
        "hold the realised F at the target: bias (a logit bias of every stage, saved with the model), alpha "
        "(steers the ratio loss's weight), none; frozen for the last tenth",
        choices=("none", "bias", "alpha"),
    )
    rate_gain: float = key(0.02, "how far the controller moves a step for an error of 100 %", low=0)
    entropy_weight: list[float] = key(
        [0.0],
        "weight of the mean binary entropy of p in the loss, which makes routers decide; for all stages or one each",
        low=0,
    )
    entropy_start: float = key(0.3, "share of the steps before the entropy term acts", low=0, high=1)
    entropy_warmup: float = key(0.3, "share of the steps over which entropy_weight then grows from 0", low=0, high=1)
    surprisal_weight: list[float] = key(
        [0.0],
        "weight of teaching routers where: cross entropy of p against the 1/N positions after which the model is least "
        "sure of what comes, its expected surprisal; for all stages or one each",
        low=0,
    )
    surprisal_warmup: float = key(0.1, "share of the steps over which surprisal_weight grows from 0", low=0, high=1)
    surprisal_gain: float = key(
        0.02,
        "with rate_control: how far the share of positions that is taught moves a step for an error of 100 %, as a "
        "power of e, at most a factor of 2; 0: 1/N of them",
        low=0,
    )
    boundaries: str = key(
        "any",
        "where chunks may begin: any, char-start, char-end (first or last byte of UTF-8 characters)",
        choices=BOUNDARIES,
    )
    max_chunks: list[float] = key(
        [],
        "most chunks of a stage, as a share of a micro-batch's bytes: static shapes, no host sync, the least "
        "probable boundaries beyond are dropped",
    )

    # steps and stages
    epochs: float = key(0.0, "passes over the training data, instead of steps; for files, not for streams", low=0)
    num_workers: int = key(0, "processes that make batches ahead; 0: none, batches are made between steps", low=0)
    stream: str = key(
        "auto",
        "read files window by window (on) or into memory (off); auto: a stream from 1 GiB on disk on",
        choices=("auto", "on", "off"),
    )
    shards: int = key(
        48,
        "parts a stream is read in, which the data order depends on; processes x workers should divide it",
        low=1,
    )
    compile: bool | str = key(
        "auto",
        "torch.compile the blocks, shapes dynamic: true, false, or auto, which does on a GPU with Triton, without fsdp",
    )
    cuda_graph: str = key(
        "auto",
        "replay the training step as one CUDA graph, which takes max_chunks: auto where it can be and pays, on (an "
        "error where it cannot be), off",
        choices=("auto", "on", "off"),
    )
    recompute: bool = key(False, "activation checkpointing: compute blocks again in the backward")
    recompute_stages: list[int] = key(
        [], "with recompute: blocks of these stages only, outermost 0; default: all", low=0
    )
    batch_bytes: int = key(8192, "bytes of every optimiser step, packed without padding", low=1)
    router_lr: float = key(
        0.1,
        "learning-rate factor of the routing projections, on top of their stage's; they start as the identity and a "
        "small coherent change moves many boundaries, so at 1 the rate swings from step to step",
        low=0,
    )
    lr_multipliers: list[float] | str = key(
        [],
        "learning-rate factor of every stage, outermost first; auto: sqrt(positions for each innermost one x "
        "width ratio); default 1 for all",
    )

    def _named_model(self) -> HNetConfig | None:
        """The architecture that the keys name."""
        if self.arch:
            return from_shorthand(
                self.arch, self.d_model, heads=self.heads, windows=self.windows, d_intermediate=self.d_intermediate
            )
        if self.model_config:
            return HNetConfig.from_json(self.model_config)
        return HNetConfig.preset(self.preset) if self.preset else None

    def model(self) -> HNetConfig:
        """
        Raises:
            ValueError: no architecture, or another than that of init_from.
            FileNotFoundError: model_config or init_from does not exist.
        """
        named = self._named_model()
        found = architecture(self.init_from, Path(self.out), named) if self.init_from else None
        config = named or found or HNetConfig.preset("small")
        if self.ngrams or self.ngram_rows:
            g = config.ngram_cfg
            own = NgramConfig(self.ngrams or g.sizes, self.ngram_rows or g.rows)
            config = dataclasses.replace(config, ngram_cfg=own)
        if self.boundaries != "any":
            routing = dataclasses.replace(config.routing_cfg, boundaries=self.boundaries)
            config = dataclasses.replace(config, routing_cfg=routing)
        return config if found is None else agree(config, found, self.init_from)

    def _validate_lora(self) -> None:
        for name in ("lora_alpha", "lora_dropout", "lora_targets", "lora_full"):
            self.need(bool(self.lora_rank) or not getattr(self, name), name, "left out unless lora_rank is given")
        if self.lora_rank:
            self.need(bool(self.init_from), "init_from", "given where lora_rank is: adapters need weights to adapt")
            self.need(not self.freeze, "freeze", "left out with lora_rank, which freezes all but lora_full")
            self.need(not self.weight_ema, "weight_ema", "0 with lora_rank: adapters are not averaged")
            self.need(self.parallel == "ddp", "parallel", "ddp with lora_rank: adapters cannot be sharded")

    def validate(self) -> TrainConfig:
        """Returns self, with compression as one target a stage. How many steps `epochs` are takes the data: see
        `hnet.train.start.settle_steps`.

        Raises:
            ValueError: a value out of range, naming the key, what it is and what it may be.
            FileNotFoundError: model_config or init_from does not exist.
        """
        super().validate()
        if not (self.preset or self.arch or self.model_config or self.init_from):
            self.preset = "small"  # as config.toml then says
        need = self.need
        need(not self.epochs or self.steps == TrainConfig.steps, "epochs", "left out where steps is given")
        for name in ("ratio_weight", "lr_multipliers"):
            value = getattr(self, name)
            need(value == "auto" or not isinstance(value, str), name, "numeric, or auto")
        need(self.compile in (True, False, "auto"), "compile", "true, false or auto")
        need(isinstance(self.ratio_weight, str) or self.ratio_weight >= 0, "ratio_weight", ">= 0 or auto")
        need(not self.d_model or bool(self.arch), "d_model", "left out unless arch is given")
        self._validate_lora()
        routed = self.model().num_stages - 1
        self.compression = targets(self.compression, routed)
        if self.compression_start:
            self.compression_start = targets(self.compression_start, routed)
        for name in ("entropy_weight", "surprisal_weight"):
            need(len(getattr(self, name)) in (1, routed), name, f"one weight, or one for each of {routed} stages")
        need(len(self.max_chunks) in (0, routed), "max_chunks", f"empty or one share for each of {routed} stages")
        need(all(0 < m <= 1 for m in self.max_chunks), "max_chunks", "in (0, 1]")
        need(self.recompute or not self.recompute_stages, "recompute_stages", "left out unless recompute is on")
        need(all(s <= routed for s in self.recompute_stages), "recompute_stages", f"stages from 0 to {routed}")
        if not isinstance(self.lr_multipliers, str):
            need(
                len(self.lr_multipliers) in (0, routed + 1),
                "lr_multipliers",
                f"empty or one for each of {routed + 1} stages",
            )
            need(all(m > 0 for m in self.lr_multipliers), "lr_multipliers", "positive")
        return self
