"""Aria (EleutherAI/aria, 2025): piano models with gated feed-forward layers."""

from collections.abc import Mapping
from typing import Any

from dsmr_mlx.convert.families import huggingface as hf
from dsmr_mlx.convert.rules import Configuration, Family, Match, Rule
from dsmr_mlx.tokenizers.aria.vocabulary import SIZES

CONTEXT = 8192  # tokens, of all published models
LAYER = "encode_layers.{i}"


def configure(match: Match, settings: Mapping[str, Any]) -> Configuration:
    """Return the configuration. Aria stores none with its weights; all published models have heads of 64."""
    entries = hf.Entries(match)
    n_heads = entries.integer("n_heads", entries.integer("num_attention_heads"))
    heads = match.heads(settings, n_heads, None if n_heads else 64)
    rows = match.structure.get("vocab_size")
    note = f"heads of {heads['head_dim']} assumed, as in published models; `n_heads`=… overrides it"
    return Configuration(
        heads
        | {
            "norm": "layer",
            "norm_eps": 1e-5,
            "activation": "silu",
            "rope_dims": heads["head_dim"],
            "rope_theta": 500_000.0,
            "rope_interleaved": False,
        },
        [] if n_heads else [note],
        context=CONTEXT if rows in SIZES else None,
    )


FAMILIES = (
    Family(
        name="aria",
        about="piano models of EleutherAI",
        rules=(
            Rule("tok_embeddings.weight", "embed.weight"),
            Rule(f"{LAYER}.norm1.weight", "layers.{i}.attention_norm.weight"),
            Rule(f"{LAYER}.norm1.bias", "layers.{i}.attention_norm.bias"),
            Rule(f"{LAYER}.mixed_qkv.weight", "layers.{i}.attention.qkv.weight"),
            Rule(f"{LAYER}.att_proj_linear.weight", "layers.{i}.attention.out.weight"),
            Rule(f"{LAYER}.norm2.weight", "layers.{i}.feed_forward_norm.weight"),
            Rule(f"{LAYER}.norm2.bias", "layers.{i}.feed_forward_norm.bias"),
            Rule(
                (f"{LAYER}.ff_gate_proj.weight", f"{LAYER}.ff_up_proj.weight"),
                "layers.{i}.feed_forward.gate_up.weight",
                "concatenate",
            ),
            Rule(f"{LAYER}.ff_down_proj.weight", "layers.{i}.feed_forward.down.weight"),
            Rule("out_layer_norm.weight", "norm.weight"),
            Rule("out_layer_norm.bias", "norm.bias"),
            Rule("lm_head.weight", "head.weight"),
        ),
        configure=configure,
        body="model.",
        tokenizer="aria",
        original="aria",
    ),
)
