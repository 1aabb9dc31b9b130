"""Llama and what Hugging Face's transformers write with the same names: Mistral, Qwen2."""

from collections.abc import Mapping
from typing import Any

from dsmr_mlx.convert.families.huggingface import activation, check_type, rope, sizes, untied
from dsmr_mlx.convert.rules import Configuration, Family, Match, Rule

LAYER = "layers.{i}"
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "d_ff": "intermediate_size",
    "n_kv_heads": "num_key_value_heads",
}


def configure(match: Match, settings: Mapping[str, Any]) -> Configuration:
    """config.json, or without it what Llama's classes have as defaults."""
    check_type(match, ("llama", "mistral", "qwen2"))
    config = match.source.config
    n_heads, head_dim, notes = config.get("num_attention_heads"), config.get("head_dim"), []
    if not config:
        head_dim = _rotated(match)
        notes = ["no config.json: RoPE with theta 10000 and norms with eps 1e-6 assumed; --set otherwise"]
    heads = match.heads(settings, n_heads, head_dim)
    fields = {
        "norm": "rms",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": activation(match, "hidden_act", "silu"),
    }
    rotary = rope(match, heads["head_dim"], theta=10_000.0)
    if rotary["rope_dims"] != heads["head_dim"]:
        raise match.error(f"partial_rotary_factor in its config.json: expected 1, as {config.get('model_type')} has it")
    stated = sizes(config, SIZES)
    return Configuration(heads | stated | fields | rotary | untied(match), notes, windows(config))


def _rotated(match: Match) -> int | None:
    """The head dimension as the length of the frequencies tells it that old versions store."""
    frequencies = match.shape("layers.0.self_attn.rotary_emb.inv_freq")
    return 2 * frequencies[0] if frequencies else None


def windows(config: Mapping[str, Any]) -> list[int | None]:
    """How far back each layer sees: a `sliding_window` of W tokens is the token itself and W - 1 before it."""
    window, n_layers, kind = (config.get(name) for name in ("sliding_window", "num_hidden_layers", "model_type"))
    if kind not in ("mistral", "qwen2") or not isinstance(window, int):
        return []
    if kind == "mistral":
        return [window - 1] * n_layers
    if not config.get("use_sliding_window", False):
        return []
    full = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or [f"{'full' if i < full else 'sliding'}_attention" for i in range(n_layers)]
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
        # The frequencies of RoPE, which follow from the configuration.
        ignored=("*rotary_emb.inv_freq",),
    ),
)
