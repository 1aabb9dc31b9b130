"""GPT-2 as in Hugging Face's transformers, and nanoGPT, which has its names but stores weights the other way round."""

from collections.abc import Mapping
from typing import Any

from dsmr_mlx.convert.families.huggingface import Entries, activation, check_type, require, sizes, untied
from dsmr_mlx.convert.rules import Configuration, Family, Match, Rule

LAYER = "h.{i}"
GPT2_SIZES = {"vocab_size": "vocab_size", "d_model": "n_embd", "n_layers": "n_layer", "d_ff": "n_inner"}
NANOGPT_SIZES = {"vocab_size": "vocab_size", "d_model": "n_embd", "n_layers": "n_layer", "max_positions": "block_size"}


def configure_gpt2(match: Match, settings: Mapping[str, Any]) -> Configuration:
    """config.json, and for what it does not say the defaults of GPT-2's class."""
    check_type(match, ("gpt2",))
    require(match, "scale_attn_weights", True)
    require(match, "scale_attn_by_inverse_layer_idx", False)
    entries = Entries(match)
    fields = {
        "norm": "layer",
        "norm_eps": entries.number("layer_norm_epsilon", 1e-5),
        "activation": activation(match, "activation_function", "gelu_new"),
        "rope_dims": 0,
    }
    heads = match.heads(settings, entries.integer("n_head"))
    return Configuration(heads | sizes(match, GPT2_SIZES) | fields | untied(match))


def configure_nanogpt(match: Match, settings: Mapping[str, Any]) -> Configuration:
    """The `model_args` that nanoGPT stores beside the weights; they do not tell which GELU it was."""
    check_type(match, ("nanogpt",))
    fields = {"norm": "layer", "norm_eps": 1e-5, "activation": "gelu", "rope_dims": 0}
    notes = ["exact GELU assumed; --set activation=gelu_tanh for nanoGPT until May 2023 and for minGPT"]
    heads = match.heads(settings, Entries(match).integer("n_head"))
    return Configuration(heads | sizes(match, NANOGPT_SIZES) | fields, [] if "activation" in settings else notes)


def norm(name: str, target: str) -> tuple[Rule, Rule]:
    """A LayerNorm, whose bias nanoGPT may lack."""
    return Rule(f"{name}.weight", f"{target}.weight"), Rule(f"{name}.bias", f"{target}.bias", required=False)


def linear(name: str, target: str, transform: str) -> tuple[Rule, Rule]:
    """A layer's matrix, and its bias, which nanoGPT may lack."""
    return (
        Rule(f"{LAYER}.{name}.weight", f"layers.{{i}}.{target}.weight", transform),
        Rule(f"{LAYER}.{name}.bias", f"layers.{{i}}.{target}.bias", required=False),
    )


def rules(transform: str) -> tuple[Rule, ...]:
    """`transform` is that of the linear layers' weights."""
    return (
        Rule("wte.weight", "embed.weight"),
        # Of tied weights safetensors' save_model keeps the first name.
        Rule("lm_head.weight", "embed.weight"),
        Rule("wpe.weight", "positions.weight"),
        *norm(f"{LAYER}.ln_1", "layers.{i}.attention_norm"),
        *linear("attn.c_attn", "attention.qkv", transform),
        *linear("attn.c_proj", "attention.out", transform),
        *norm(f"{LAYER}.ln_2", "layers.{i}.feed_forward_norm"),
        *linear("mlp.c_fc", "feed_forward.up", transform),
        *linear("mlp.c_proj", "feed_forward.down", transform),
        *norm("ln_f", "norm"),
        Rule("lm_head.weight", "head.weight", required=False),
    )


def stores_inputs_first(match: Match) -> bool:
    """Whether q, k and v are columns `[d, 3 d]`, as of a Conv1D, and not rows; by their shape, as others are square."""
    shape = match.shape("h.0.attn.c_attn.weight") or ()
    return len(shape) == 2 and shape[0] < shape[1]


# The causal mask, and what masked scores were set to.
IGNORED = ("h.*.attn.bias", "h.*.attn.masked_bias")

FAMILIES = (
    Family(
        name="gpt2",
        about="GPT-2 as in Hugging Face's transformers",
        rules=rules("transpose"),
        configure=configure_gpt2,
        body="transformer.",
        original="gpt2",
        ignored=IGNORED,
        signature=stores_inputs_first,
    ),
    Family(
        name="nanogpt",
        about="nanoGPT",
        rules=rules("identity"),
        configure=configure_nanogpt,
        body="transformer.",
        original="nanogpt",
        ignored=IGNORED,
        signature=lambda match: not stores_inputs_first(match),
    ),
)
