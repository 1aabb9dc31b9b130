"""What the configurations (config.json) of Hugging Face's transformers have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from dsmr_mlx.convert.rules import Match

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    # All of them the tanh approximation, written in different ways.
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
ROPE_TYPES = ("default", "linear", "llama3")


def check_type(match: Match, known: Sequence[str]) -> None:
    """Raise `UserError` for the models of another kind, which may have the same names but compute something else."""
    if quantization := match.source.config.get("quantization_config"):
        raise match.error(f"quantized ({quantization.get('quant_method')}), expected weights in floats")
    kind = match.source.config.get("model_type", known[0])
    if kind not in known:
        raise match.error(f"model_type = {kind!r} in its config.json: expected one of {', '.join(known)}")


def require(match: Match, name: str, expected: str, allowed: Sequence[Any]) -> None:
    """Raise `UserError` if an entry of the configuration is there and not one of `allowed`."""
    value = match.source.config.get(name, allowed[0])
    if value not in allowed:
        raise match.error(f"{name} = {value!r} in its config.json: expected {expected}")


def sizes(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Fields of `ModelConfig` from entries of other names; those that are missing or null are left out."""
    return {field: config[name] for field, name in names.items() if config.get(name) is not None}


def untied(match: Match) -> dict[str, bool]:
    """`tie_embeddings` where the configuration denies it; where it does not, the weights are what counts."""
    return {"tie_embeddings": False} if match.source.config.get("tie_word_embeddings") is False else {}


def activation(match: Match, name: str, default: str) -> str:
    """The `activation` of a `DSMR` that an entry names."""
    value = match.source.config.get(name, default)
    if value not in ACTIVATIONS:
        raise match.error(f"{name} = {value!r} in its config.json: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def rope(match: Match, head_dim: int, theta: float, share: float = 1.0) -> dict[str, Any]:
    """`rope_dims`, `rope_theta` and `rope_scaling` from `rope_parameters` (transformers 5) or the older entries.

    `theta` and `share`, the part of a head that is rotated, hold where those say nothing.
    """
    config = match.source.config
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    of_layers = any(isinstance(value, Mapping) for value in stated.values())
    kind = "one for each kind of layer" if of_layers else stated.get("rope_type", stated.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise match.error(f"rope_type = {kind!r} in its config.json: expected one of {', '.join(ROPE_TYPES)}")
    theta = _first(stated.get("rope_theta"), config.get("rope_theta"), config.get("rotary_emb_base"), theta)
    share = _first(
        stated.get("partial_rotary_factor"), config.get("partial_rotary_factor"), config.get("rotary_pct"), share
    )
    fields = {"rope_theta": float(theta), "rope_dims": int(head_dim * share), "rope_interleaved": False}
    if kind == "default":
        return fields
    scaling = {"type": kind, "factor": stated.get("factor")}
    if kind == "llama3":
        scaling |= {name: stated.get(name) for name in ("low_freq_factor", "high_freq_factor")}
        original = stated.get("original_max_position_embeddings")
        scaling["original_length"] = _first(original, config.get("max_position_embeddings"))
    return fields | {"rope_scaling": scaling}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
