"""GPT-NeoX and Pythia as in Hugging Face transformers."""

from collections.abc import Mapping
from typing import Any

from dsmr_mlx.convert.families import huggingface as hf
from dsmr_mlx.convert.rules import BLOCK, Configuration, Family, Match, Rule, weight_and_bias

LAYER = "layers.{i}"
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "d_ff": "intermediate_size",
}


def configure(match: Match, settings: Mapping[str, Any]) -> Configuration:
    """Return the configuration from config.json, with the defaults of `GPTNeoXConfig`."""
    hf.check_type(match, ("gpt_neox",))
    entries = hf.Entries(match)
    heads = match.heads(settings, entries.integer("num_attention_heads"))
    fields = {
        "norm": "layer",
        "norm_eps": entries.number("layer_norm_eps", 1e-5),
        "activation": hf.activation(match, "hidden_act", "gelu"),
        "parallel_residual": entries.flag("use_parallel_residual", True),
    }
    shares = ("rotary_pct", "partial_rotary_factor")
    what = {
        "norm_eps": ("norms with eps 1e-5", "layer_norm_eps" in entries),
        "activation": ("GELU", "hidden_act" in entries),
        "rope_theta": ("RoPE with theta 10000", hf.states_rope(match, ("rope_theta", "rotary_emb_base"))),
        "rope_dims": ("RoPE on a quarter of each head", hf.states_rope(match, shares)),
        "parallel_residual": ("parallel residuals", "use_parallel_residual" in entries),
    }
    rotary = hf.rope(match, heads["head_dim"], theta=10_000.0, share=0.25)
    return Configuration(
        heads | hf.sizes(match, SIZES) | fields | rotary | hf.untied(match), hf.assumed(match, settings, what)
    )


FAMILIES = (
    Family(
        name="gpt-neox",
        about="GPT-NeoX and Pythia as in Hugging Face transformers",
        rules=(
            Rule("embed_in.weight", "embed.weight"),
            *weight_and_bias(f"{LAYER}.input_layernorm", f"{BLOCK}.attention_norm"),
            *weight_and_bias(f"{LAYER}.attention.query_key_value", f"{BLOCK}.attention.qkv", "split_groups"),
            *weight_and_bias(f"{LAYER}.attention.dense", f"{BLOCK}.attention.out"),
            *weight_and_bias(f"{LAYER}.post_attention_layernorm", f"{BLOCK}.feed_forward_norm"),
            *weight_and_bias(f"{LAYER}.mlp.dense_h_to_4h", f"{BLOCK}.feed_forward.up"),
            *weight_and_bias(f"{LAYER}.mlp.dense_4h_to_h", f"{BLOCK}.feed_forward.down"),
            Rule("final_layer_norm.weight", "norm.weight"),
            Rule("final_layer_norm.bias", "norm.bias"),
            Rule("embed_out.weight", "head.weight", required=False),
            # Its name in transformers 5.
            Rule("lm_head.weight", "head.weight", required=False),
        ),
        configure=configure,
        body="gpt_neox.",
        original="gpt-neox",
        ignored=(
            # The causal mask, and the value of masked scores.
            "layers.*.attention.bias",
            "layers.*.attention.masked_bias",
            # RoPE frequencies follow from the configuration.
            "*rotary_emb.inv_freq",
        ),
    ),
)
