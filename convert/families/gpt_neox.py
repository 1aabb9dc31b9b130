"""GPT-NeoX and Pythia as in Hugging Face's transformers."""

from collections.abc import Mapping
from typing import Any

from dsmr_mlx.convert.families.huggingface import (
    Entries,
    activation,
    assumed,
    check_type,
    rope,
    sizes,
    states_rope,
    untied,
)
from dsmr_mlx.convert.rules import Configuration, Family, Match, Rule

LAYER = "layers.{i}"
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "d_ff": "intermediate_size",
}


def configure(match: Match, settings: Mapping[str, Any]) -> Configuration:
    """config.json, and for what it does not say the defaults of the classes."""
    check_type(match, ("gpt_neox",))
    entries = Entries(match)
    heads = match.heads(settings, entries.integer("num_attention_heads"))
    fields = {
        "norm": "layer",
        "norm_eps": entries.number("layer_norm_eps", 1e-5),
        "activation": activation(match, "hidden_act", "gelu"),
        "parallel_residual": entries.flag("use_parallel_residual", True),
    }
    shares = ("rotary_pct", "partial_rotary_factor")
    what = {
        "rope_theta": ("RoPE with theta 10000", states_rope(match, ("rope_theta", "rotary_emb_base"))),
        "rope_dims": ("RoPE on a quarter of each head", states_rope(match, shares)),
        "parallel_residual": ("parallel residuals", "use_parallel_residual" in entries),
    }
    rotary = rope(match, heads["head_dim"], theta=10_000.0, share=0.25)
    return Configuration(heads | sizes(match, SIZES) | fields | rotary | untied(match), assumed(match, settings, what))


def module(name: str, target: str, transform: str = "identity") -> tuple[Rule, Rule]:
    """A layer's weight, and its bias, which that of the attention may lack."""
    return (
        Rule(f"{LAYER}.{name}.weight", f"layers.{{i}}.{target}.weight", transform),
        Rule(f"{LAYER}.{name}.bias", f"layers.{{i}}.{target}.bias", transform, required=False),
    )


FAMILIES = (
    Family(
        name="gpt-neox",
        about="GPT-NeoX and Pythia as in Hugging Face's transformers",
        rules=(
            Rule("embed_in.weight", "embed.weight"),
            *module("input_layernorm", "attention_norm"),
            *module("attention.query_key_value", "attention.qkv", "split_groups"),
            *module("attention.dense", "attention.out"),
            *module("post_attention_layernorm", "feed_forward_norm"),
            *module("mlp.dense_h_to_4h", "feed_forward.up"),
            *module("mlp.dense_4h_to_h", "feed_forward.down"),
            Rule("final_layer_norm.weight", "norm.weight"),
            Rule("final_layer_norm.bias", "norm.bias"),
            Rule("embed_out.weight", "head.weight", required=False),
            # As transformers 5 names it.
            Rule("lm_head.weight", "head.weight", required=False),
        ),
        configure=configure,
        body="gpt_neox.",
        original="gpt-neox",
        ignored=(
            # The causal mask, and what masked scores were set to.
            "layers.*.attention.bias",
            "layers.*.attention.masked_bias",
            # The frequencies of RoPE, which follow from the configuration.
            "*rotary_emb.inv_freq",
        ),
    ),
)
