"""Llama and what Hugging Face's transformers write with the same names: Mistral, Qwen2."""

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
LAYER_TYPES = ("full_attention", "sliding_attention")
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "d_ff": "intermediate_size",
    "n_kv_heads": "num_key_value_heads",
}


def configure(match: Match, settings: Mapping[str, Any]) -> Configuration:
    """config.json, and for what it does not say the defaults of Llama's classes."""
    kind = check_type(match, ("llama", "mistral", "qwen2"))
    entries = Entries(match)
    n_heads, head_dim = entries.integer("num_attention_heads"), entries.integer("head_dim")
    heads = match.heads(settings, n_heads, head_dim or (None if n_heads else _rotated(match)))
    fields = {
        "norm": "rms",
        "norm_eps": entries.number("rms_norm_eps", 1e-6),
        "activation": activation(match, "hidden_act", "silu"),
    }
    rotary = rope(match, heads["head_dim"], theta=10_000.0)
    if rotary["rope_dims"] != heads["head_dim"]:
        raise match.error(f"partial_rotary_factor in its configuration: expected 1, as {kind} has it")
    what = {
        "rope_theta": ("RoPE with theta 10000", states_rope(match, ("rope_theta",))),
        "norm_eps": ("norms with eps 1e-6", "rms_norm_eps" in entries),
    }
    stated = sizes(match, SIZES)
    # Layers that are not among the weights are refused later.
    n_layers = min(settings.get("n_layers", stated.get("n_layers", len(match.layers))), len(match.layers))
    return Configuration(
        heads | stated | fields | rotary | untied(match),
        assumed(match, settings, what),
        windows(entries, kind, n_layers),
    )


def _rotated(match: Match) -> int | None:
    """The head dimension as the length of the frequencies tells it that old versions store."""
    frequencies = match.shape("layers.0.self_attn.rotary_emb.inv_freq")
    return 2 * frequencies[0] if frequencies else None


def windows(entries: Entries, kind: str, n_layers: int) -> list[int | None]:
    """How far back each layer sees: a `sliding_window` of W tokens is the token itself and W - 1 before it."""
    if kind not in ("mistral", "qwen2"):
        return []
    window, slides = entries.integer("sliding_window"), entries.flag("use_sliding_window", kind == "mistral")
    full = entries.integer("max_window_layers", 28, least=0)
    if window is None or not (slides or kind == "mistral"):
        return []
    if kind == "mistral":
        return [window - 1] * n_layers
    kinds = entries.texts("layer_types", LAYER_TYPES, n_layers)
    if kinds is None:
        kinds = [LAYER_TYPES[i >= full] for i in range(n_layers)]
    return [window - 1 if kind == "sliding_attention" else None for kind in kinds]


def joined(parts: tuple[str, ...], target: str, kind: str) -> Rule:
    """A layer's matrices or biases that are one parameter here."""
    names = tuple(f"{LAYER}.{part}.{kind}" for part in parts)
    return Rule(names, f"layers.{{i}}.{target}.{kind}", "concatenate", required=kind == "weight")


QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

FAMILIES = (
    Family(
        name="llama",
        about="Llama, Mistral and Qwen2 as in Hugging Face's transformers",
        rules=(
            Rule("embed_tokens.weight", "embed.weight"),
            # Of tied weights safetensors' save_model keeps the first name.
            Rule("lm_head.weight", "embed.weight"),
            Rule(f"{LAYER}.input_layernorm.weight", "layers.{i}.attention_norm.weight"),
            joined(QKV, "attention.qkv", "weight"),
            joined(QKV, "attention.qkv", "bias"),
            Rule(f"{LAYER}.self_attn.o_proj.weight", "layers.{i}.attention.out.weight"),
            Rule(f"{LAYER}.self_attn.o_proj.bias", "layers.{i}.attention.out.bias", required=False),
            Rule(f"{LAYER}.post_attention_layernorm.weight", "layers.{i}.feed_forward_norm.weight"),
            joined(GATE_UP, "feed_forward.gate_up", "weight"),
            joined(GATE_UP, "feed_forward.gate_up", "bias"),
            Rule(f"{LAYER}.mlp.down_proj.weight", "layers.{i}.feed_forward.down.weight"),
            Rule(f"{LAYER}.mlp.down_proj.bias", "layers.{i}.feed_forward.down.bias", required=False),
            Rule("norm.weight", "norm.weight"),
            Rule("lm_head.weight", "head.weight", required=False),
        ),
        configure=configure,
        body="model.",
        original="llama",
        # The frequencies of RoPE, which follow from the configuration.
        ignored=("*rotary_emb.inv_freq",),
    ),
)
