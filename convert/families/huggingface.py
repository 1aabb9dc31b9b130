"""Read configurations (config.json) of Hugging Face transformers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.limits import MAX_TOKENS
from dsmr_mlx.convert.rules import Match

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    # Different implementations of the tanh approximation.
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
ROPE_TYPES = ("default", "linear", "llama3")


class Entries:
    """A table of a configuration, with checked access. An entry that is null counts as missing.

    All methods raise `UserError` if a value has the wrong type or is out of range; the message names the source, the
    entry and what is valid.
    """

    def __init__(self, match: Match, table: Mapping[str, Any] | None = None, inside: str = ""):
        """The top level of the configuration, or a `table` in it with the name `inside`."""
        self.match = match
        self.table = match.source.config if table is None else table
        self.inside = inside and f"{inside}."

    def __contains__(self, name: str) -> bool:
        return self.table.get(name) is not None

    def number(self, name: str, default: float | None = None) -> float | None:
        """Return a finite number."""

        def valid(value: Any) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300

        value = self._checked(name, default, valid, "a finite number")
        return None if value is None else float(value)

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int | None:
        """Return a size or count."""

        def valid(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_TOKENS

        return self._checked(name, default, valid, f"an integer from {least} to {MAX_TOKENS}")

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        return self._checked(name, default, lambda value: isinstance(value, bool), "true or false")

    def text(self, name: str, default: str, known: Collection[str]) -> str:
        """Return one of the `known` texts."""
        return self._checked(
            name, default, lambda value: isinstance(value, str) and value in known, f"one of {', '.join(known)}"
        )

    def texts(self, name: str, known: Collection[str], length: int) -> list[str] | None:
        """Return a list of `length` texts that are `known`, or None if it is missing."""

        def valid(value: Any) -> bool:
            return isinstance(value, list) and all(isinstance(text, str) and text in known for text in value)

        value = self._checked(name, None, valid, f"a list of {', '.join(known)}")
        if value is not None and len(value) < length:
            raise self.error(name, f"{length} of them, one for each layer")
        return value and value[:length]

    def entries(self, name: str) -> "Entries":
        """Return a table in this one, empty if it is missing."""
        return Entries(self.match, self._checked(name, {}, lambda value: isinstance(value, Mapping), "a table"), name)

    def _checked(self, name: str, default: Any, valid: Callable[[Any], bool], expected: str) -> Any:
        value = self.table.get(name)
        if value is None:
            return default
        if not valid(value):
            raise self.error(name, expected)
        return value

    def error(self, name: str, expected: str) -> UserError:
        """Return an error to raise: the entry with its value, and what is valid."""
        value = repr(self.table.get(name))
        shown = value if len(value) <= 80 else f"{value[:79]}…"
        where = f"in its {self.match.source.config_name}"
        return self.match.error(f"{self.inside}{name} = {shown} {where}: expected {expected}")


def check_type(match: Match, known: Sequence[str]) -> str:
    """Return the model_type; the first of `known` if none is stated.

    Raises `UserError` for another type: it may have the same names but compute something else.
    """
    if quantization := match.source.config.get("quantization_config"):
        how = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise match.error(f"quantized ({str(how)[:80]}), expected float weights")
    return Entries(match).text("model_type", known[0], known)


def require(match: Match, name: str, expected: bool) -> None:
    """Raise `UserError` if a flag of the configuration is present and not as `expected`."""
    entries = Entries(match)
    if entries.flag(name, expected) != expected:
        raise entries.error(name, "true" if expected else "false")


def sizes(match: Match, names: Mapping[str, str]) -> dict[str, int]:
    """Return fields of `ModelConfig`; names: field → entry. Missing entries are left out."""
    entries = Entries(match)
    return {field: entries.integer(name) for field, name in names.items() if name in entries}


def untied(match: Match) -> dict[str, bool]:
    """Return `tie_embeddings` if the configuration says false; otherwise the weights decide."""
    return {} if Entries(match).flag("tie_word_embeddings", True) else {"tie_embeddings": False}


def activation(match: Match, name: str, default: str) -> str:
    """Return the `activation` of a `DSMR` for an entry."""
    return ACTIVATIONS[Entries(match).text(name, default, ACTIVATIONS)]


def assumed(match: Match, settings: Mapping[str, Any], what: Mapping[str, tuple[str, bool]]) -> list[str]:
    """Return a note on missing entries. what: field of `ModelConfig` → assumption, whether an entry states it."""
    missing = {field: text for field, (text, stated) in what.items() if not stated and field not in settings}
    if not missing:
        return []
    reason = f"not stated in its {match.source.config_name}" if match.source.config else "no config.json"
    overrides = " ".join(f"`{field}`=…" for field in missing)
    return [f"{reason}: {', '.join(missing.values())} assumed; {overrides} overrides it"]


def states_rope(match: Match, names: Collection[str]) -> bool:
    """Return whether one of the entries is present, at the top level or in the table of RoPE."""
    return any(name in entries for entries in (_rope_entries(match), Entries(match)) for name in names)


def rope(match: Match, head_dim: int, theta: float, share: float = 1.0) -> dict[str, Any]:
    """Return `rope_dims`, `rope_theta` and `rope_scaling`, from `rope_parameters` (transformers 5) or older entries.

    Defaults: `theta`, and `share`, the fraction of a head that is rotated.
    """
    top, stated = Entries(match), _rope_entries(match)
    if any(isinstance(value, Mapping) for value in stated.table.values()):
        raise match.error("its configuration has RoPE parameters per type of layer, expected one set for all")
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
            raise stated.error(stored, f"a number above 0 for rope_type = {kind!r}")
    return fields | {"rope_scaling": scaling}


def _rope_entries(match: Match) -> Entries:
    top = Entries(match)
    return top.entries("rope_parameters" if top.table.get("rope_parameters") else "rope_scaling")
