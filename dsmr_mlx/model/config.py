"""The model's configuration: checked dataclasses, stored as JSON. Needs no MLX."""

from dataclasses import dataclass, field
from typing import Any

from dsmr_mlx.common.config import Config, is_instance
from dsmr_mlx.common.limits import MAX_INTEGER, MAX_STATE, MAX_TOKENS, MAX_WEIGHTS

NORMS = ("rms", "layer")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
ROPE_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_length"),
}
CANON_WIDTH = 4  # tokens that a Canon layer mixes: the newest and the three before it
NEVER = -1e9  # the logit of ids that are never predicted; finite, so that a weight of 0 removes it from a loss
LORA = {"rank": int, "alpha": float, "layers": int, "dropout": float}
QUANTIZATION_BITS = (4, 6, 8)
QUANTIZATION_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Architecture(Config):
    """The part of the configuration that a training run chooses. `segment_length` is in tokens."""

    d_model: int = 256
    n_layers: int = 6
    n_heads: int = 4
    n_kv_heads: int | None = None  # None: as many as n_heads
    head_dim: int = 64
    d_ff: int = 704
    segment_length: int = 128
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    activation: str = "silu"
    gated: bool = True
    attention_bias: bool = False
    output_bias: bool = False
    feed_forward_bias: bool = False
    head_bias: bool = False
    tie_embeddings: bool = True
    rope_dims: int | None = None  # None: the whole head; 0: no rotary positions
    rope_theta: float = 10_000.0
    rope_interleaved: bool = False
    rope_scaling: dict | None = None  # {"type": "linear" or "llama3", …}, see `ROPE_SCALINGS` and `rotary`
    max_positions: int | None = None  # rows of a table of learned positions, which ends streams; None: no table
    parallel_residual: bool = False  # feed-forward beside attention instead of after it
    qk_norm: bool = False  # RMSNorm of each head's queries and keys, before RoPE (Henry et al. 2020)
    value_residual: bool = False  # values mixed with those of the first layer (Zhou et al. 2024)
    embedding_skip: bool = False  # each layer reads a learned mix of its input and the embeddings
    canon: bool = False  # causal convolutions before attention and feed-forward (Allen-Zhu 2025)
    logit_softcap: float | None = None  # c: logits x become c·tanh(x / c) (Gemma Team 2024); None: unchanged
    zero_init: bool = False  # the projections to the residual stream start at 0 (Zhang et al. 2019)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.check_types()
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.rope_dims is None:
            object.__setattr__(self, "rope_dims", self.head_dim)
        for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "segment_length"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("n_kv_heads", self.n_heads % self.n_kv_heads == 0, f"a divisor of n_heads = {self.n_heads}")
        self.require("norm", self.norm in NORMS, f"one of {', '.join(NORMS)}")
        self.require("norm_eps", self.norm_eps > 0, "more than 0")
        self.require("norm_bias", not (self.norm_bias and self.norm == "rms"), "false with norm = 'rms'")
        self.require("activation", self.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        self.require(
            "rope_dims",
            0 <= self.rope_dims <= self.head_dim and self.rope_dims % 2 == 0,
            f"an even number from 0 to head_dim = {self.head_dim}",
        )
        self.require("rope_theta", self.rope_theta > 0, "more than 0")
        if self.rope_scaling is not None:
            self.require("rope_scaling", self.rope_dims > 0, "none with rope_dims = 0")
            object.__setattr__(self, "rope_scaling", self._checked_rope_scaling())
        self.require("max_positions", self.max_positions is None or self.max_positions >= 1, "at least 1, or none")
        self.require("head_bias", not (self.head_bias and self.tie_embeddings), "false with tie_embeddings = true")
        self.require("logit_softcap", self.logit_softcap is None or self.logit_softcap > 0, "more than 0, or none")
        self.require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")

    @property
    def smallest_side(self) -> int:
        """The smallest dimension of the blocks' matrices, and so the highest rank of an update of all of them."""
        return min(self.d_model, self.n_kv_heads * self.head_dim, self.d_ff)

    @property
    def canon_size(self) -> int:
        """The numbers per token that a layer stores for its two Canon layers; 0 without them."""
        return 2 * self.d_model if self.canon else 0

    def _checked_rope_scaling(self) -> dict[str, Any]:
        """Return `rope_scaling` as a new dict in the order of `ROPE_SCALINGS`, lengths as int and factors as float."""
        given = self.rope_scaling
        kind = given.get("type")
        known = isinstance(kind, str) and kind in ROPE_SCALINGS
        self.require("rope_scaling", known, f'"type" to be one of {", ".join(ROPE_SCALINGS)}')
        names = ROPE_SCALINGS[kind]
        self.require("rope_scaling", given.keys() == {"type", *names}, f"the keys type, {', '.join(names)}")
        for name in names:
            whole = name == "original_length"
            right = is_instance(given[name], int if whole else int | float) and 0 < given[name] <= MAX_INTEGER
            self.require("rope_scaling", right, f"{name} to be {'an integer' if whole else 'a number'} above 0")
        if kind == "llama3":
            rising = given["low_freq_factor"] < given["high_freq_factor"]
            self.require("rope_scaling", rising, "low_freq_factor below high_freq_factor")
        return {"type": kind} | {n: given[n] if n == "original_length" else float(given[n]) for n in names}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Architecture):
    """Everything that defines a `DSMR`; stored as `config.json` in its checkpoint.

    never_predicted: ids that are only read; their logits are `NEVER`
    fill: the share of its training pieces that had gaps to fill, see `data.gaps`; 0: it was not trained on gaps, or not
        long enough to be shown what follows one
    horizons: M_l, the memory horizon of each layer in tokens, lowest layer first, see `DSMR`; by default one segment
    quantization: {"bits": 4, 6 or 8, "group_size": 32, 64 or 128}, how the weights of the embedding and the linear
        layers are stored, see the module `quantization`; None: as floats
    lora: {"rank": int, "alpha": float, "layers": int, "dropout": float}, the adapters of the last layers, see the
        module `lora`; None: no adapters

    Raises `UserError` for values that are invalid or do not fit each other.
    """

    vocab_size: int
    never_predicted: list[int] = field(default_factory=list)
    fill: float = 0.0
    horizons: list[int] = field(default_factory=list)
    quantization: dict | None = None
    lora: dict | None = None

    def __post_init__(self) -> None:
        for name in ("horizons", "never_predicted"):
            if isinstance(getattr(self, name), tuple):
                object.__setattr__(self, name, list(getattr(self, name)))
        super().__post_init__()
        self.require("vocab_size", self.vocab_size >= 1, "at least 1")
        never = set(self.never_predicted)
        different = len(never) == len(self.never_predicted) < self.vocab_size
        valid = different and all(0 <= i < self.vocab_size for i in never)
        self.require("never_predicted", valid, f"some, not all, of the ids from 0 to {self.vocab_size - 1}, each once")
        self.require("fill", 0 <= self.fill <= 1, "from 0 to 1")
        if not self.horizons:
            object.__setattr__(self, "horizons", [self.segment_length] * self.n_layers)
        self.require("horizons", len(self.horizons) == self.n_layers, f"n_layers = {self.n_layers} integers")
        self.require("horizons", min(self.horizons) >= 0, "no negative horizon")
        self.require("horizons", max(self.horizons) <= MAX_TOKENS, f"horizons of at most {MAX_TOKENS:,} tokens")
        self._check_total()
        if self.quantization is not None:
            object.__setattr__(self, "quantization", self._checked_quantization())
        if self.lora is not None:
            object.__setattr__(self, "lora", self._checked_lora())

    def _check_total(self) -> None:
        """Raise `UserError` for sizes that are valid separately but too large together."""
        heads, kv_heads = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        layer = self.d_model * (2 * heads + 2 * kv_heads + 3 * self.d_ff)
        weights = 2 * self.vocab_size * self.d_model + self.n_layers * layer + (self.max_positions or 0) * self.d_model
        self.require(
            "d_model", weights <= MAX_WEIGHTS, f"a model of at most {MAX_WEIGHTS:,} weights, found {weights:,}"
        )
        slots = sum(self.horizons) + self.n_layers * self.segment_length
        numbers = slots * (2 * kv_heads + self.canon_size)
        self.require("horizons", numbers <= MAX_STATE, f"a state of at most {MAX_STATE:,} numbers, found {numbers:,}")

    def _checked_quantization(self) -> dict[str, int]:
        """Return `quantization` as a new dict. Every row of a quantized weight must be a whole number of groups."""
        given = self.quantization
        self.require("quantization", given.keys() == {"bits", "group_size"}, "the keys bits, group_size")
        for name, known in (("bits", QUANTIZATION_BITS), ("group_size", QUANTIZATION_GROUP_SIZES)):
            right = is_instance(given[name], int) and given[name] in known
            self.require("quantization", right, f"{name} to be one of {', '.join(map(str, known))}")
        # The other weights have rows as long as those of the embedding.
        rows = {"embed": self.d_model, "out": self.n_heads * self.head_dim, "down": self.d_ff}
        for layer, length in rows.items():
            fits = length % given["group_size"] == 0
            self.require("quantization", fits, f"a group_size that divides {length}, the row length of {layer}.weight")
        return {"bits": given["bits"], "group_size": given["group_size"]}

    def _checked_lora(self) -> dict[str, Any]:
        """Return `lora` as a new dict, numbers as annotated."""
        given = self.lora
        self.require("lora", given.keys() == LORA.keys(), f"the keys {', '.join(LORA)}")
        for name, most in (("rank", self.smallest_side), ("layers", self.n_layers)):
            right = is_instance(given[name], int) and 1 <= given[name] <= most
            self.require("lora", right, f"{name} to be an integer from 1 to {most}")
        numbers = all(is_instance(given[name], int | float) for name in ("alpha", "dropout"))
        self.require("lora", numbers and 0 < given["alpha"] <= MAX_INTEGER, "alpha to be a number above 0")
        self.require("lora", 0 <= given["dropout"] < 1, "dropout to be at least 0 and below 1")
        return {name: kind(given[name]) for name, kind in LORA.items()}
