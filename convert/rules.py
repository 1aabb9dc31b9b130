"""Families of checkpoints: rules that map stored tensors to parameters of a `DSMR`, and their match with a source."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import mlx.core as mx

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.convert.transforms import TRANSFORMS, Shape
from dsmr_mlx.convert.weights_source import WeightsSource
from dsmr_mlx.model.config import ModelConfig

BLOCK = "layers.{i}"  # begins the names of the parameters of a layer
TARGETS = (
    "embed.weight",
    "positions.weight",
    *(
        f"{BLOCK}.{name}.{kind}"
        for name in (
            "attention_norm",
            "attention.qkv",
            "attention.out",
            "feed_forward_norm",
            "feed_forward.gate_up",
            "feed_forward.up",
            "feed_forward.down",
        )
        for kind in ("weight", "bias")
    ),
    *(
        f"{BLOCK}.{name}"
        for name in (
            "attention.q_norm.weight",
            "attention.k_norm.weight",
            "attention.value_shares",
            "skip",
            "attention_canon.weight",
            "feed_forward_canon.weight",
        )
    ),
    "norm.weight",
    "norm.bias",
    "head.weight",
    "head.bias",
)
LAYER = re.compile(r"\{([1-9]\d*)?i(?:\+(\d+))?\}")  # {i}, {2i}, {2i+1}
NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
# Names of wrapper modules: torch.compile, FSDP, activation checkpointing.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Rule:
    """A transform of stored tensors `source`, one name or several to join, to the parameter `target`.

    `{i}` is the layer number, `{2i}` and `{2i+1}` twice that and one more. Of several rules with one target the first
    whose tensors are all present is used. A checkpoint without the tensors of a `required` rule is not of the family;
    without those of another rule, the model has no such parameter.
    """

    source: str | tuple[str, ...]
    target: str
    transform: str = "identity"
    required: bool = True

    def __post_init__(self) -> None:
        names = (self.source,) if isinstance(self.source, str) else tuple(self.source)
        object.__setattr__(self, "source", names)
        if self.target not in TARGETS:
            raise UserError(f"to = {self.target!r}: expected one of {', '.join(TARGETS)}")
        if self.transform not in TRANSFORMS:
            raise UserError(f"transform = {self.transform!r}: expected one of {', '.join(TRANSFORMS)}")
        if not names or (len(names) > 1) != TRANSFORMS[self.transform].joins:
            wanted = "several names" if TRANSFORMS[self.transform].joins else "one name"
            raise UserError(f"from = {list(names)}: expected {wanted} for transform = {self.transform!r}")
        for name in names:
            if len(LAYER.findall(name)) != self.target.count("{i}"):
                times = "once" if "{i}" in self.target else "not at all"
                raise UserError(f"from = {name!r}: expected {{i}} {times}, as in to = {self.target!r}")


def weight_and_bias(
    source: str | Sequence[str], target: str, transform: str = "identity", bias_transform: str | None = None
) -> tuple[Rule, Rule]:
    """Return the rules of a module: its weight, and its bias, which may be missing. Names are without `.weight`."""
    names = (source,) if isinstance(source, str) else source
    weight, bias = (tuple(f"{name}.{kind}" for name in names) for kind in ("weight", "bias"))
    return (
        Rule(weight, f"{target}.weight", transform),
        Rule(bias, f"{target}.bias", bias_transform or transform, required=False),
    )


@dataclass(frozen=True)
class Configuration:
    """The configuration of the original.

    fields   fields of `ModelConfig`, without those that only a DSMR has (horizons, segment_length)
    notes    assumptions to show to the user, and the settings that override them
    windows  for each layer how many earlier tokens a token attends to, None for all; empty: all in all layers
    context  its context in training, in tokens, if the source does not state it; None: unknown
    """

    fields: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)
    context: int | None = None


@dataclass(frozen=True)
class Family:
    """The checkpoints of one program.

    about      one line for the user
    rules      names without prefix and `body`
    configure  match, settings of the user → configuration, beyond what follows from the shapes (`Match.structure`);
               raises `UserError` for features that a `DSMR` lacks
    body       name of the module around everything but the head; optional in stored names
    ignored    patterns (`*`) of stored names that are not weights
    signature  distinguishes families with the same names
    tokenizer  name of the vocabulary that all its models use, if any
    original   the original model to verify a conversion with, a key of `originals.ORIGINALS`; None: unknown
    """

    name: str
    about: str
    rules: tuple[Rule, ...]
    configure: Callable[["Match", Mapping[str, Any]], Configuration]
    body: str = ""
    ignored: tuple[str, ...] = ()
    signature: Callable[["Match"], bool] | None = None
    tokenizer: str | None = None
    original: str | None = None


@dataclass(frozen=True)
class Step:
    """One parameter to make from stored tensors, by their names in the source."""

    target: str
    sources: tuple[str, ...]
    transform: str

    @property
    def computes(self) -> bool:
        """Whether values are computed, not only moved."""
        return TRANSFORMS[self.transform].computes

    def apply(self, arrays: Sequence[mx.array], config: ModelConfig) -> mx.array:
        """Return the parameter, not evaluated: float32 if it is computed, else in the dtype of the stored tensors."""
        return TRANSFORMS[self.transform].apply(arrays, config)


class Match:
    """The rules of a family applied to the tensors of a source whose names begin with a prefix.

    names    name in the rules → stored name
    steps    target → step, for rules whose tensors are all present
    partial  target → missing names, present names, for rules whose tensors are partly present
    """

    def __init__(self, family: Family, prefix: str, source: WeightsSource):
        self.family = family
        self.prefix = prefix
        self.source = source
        self.names = {
            name[len(prefix) :].removeprefix(family.body): stored
            for name, stored in plain_names(source).items()
            if name.startswith(prefix)
        }
        self.steps: dict[str, Step] = {}
        self.partial: dict[str, tuple[list[str], list[str]]] = {}
        for rule in family.rules:
            self._apply(rule)

    def _apply(self, rule: Rule) -> None:
        found = [_layers_of(pattern, self.names) for pattern in rule.source]
        for layer in sorted({i for layers in found for i in layers}):
            target = rule.target.replace("{i}", str(layer))
            present = [layers[layer] for layers in found if layer in layers]
            if target in self.steps:
                continue
            if len(present) == len(found):
                self.steps[target] = Step(target, tuple(self.names[name] for name in present), rule.transform)
                self.partial.pop(target, None)
            else:
                expected = [name_in(pattern, layer) for pattern in rule.source]
                self.partial[target] = ([n for n in expected if n not in present], [self.names[n] for n in present])

    def shape(self, name: str) -> Shape | None:
        """Return the shape of a stored tensor by its name in the rules, or None if it is missing."""
        return self.source.shapes[self.names[name]] if name in self.names else None

    def read(self, name: str) -> mx.array:
        """Return a stored tensor by its name in the rules."""
        return self.source.read(self.names[name])

    def result_shape(self, target: str) -> Shape:
        """Return the shape of the parameter of a step. Raises `ValueError` if the stored shapes are invalid."""
        step = self.steps[target]
        return TRANSFORMS[step.transform].shape([self.source.shapes[name] for name in step.sources])

    @property
    def fits(self) -> bool:
        """Whether all required tensors of the model and of at least one layer are present."""
        required = {rule.target for rule in self.family.rules if rule.required}
        once = {target for target in required if "{i}" not in target}
        return once <= self.steps.keys() and any(
            {target.replace("{i}", str(i)) for target in required} <= self.steps.keys() for i in self.layers
        )

    @cached_property
    def layers(self) -> set[int]:
        """The numbers of the layers that have a step."""
        return {int(target.split(".")[1]) for target in self.steps if target.startswith("layers.")}

    @property
    def known(self) -> set[str]:
        """Stored names that occur in a step, complete or partial, or that the family ignores."""
        used = {name for step in self.steps.values() for name in step.sources}
        used |= {name for _, present in self.partial.values() for name in present}
        return used | self.ignored

    @property
    def ignored(self) -> set[str]:
        """Stored names that the family ignores."""
        patterns = self.family.ignored
        return {stored for name, stored in self.names.items() if any(fnmatchcase(name, p) for p in patterns)}

    @cached_property
    def structure(self) -> dict[str, Any]:
        """The fields of `ModelConfig` that follow from the names and shapes of the parameters."""
        shapes = {}
        for target, step in self.steps.items():
            try:
                shapes[target] = self.result_shape(target)
            except ValueError:
                continue  # reported by `plan`
            if not TRANSFORMS[step.transform].shows:
                del shapes[target]
        gated = "layers.0.feed_forward.gate_up.weight" in shapes
        up = shapes.get(f"layers.0.feed_forward.{'gate_up' if gated else 'up'}.weight", ())
        fields = {
            "n_layers": max(self.layers, default=-1) + 1,
            "gated": gated,
            "attention_bias": "layers.0.attention.qkv.bias" in shapes,
            "output_bias": "layers.0.attention.out.bias" in shapes,
            "feed_forward_bias": any(f"layers.0.feed_forward.{n}.bias" in shapes for n in ("gate_up", "up", "down")),
            "norm_bias": any(f"{name}.bias" in shapes for name in ("norm", "layers.0.attention_norm")),
            "head_bias": "head.bias" in shapes,
            "qk_norm": "layers.0.attention.q_norm.weight" in shapes,
            "value_residual": "layers.1.attention.value_shares" in shapes,
            "embedding_skip": "layers.0.skip" in shapes,
            "canon": "layers.0.attention_canon.weight" in shapes,
        }
        if up:
            fields["d_ff"] = up[0] // (2 if gated else 1)
        if len(shapes.get("embed.weight", ())) == 2:
            fields["vocab_size"], fields["d_model"] = shapes["embed.weight"]
        if len(shapes.get("positions.weight", ())) == 2:
            fields["max_positions"] = shapes["positions.weight"][0]
        return fields

    def heads(self, settings: Mapping[str, Any], n_heads: int | None = None, head_dim: int | None = None) -> dict:
        """Return `n_heads`, `n_kv_heads` and `head_dim`, from one of `n_heads` and `head_dim`; settings come first.

        Raises `UserError` if both are unknown or do not divide the rows of the queries.
        """
        out, qkv = (f"layers.0.attention.{name}.weight" for name in ("out", "qkv"))
        try:
            queries, rows = self.result_shape(out)[1], self.result_shape(qkv)[0]
        except (KeyError, IndexError, ValueError):
            queries = 0
        if queries == 0:
            wanted = [rule for rule in self.family.rules if rule.target.endswith(("out.weight", "qkv.weight"))]
            names = [self.prefix + name_in(name, 0) for rule in wanted for name in rule.source] or ["rules for it"]
            raise self.error(f"layer 0 has no attention of {self.family.name}, expected {', '.join(names)}") from None
        if not settings.keys().isdisjoint(("n_heads", "head_dim")):
            n_heads, head_dim = settings.get("n_heads"), settings.get("head_dim")
        if n_heads is None and head_dim is None:
            unknown = f"the number of heads is unknown ({queries} rows of queries), expected `n_heads`=…"
            raise self.error(unknown if self.source.config else f"{unknown}, or its config.json in the same folder")
        for name, value in (("n_heads", n_heads), ("head_dim", head_dim)):
            if value is not None and (not isinstance(value, int) or value < 1 or queries % value):
                raise self.error(f"{name} = {value!r}: expected a divisor of {queries}, the rows of the queries")
        n_heads = n_heads or queries // head_dim
        head_dim = head_dim or queries // n_heads
        if n_heads * head_dim != queries:
            raise self.error(
                f"n_heads = {n_heads}, head_dim = {head_dim}: expected a product of {queries}, the rows of the queries"
            )
        return {"n_heads": n_heads, "n_kv_heads": (rows - queries) // (2 * head_dim), "head_dim": head_dim}

    def error(self, message: str) -> UserError:
        """Return an error to raise, with the path of the source."""
        return UserError(f"{self.source.path}: {message}")


def plain_names(source: WeightsSource) -> dict[str, str]:
    """Return name without wrapper modules → stored name. Raises `UserError` if two stored names become equal."""
    plain: dict[str, str] = {}
    for name in source.shapes:
        short = WRAPPERS.sub("", name)
        while short.startswith("module."):
            short = short.removeprefix("module.")
        if short in plain:
            raise UserError(f"{source.path}: {plain[short]} and {name} both mean {short}, expected one tensor")
        plain[short] = name
    return plain


def _layers_of(pattern: str, names: Collection[str]) -> dict[int, str]:
    """Map layers to the names that match a pattern of a rule. A pattern without `{i}` is layer 0."""
    placeholder = LAYER.search(pattern)
    if placeholder is None:
        return {0: pattern} if pattern in names else {}
    start, end = pattern[: placeholder.start()], pattern[placeholder.end() :]
    factor, offset = int(placeholder[1] or 1), int(placeholder[2] or 0)
    layers = {}
    for name in names:
        if name.startswith(start) and name.endswith(end) and len(name) > len(start) + len(end):
            number = name[len(start) : len(name) - len(end)]
            if NUMBER.fullmatch(number) and (int(number) - offset) % factor == 0 and int(number) >= offset:
                layers[(int(number) - offset) // factor] = name
    return layers


def name_in(pattern: str, layer: int) -> str:
    """Return the name for a layer from a pattern of a rule, without prefix and body."""
    return LAYER.sub(lambda placeholder: str(int(placeholder[1] or 1) * layer + int(placeholder[2] or 0)), pattern)
