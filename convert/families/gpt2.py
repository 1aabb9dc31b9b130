"""GPT-2 as in Hugging Face transformers, and nanoGPT, which has the same names but transposed weights."""

from collections.abc import Mapping
from typing import Any

from dsmr_mlx.convert.families import huggingface as hf
from dsmr_mlx.convert.rules import BLOCK, Configuration, Family, Match, Rule, weight_and_bias

LAYER = "h.{i}"
GPT2_SIZES = {"vocab_size": "vocab_size", "d_model": "n_embd", "n_layers": "n_layer", "d_ff": "n_inner"}
NANOGPT_SIZES = {"vocab_size": "vocab_size", "d_model": "n_embd", "n_layers": "n_layer", "max_positions": "block_size"}


def configure_gpt2(match: Match, settings: Mapping[str, Any]) -> Configuration:
    """Return the configuration from config.json, with the defaults of `GPT2Config`."""
    hf.check_type(match, ("gpt2",))
    hf.require(match, "scale_attn_weights", True)
    hf.require(match, "scale_attn_by_inverse_layer_idx", False)
    entries = hf.Entries(match)
    fields = {
        "norm": "layer",
        "norm_eps": entries.number("layer_norm_epsilon", 1e-5),
        "activation": hf.activation(match, "activation_function", "gelu_new"),
        "rope_dims": 0,
    }
    what = {
        "norm_eps": ("norms with eps 1e-5", "layer_norm_epsilon" in entries),
        "activation": ("GELU in its tanh form", "activation_function" in entries),
    }
    heads = match.heads(settings, entries.integer("n_head"))
    return Configuration(
        heads | hf.sizes(match, GPT2_SIZES) | fields | hf.untied(match), hf.assumed(match, settings, what)
    )


def configure_nanogpt(match: Match, settings: Mapping[str, Any]) -> Configuration:
    """Return the configuration from the stored `model_args`, which do not state the variant of GELU."""
    hf.check_type(match, ("nanogpt",))
    fields = {"norm": "layer", "norm_eps": 1e-5, "activation": "gelu", "rope_dims": 0}
    notes = ["exact GELU assumed; `activation`=gelu_tanh for minGPT, and for nanoGPT until May 2023"]
    heads = match.heads(settings, hf.Entries(match).integer("n_head"))
    return Configuration(heads | hf.sizes(match, NANOGPT_SIZES) | fields, [] if "activation" in settings else notes)


def rules(transform: str) -> tuple[Rule, ...]:
    """Return the rules, with the transform of the weights of linear layers. nanoGPT may have no biases."""
    linears = {
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.out",
        "mlp.c_fc": "feed_forward.up",
        "mlp.c_proj": "feed_forward.down",
    }
    return (
        Rule("wte.weight", "embed.weight"),
        # Of tied weights, `save_model` of safetensors keeps the first name.
        Rule("lm_head.weight", "embed.weight"),
        Rule("wpe.weight", "positions.weight"),
        *weight_and_bias(f"{LAYER}.ln_1", f"{BLOCK}.attention_norm"),
        *weight_and_bias(f"{LAYER}.ln_2", f"{BLOCK}.feed_forward_norm"),
        *(
            rule
            for name, target in linears.items()
            for rule in weight_and_bias(f"{LAYER}.{name}", f"{BLOCK}.{target}", transform, bias_transform="identity")
        ),
        *weight_and_bias("ln_f", "norm"),
        Rule("lm_head.weight", "head.weight", required=False),
    )


def stores_inputs_first(match: Match) -> bool:
    """Return whether q, k and v are columns `(d, 3 d)`, as in Conv1D, and not rows. Other matrices may be square."""
    shape = match.shape("h.0.attn.c_attn.weight") or ()
    return len(shape) == 2 and shape[0] < shape[1]


# The causal mask, and the value of masked scores.
IGNORED = ("h.*.attn.bias", "h.*.attn.masked_bias")

FAMILIES = (
    Family(
        name="gpt2",
        about="GPT-2 as in Hugging Face transformers",
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
