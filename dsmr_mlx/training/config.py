"""The configuration of a training run, and its presets."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.augmentation import Augmentation
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model.config import Architecture, ModelConfig
from dsmr_mlx.model.horizons import HorizonSchedule, parse, resolve
from dsmr_mlx.tokenizers.base import Tokenizer

DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")
LR_SCHEDULES = ("cosine", "wsd")
NOT_FINITE = ("stop", "skip")
LIMITS = ("max_steps", "max_tokens", "max_minutes")
# Settings of an architecture. Like the horizons, the free ones may differ from those that weights were trained with.
FREE = ("segment_length", "dropout")
FIXED_BY_WEIGHTS = tuple(f.name for f in dataclasses.fields(Architecture) if f.name not in FREE)
MEMORY_LIMITS = ("cache_limit_mb", "memory_limit_mb", "wired_limit_mb")

# Replaces the recipe of the presets if only adapters are trained. One lane needs the least memory.
LORA_RECIPE: dict[str, Any] = {
    "optimizer": "adamw",
    "learning_rate": 5e-4,
    "min_learning_rate": 5e-5,
    "weight_decay": 0.0,
    "batch_size": 1,
    "accumulate": 8,
    "warmup_steps": 20,
    "max_steps": 1000,
    "eval_every": 100,
    "checkpoint_every": 50,
}

PRESETS: dict[str, dict[str, Any]] = {
    # about 1 M parameters: tests, demonstrations
    "tiny": {
        "d_model": 128,
        "n_layers": 4,
        "n_heads": 2,
        "d_ff": 384,
        "segment_length": 128,
        "horizons": "two-scale:long=1x512,short=64",
        "batch_size": 8,
        "max_steps": 2000,
        "eval_every": 250,
        "checkpoint_every": 250,
    },
    # about 5 M parameters: a laptop in an hour or two
    "small": {},
    # about 40 M parameters: a serious run on a MacBook
    "base": {
        "d_model": 512,
        "n_layers": 12,
        "n_heads": 8,
        "d_ff": 1408,
        "segment_length": 512,
        "horizons": "two-scale:long=4x2048,short=256",
        "batch_size": 16,
        "learning_rate": 1.2e-3,
        "adamw_learning_rate": 9e-4,
        "min_learning_rate": 2.4e-5,
        "warmup_steps": 500,
        "dropout": 0.1,
        "max_steps": 20_000,
        "eval_every": 1000,
    },
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Architecture):
    """The configuration of a training run. The defaults are the preset `small`.

    The presets use many lanes and short segments: many pieces in a step matter more than a longer gradient. The parts
    of the recipe were chosen by measurement, see `docs/results.md`.

    Times are in steps unless the name says otherwise. A step is one update of the weights, from `accumulate` segments
    of `batch_size` lanes. The first of `max_steps`, `max_tokens` and `max_minutes` to be reached ends the run; the
    learning rate follows the one that is nearest its end.
    """

    tie_embeddings: bool = False
    value_residual: bool = True
    embedding_skip: bool = True
    canon: bool = True
    logit_softcap: float | None = 15.0
    zero_init: bool = True
    horizons: str = "two-scale:long=2x1024,short=128"  # the text of a schedule, see `model.horizons`
    init: str | None = None  # the checkpoint or run that the initial weights come from; None: random weights
    lora_rank: int | None = None  # train adapters of this rank, with the weights of `init` frozen; None: all weights
    lora_layers: int | None = None  # how many of the last layers have adapters; None: all
    lora_alpha: float | None = None  # updates are scaled by lora_alpha / lora_rank; None: twice the rank
    lora_dropout: float = 0.0  # of the inputs of adapters
    seed: int = 0
    batch_size: int = 32
    accumulate: int = 1
    optimizer: str = "muon"  # with AdamW for embeddings, head, convolutions, norms and biases; or "adamw" for all
    learning_rate: float = 4e-3
    adamw_learning_rate: float = 3e-3  # with "muon": of the weights that AdamW updates
    min_learning_rate: float = 8e-5  # at the end of a run; the other rate falls by the same factor
    lr_schedule: str = "wsd"  # constant, then linear over the last part of the run; or "cosine"
    cooldown: float = 0.3  # with "wsd": that part
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    ema_decay: float = 0.0  # of the average of the weights that is evaluated and saved as the model; 0: no average
    augment_transpose: int = 0  # semitones, up or down
    augment_stretch: float = 0.0  # of the tempo, faster or slower; 0.05 for 5 %
    augment_velocity: int = 0  # MIDI velocities, up or down
    fill: float = 0.0  # the share of pieces that get gaps to fill, see `data.gaps`
    dtype: str = "float32"  # of the computation; weights and optimizer are float32
    compile: bool | None = None  # None: only on a GPU
    gradient_checkpointing: bool = False  # recompute activations instead of keeping them
    cache_limit_mb: int | None = None  # memory that MLX keeps for reuse; None: MLX's default
    memory_limit_mb: int | None = None  # above which MLX waits for memory to be freed
    wired_limit_mb: int | None = None  # memory that is not swapped out (Metal)
    not_finite: str = "stop"  # on a NaN or infinite loss; or "skip"
    max_skips: int = 10  # in a row; one more stops the run
    rank_timeout: float = 300.0  # seconds until the other processes of a run are considered lost
    max_steps: int | None = 5000
    max_tokens: int | None = None
    max_minutes: float | None = None
    eval_every: int = 500
    eval_tokens: int | None = 200_000  # tokens per validation, about, in whole pieces; None: the whole split
    patience: int | None = None  # validations without a new best that end the run; None: no limit
    checkpoint_every: int = 250
    keep_last: int = 2
    sample_seconds: float = 20.0  # of music generated at each validation; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "accumulate", "eval_every", "checkpoint_every", "keep_last", "max_skips"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "warmup_steps", "weight_decay", "min_learning_rate", "sample_seconds"):
            self.require(name, getattr(self, name) >= 0, "0 or more")
        self.require("seed", self.seed < 1 << 32, "less than 2^32")
        for name in MEMORY_LIMITS:
            self.require(name, (getattr(self, name) or 0) <= 1 << 24, "at most 2^24")
        for name in ("learning_rate", "adamw_learning_rate", "clip_norm", "rank_timeout"):
            self.require(name, getattr(self, name) > 0, "more than 0")
        for name in (*LIMITS, *MEMORY_LIMITS, "eval_tokens", "patience"):
            self.require(name, getattr(self, name) is None or getattr(self, name) > 0, "more than 0, or none")
        for name in ("beta1", "beta2", "ema_decay"):
            self.require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("cooldown", "fill"):
            self.require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        self.require("fill", not (self.fill and self.max_positions), "0 with max_positions: gaps lengthen pieces")
        stretched = self.augment_stretch and self.max_positions
        self.require("augment_stretch", not stretched, "0 with max_positions: slower pieces have more tokens")
        self.require("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        self.require("lr_schedule", self.lr_schedule in LR_SCHEDULES, f"one of {', '.join(LR_SCHEDULES)}")
        self.require("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        self.require("not_finite", self.not_finite in NOT_FINITE, f"one of {', '.join(NOT_FINITE)}")
        self.require(
            "min_learning_rate",
            self.min_learning_rate <= self.learning_rate,
            f"at most learning_rate = {self.learning_rate}",
        )
        self.require(
            "max_steps",
            any(getattr(self, limit) is not None for limit in LIMITS),
            "an end: max_steps, max_tokens or max_minutes",
        )
        self._check_lora()
        self._check_horizons()
        self.augmentation  # noqa: B018 - raises if invalid

    def _check_lora(self) -> None:
        rank, layers = self.lora_rank, self.lora_layers
        if rank is None:
            for name, default in (("lora_layers", None), ("lora_alpha", None), ("lora_dropout", 0.0)):
                self.require(name, getattr(self, name) == default, "lora_rank with it")
            return
        self.require("lora_rank", self.init is not None, "init with it, the checkpoint whose weights are frozen")
        most = self.smallest_side
        self.require("lora_rank", 1 <= rank <= most, f"from 1 to {most}, the smallest side of a matrix of the blocks")
        fits = layers is None or 1 <= layers <= self.n_layers
        self.require("lora_layers", fits, f"from 1 to n_layers = {self.n_layers}, or none")
        self.require("lora_alpha", self.lora_alpha is None or self.lora_alpha > 0, "more than 0, or none")
        self.require("lora_dropout", 0 <= self.lora_dropout < 1, "at least 0 and below 1")
        self.require("optimizer", self.optimizer == "adamw", "adamw with lora_rank")

    def _check_horizons(self) -> None:
        resolved = resolve(self.horizons, self.segment_length, self.segment_length)  # of any corpus
        try:
            parse(resolved, self.n_layers)
        except UserError as error:
            raise UserError(str(error).replace(resolved, self.horizons)) from None

    @property
    def augmentation(self) -> Augmentation:
        """The augmentation of training pieces."""
        try:
            return Augmentation(
                transpose=self.augment_transpose, stretch=self.augment_stretch, velocity=self.augment_velocity
            )
        except UserError as error:
            raise UserError(f"augment_{error}") from None

    @property
    def schedule(self) -> HorizonSchedule:
        """The horizons of the layers. Raises `UserError` if they depend on a corpus, see `for_corpus`."""
        return parse(self.horizons, self.n_layers)

    def for_corpus(self, corpus: Corpus) -> Self:
        """Return the configuration for a corpus: `whole` horizons have the length of its longest piece."""
        longest = max(piece.length for piece in corpus.pieces())
        return dataclasses.replace(self, horizons=resolve(self.horizons, longest, self.segment_length))

    def model_config(self, tokenizer: Tokenizer, quantization: dict[str, int] | None = None) -> ModelConfig:
        """Return the configuration of the model that this run trains on ids of a tokenizer.

        quantization: of the frozen weights, if adapters are trained
        """
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(Architecture)}
        return ModelConfig(
            vocab_size=tokenizer.vocab_size,
            never_predicted=[i for i in (tokenizer.fill_id, tokenizer.play_id) if i is not None],
            fill=self.fill,
            horizons=list(self.schedule.horizons),
            quantization=quantization,
            lora=self.lora,
            **shared,
        )

    @property
    def lora(self) -> dict[str, Any] | None:
        """The adapters, as in `ModelConfig`; None if all weights are trained."""
        if self.lora_rank is None:
            return None
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        layers = self.lora_layers or self.n_layers
        return {"rank": self.lora_rank, "alpha": alpha, "layers": layers, "dropout": self.lora_dropout}

    @property
    def tokens_per_step(self) -> int:
        """The maximum number of tokens in a step; a lane has fewer in a segment where its piece ends."""
        return self.batch_size * self.segment_length * self.accumulate
