"""What the configurations (config.json) of Hugging Face's transformers have in common."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dsmr_mlx.common.errors import UserError
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
LARGEST = 1 << 28  # rows, tokens, layers: whatever a model counts is less


class Entries:
    """A table of a configuration, whose values are checked as they are asked for.

    An entry that is null counts as missing. All methods raise `UserError`, which names the source, the entry and what
    is expected, for a value of another type or out of range.
    """

    def __init__(self, match: Match, table: Mapping[str, Any] | None = None, inside: str = ""):
        """Those at the top of the match's configuration, or of a `table` in it that is named `inside`."""
        self.match = match
        self.table = match.source.config if table is None else table
        self.inside = inside and f"{inside}."

    def __contains__(self, name: str) -> bool:
        return self.table.get(name) is not None

    def number(self, name: str, default: float | None = None) -> float | None:
        """A finite number."""
        value = self.table.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise self.wrong(name, "a finite number")
        return float(value)

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int | None:
        """A number of things."""
        value = self.table.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            raise self.wrong(name, f"an integer from {least} to {LARGEST}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.table.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str, known: Collection[str]) -> str:
        """One of the texts that are `known`."""
        value = self.table.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or value not in known:
            raise self.wrong(name, f"one of {', '.join(known)}")
        return value

    def texts(self, name: str, known: Collection[str], length: int) -> list[str] | None:
        """A list of `length` texts that are `known`; None if it is missing."""
        value = self.table.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or any(not isinstance(text, str) or text not in known for text in value):
            raise self.wrong(name, f"a list of {', '.join(known)}")
        if len(value) < length:
            raise self.wrong(name, f"{length} of them, one for each layer")
        return value[:length]

    def entries(self, name: str) -> "Entries":
        """A table within this one, empty if it is missing."""
        value = self.table.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(name, "a table")
        return Entries(self.match, value or {}, name)

    def wrong(self, name: str, expected: str) -> UserError:
        """To raise: the entry with its value, and what it should be."""
        value = repr(self.table.get(name))
        shown = value if len(value) <= 80 else f"{value[:79]}…"
        where = f"in its {self.match.source.config_name}"
        return self.match.error(f"{self.inside}{name} = {shown} {where}: expected {expected}")


def check_type(match: Match, known: Sequence[str]) -> str:
    """The model_type, the first of `known` if none is stated.

    Raises `UserError` for the models of another kind, which may have the same names but compute something else.
    """
    if quantization := match.source.config.get("quantization_config"):
        how = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise match.error(f"quantized ({str(how)[:80]}), expected weights in floats")
    return Entries(match).text("model_type", known[0], known)


def require(match: Match, name: str, expected: bool) -> None:
    """Raise `UserError` if a switch of the configuration is there and is not as `expected`."""
    entries = Entries(match)
    if entries.flag(name, expected) != expected:
        raise entries.wrong(name, "true" if expected else "false")


def sizes(match: Match, names: Mapping[str, str]) -> dict[str, int]:
    """Fields of `ModelConfig` from entries of other names; those that are missing or null are left out."""
    entries = Entries(match)
    return {field: entries.integer(name) for field, name in names.items() if name in entries}


def untied(match: Match) -> dict[str, bool]:
    """`tie_embeddings` where the configuration denies it; where it does not, the weights are what counts."""
    return {} if Entries(match).flag("tie_word_embeddings", True) else {"tie_embeddings": False}


def activation(match: Match, name: str, default: str) -> str:
    """The `activation` of a `DSMR` that an entry names."""
    return ACTIVATIONS[Entries(match).text(name, default, ACTIVATIONS)]


def assumed(match: Match, settings: Mapping[str, Any], what: Mapping[str, tuple[str, bool]]) -> list[str]:
    """The note on what the configuration leaves open: by field of `ModelConfig` what is assumed and if it is stated."""
    left_open = {field: text for field, (text, stated) in what.items() if not stated and field not in settings}
    if not left_open:
        return []
    lacking = f"its {match.source.config_name} does not say it" if match.source.config else "no config.json"
    named = " ".join(f"{field}=…" for field in left_open)
    return [f"{lacking}: {' and '.join(left_open.values())} assumed; --set {named} otherwise"]


def states_rope(match: Match, names: Collection[str]) -> bool:
    """Whether one of the entries is there, at the top or in the table of RoPE."""
    return any(name in entries for entries in (_of_rope(match), Entries(match)) for name in names)


def rope(match: Match, head_dim: int, theta: float, share: float = 1.0) -> dict[str, Any]:
    """`rope_dims`, `rope_theta` and `rope_scaling` from `rope_parameters` (transformers 5) or the older entries.

    `theta` and `share`, the part of a head that is rotated, hold where those say nothing.
    """
    top, stated = Entries(match), _of_rope(match)
    if any(isinstance(value, Mapping) for value in stated.table.values()):
        raise match.error("RoPE in its configuration is one for each kind of layer, expected one for all")
    kind = stated.text("rope_type" if "rope_type" in stated else "type", "default", ROPE_TYPES)
    for name in ("rotary_emb_base", "rope_theta"):
        theta = top.number(name, theta)
    for name in ("rotary_pct", "partial_rotary_factor"):
        share = top.number(name, share)
    theta, share = stated.number("rope_theta", theta), stated.number("partial_rotary_factor", share)
    if not 0 <= share <= 1:
        raise match.error(f"partial_rotary_factor = {share} in its configuration: expected a number from 0 to 1")
    fields = {"rope_theta": theta, "rope_dims": int(head_dim * share), "rope_interleaved": False}
    if kind == "default":
        return fields
    scaling = {"type": kind, "factor": stated.number("factor")}
    if kind == "llama3":
        scaling |= {name: stated.number(name) for name in ("low_freq_factor", "high_freq_factor")}
        known = top.integer("max_position_embeddings")
        scaling["original_length"] = stated.integer("original_max_position_embeddings", known)
    for name, value in scaling.items():
        if value is None:
            stored = "original_max_position_embeddings" if name == "original_length" else name
            raise stated.wrong(stored, f"a number above 0 for rope_type = {kind!r}")
    return fields | {"rope_scaling": scaling}


def _of_rope(match: Match) -> Entries:
    top = Entries(match)
    return top.entries("rope_parameters" if top.table.get("rope_parameters") else "rope_scaling")
