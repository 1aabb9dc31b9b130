"""Llama, and Mistral, Qwen2 and Qwen3, which have the same names in Hugging Face transformers."""

from collections.abc import Mapping
from typing import Any

from dsmr_mlx.convert.families import huggingface as hf
from dsmr_mlx.convert.rules import BLOCK, Configuration, Family, Match, Rule, weight_and_bias

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
    """Return the configuration from config.json, with the defaults of `LlamaConfig`."""
    kind = hf.check_type(match, ("llama", "mistral", "qwen2", "qwen3"))
    entries = hf.Entries(match)
    n_heads, head_dim = entries.integer("num_attention_heads"), entries.integer("head_dim")
    heads = match.heads(settings, n_heads, head_dim or (None if n_heads else _rotated(match)))
    fields = {
        "norm": "rms",
        "norm_eps": entries.number("rms_norm_eps", 1e-6),
        "activation": hf.activation(match, "hidden_act", "silu"),
    }
    rotary = hf.rope(match, heads["head_dim"], theta=10_000.0)
    if rotary["rope_dims"] != heads["head_dim"]:
        raise match.error(f"partial_rotary_factor in its configuration: expected 1 for {kind}")
    what = {
        "rope_theta": ("RoPE with theta 10000", hf.states_rope(match, ("rope_theta",))),
        "norm_eps": ("norms with eps 1e-6", "rms_norm_eps" in entries),
        "activation": ("SiLU", "hidden_act" in entries),
    }
    stated = hf.sizes(match, SIZES)
    n_layers = settings.get("n_layers", stated.get("n_layers"))
    # Missing layers and invalid numbers are reported later.
    n_layers = min(max(n_layers, 0), len(match.layers)) if isinstance(n_layers, int) else len(match.layers)
    return Configuration(
        heads | stated | fields | rotary | hf.untied(match),
        hf.assumed(match, settings, what),
        windows(entries, kind, n_layers),
    )


def _rotated(match: Match) -> int | None:
    """Return the head dimension from the RoPE frequencies that old versions store."""
    frequencies = match.shape("layers.0.self_attn.rotary_emb.inv_freq")
    return 2 * frequencies[0] if frequencies else None


def windows(entries: hf.Entries, kind: str, n_layers: int) -> list[int | None]:
    """Return how many earlier tokens each layer sees: a `sliding_window` of W is the token and W - 1 before it."""
    if kind == "llama":
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


QKV = tuple(f"{LAYER}.self_attn.{name}_proj" for name in "qkv")
GATE_UP = (f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj")

FAMILIES = (
    Family(
        name="llama",
        about="Llama, Mistral, Qwen2 and Qwen3 as in Hugging Face transformers",
        rules=(
            Rule("embed_tokens.weight", "embed.weight"),
            # Of tied weights, `save_model` of safetensors keeps the first name.
            Rule("lm_head.weight", "embed.weight"),
            Rule(f"{LAYER}.input_layernorm.weight", f"{BLOCK}.attention_norm.weight"),
            *weight_and_bias(QKV, f"{BLOCK}.attention.qkv", "concatenate"),
            *weight_and_bias(f"{LAYER}.self_attn.o_proj", f"{BLOCK}.attention.out"),
            Rule(f"{LAYER}.self_attn.q_norm.weight", f"{BLOCK}.attention.q_norm.weight", required=False),
            Rule(f"{LAYER}.self_attn.k_norm.weight", f"{BLOCK}.attention.k_norm.weight", required=False),
            Rule(f"{LAYER}.post_attention_layernorm.weight", f"{BLOCK}.feed_forward_norm.weight"),
            *weight_and_bias(GATE_UP, f"{BLOCK}.feed_forward.gate_up", "concatenate"),
            *weight_and_bias(f"{LAYER}.mlp.down_proj", f"{BLOCK}.feed_forward.down"),
            Rule("norm.weight", "norm.weight"),
            Rule("lm_head.weight", "head.weight", required=False),
        ),
        configure=configure,
        body="model.",
        original="llama",
        # RoPE frequencies follow from the configuration.
        ignored=("*rotary_emb.inv_freq",),
    ),
)
