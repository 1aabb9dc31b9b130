"""What a family of foreign checkpoints is: rules from stored names to parameters of a `DSMR`, and conventions."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.convert.transforms import TRANSFORMS, Shape
from dsmr_mlx.model.config import ModelConfig

BLOCK = "layers.{i}"
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
    "norm.weight",
    "norm.bias",
    "head.weight",
    "head.bias",
)
LAYER = re.compile(r"\{([1-9]\d*)?i(?:\+(\d+))?\}")
NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
# Modules that wrap others without a meaning of their own: torch.compile, FSDP, activation checkpointing.
TRANSPARENT = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Tensors(Protocol):
    """What a map needs of `sources.Source`."""

    path: Path
    shapes: dict[str, Shape]
    config: dict[str, Any]
    config_name: str

    def read(self, name: str) -> mx.array:
        """One tensor by its stored name, evaluated; `KeyError` for a name that is not in `shapes`."""


@dataclass(frozen=True)
class Rule:
    """Stored tensors `source`, one name or several that the transform joins, become the parameter `target`.

    `{i}` stands for the layer's number, `{2i}` and `{2i+1}` for twice as much and one more. Of several rules with one
    target the first whose tensors are all there is used. A checkpoint without a `required` rule's tensors is not of the
    family; other rules are for tensors that some of its models lack, which then have no such parameter.
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


@dataclass(frozen=True)
class Configuration:
    """What is known of a checkpoint's model.

    fields   of `ModelConfig`, without those that the original has no word for (horizons, segment_length)
    notes    for the user: what was assumed, and which setting says otherwise
    windows  for each layer how many tokens before its own one attends to, None for all; empty: all layers to all
    """

    fields: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)


@dataclass(frozen=True)
class Family:
    """The checkpoints of one program.

    about      one line for the user
    rules      see `Rule`; names without prefix and `body`
    configure  a match and the user's settings → what its configuration or its conventions say, beyond what follows
               from the shapes (`Match.structure`); raises `UserError` for what a `DSMR` cannot do
    body       the module that holds everything but the head; with or without it in the names
    ignored    patterns (`*`) of stored names that hold no weights
    signature  tells families with the same names apart
    tokenizer  the vocabulary that its models use, if there is one for all
    original   the program to compare a conversion with, a key of `originals.ORIGINALS`; None: it is not known
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
    """Stored tensors, by their names in the source, that become one parameter."""

    target: str
    sources: tuple[str, ...]
    transform: str

    def apply(self, arrays: Sequence[mx.array], config: ModelConfig) -> mx.array:
        """The parameter, not evaluated, in the dtype of the stored tensors."""
        return TRANSFORMS[self.transform].apply(arrays, config)


class Match:
    """A family laid over the names of a source that begin with a prefix.

    names    as the rules write them → as stored
    steps    by target: what the rules make of what is there
    partial  by target: of rules whose tensors are not all there, the names that are missing and those that are not
    """

    def __init__(self, family: Family, prefix: str, source: Tensors):
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
            self._lay(rule)

    def _lay(self, rule: Rule) -> None:
        found = [_layers_of(pattern, self.names) for pattern in rule.source]
        for layer in sorted({i for layers in found for i in layers}):
            target = rule.target.replace("{i}", str(layer))
            here = [layers[layer] for layers in found if layer in layers]
            if target in self.steps:
                continue
            if len(here) == len(found):
                self.steps[target] = Step(target, tuple(self.names[name] for name in here), rule.transform)
                self.partial.pop(target, None)
            else:
                expected = [name_in(pattern, layer) for pattern in rule.source]
                self.partial[target] = ([n for n in expected if n not in here], [self.names[n] for n in here])

    def shape(self, name: str) -> Shape | None:
        """Of a stored tensor, by the name that the rules use; None if there is none."""
        return self.source.shapes[self.names[name]] if name in self.names else None

    def read(self, name: str) -> mx.array:
        """A stored tensor, by the name that the rules use."""
        return self.source.read(self.names[name])

    def made_shape(self, target: str) -> Shape:
        """Of the parameter that a step makes. Raises `ValueError` if its transform cannot take the stored shapes."""
        step = self.steps[target]
        return TRANSFORMS[step.transform].shape([self.source.shapes[name] for name in step.sources])

    @property
    def fits(self) -> bool:
        """Whether the required tensors of the model and of at least one layer are there."""
        required = {rule.target for rule in self.family.rules if rule.required}
        once = {target for target in required if "{i}" not in target}
        return once <= self.steps.keys() and any(
            {target.replace("{i}", str(i)) for target in required} <= self.steps.keys() for i in self.layers
        )

    @cached_property
    def layers(self) -> set[int]:
        """The numbers of the layers of which a step makes something."""
        return {int(target.split(".")[1]) for target in self.steps if target.startswith("layers.")}

    @property
    def known(self) -> set[str]:
        """Stored names that a step uses, or would use if the rest of its tensors were there, or that mean nothing."""
        used = {name for step in self.steps.values() for name in step.sources}
        used |= {name for _, here in self.partial.values() for name in here}
        return used | self.meaningless

    @property
    def meaningless(self) -> set[str]:
        """Stored names that the family ignores."""
        patterns = self.family.ignored
        return {stored for name, stored in self.names.items() if any(fnmatchcase(name, p) for p in patterns)}

    @cached_property
    def structure(self) -> dict[str, Any]:
        """The fields of `ModelConfig` that follow from which parameters there are and from their shapes."""
        shapes = {}
        for target, step in self.steps.items():
            try:
                shapes[target] = self.made_shape(target)
            except ValueError:
                continue  # the plan lists it
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
        }
        if up:
            fields["d_ff"] = up[0] // (2 if gated else 1)
        if len(shapes.get("embed.weight", ())) == 2:
            fields["vocab_size"], fields["d_model"] = shapes["embed.weight"]
        if len(shapes.get("positions.weight", ())) == 2:
            fields["max_positions"] = shapes["positions.weight"][0]
        return fields

    def heads(self, settings: Mapping[str, Any], n_heads: int | None = None, head_dim: int | None = None) -> dict:
        """`n_heads`, `n_kv_heads` and `head_dim`; the first or the last is to be known, from the settings if there.

        Raises `UserError` if neither is known, or if they do not divide the queries.
        """
        out, qkv = (f"layers.0.attention.{name}.weight" for name in ("out", "qkv"))
        try:
            queries, rows = self.made_shape(out)[1], self.made_shape(qkv)[0]
        except (KeyError, IndexError, ValueError):
            queries = 0
        if queries == 0:
            wanted = [rule for rule in self.family.rules if rule.target.endswith(("out.weight", "qkv.weight"))]
            names = ", ".join(name_in(name, 0) for rule in wanted for name in rule.source) or "rules for it"
            raise self.error(f"no attention in layer 0 as in {self.family.name}, expected {names}") from None
        if not settings.keys().isdisjoint(("n_heads", "head_dim")):
            n_heads, head_dim = settings.get("n_heads"), settings.get("head_dim")
        if n_heads is None and head_dim is None:
            raise self.error(
                f"how many heads share the {queries} rows of the queries does not show in the weights, "
                "expected --set n_heads=…"
            )
        for name, value in (("n_heads", n_heads), ("head_dim", head_dim)):
            if value is not None and (not isinstance(value, int) or value < 1 or queries % value):
                raise self.error(f"{name} = {value!r}: expected a divisor of {queries}, the rows of the queries")
        n_heads = n_heads or queries // head_dim
        head_dim = head_dim or queries // n_heads
        if n_heads * head_dim != queries:
            raise self.error(f"n_heads = {n_heads}, head_dim = {head_dim}: expected a product of {queries}, as stored")
        return {"n_heads": n_heads, "n_kv_heads": (rows - queries) // (2 * head_dim), "head_dim": head_dim}

    def error(self, message: str) -> UserError:
        """To raise: the message with the name of the source before it."""
        return UserError(f"{self.source.path}: {message}")


def plain_names(source: Tensors) -> dict[str, str]:
    """Names without the wrappers that leave a model as it is → names as stored. Raises `UserError` if two are one."""
    plain: dict[str, str] = {}
    for name in source.shapes:
        short = TRANSPARENT.sub("", name)
        while short.startswith("module."):
            short = short.removeprefix("module.")
        if short in plain:
            raise UserError(f"{source.path}: both {plain[short]} and {name} for {short}, expected one tensor")
        plain[short] = name
    return plain


def _layers_of(pattern: str, names: Collection[str]) -> dict[int, str]:
    """The names that a rule's pattern stands for, by layer; 0 for a pattern without one."""
    place = LAYER.search(pattern)
    if place is None:
        return {0: pattern} if pattern in names else {}
    start, end = pattern[: place.start()], pattern[place.end() :]
    step, offset = int(place[1] or 1), int(place[2] or 0)
    layers = {}
    for name in names:
        if name.startswith(start) and name.endswith(end) and len(name) > len(start) + len(end):
            number = name[len(start) : len(name) - len(end)]
            if NUMBER.fullmatch(number) and (int(number) - offset) % step == 0 and int(number) >= offset:
                layers[(int(number) - offset) // step] = name
    return layers


def name_in(pattern: str, layer: int) -> str:
    """The name that a rule's pattern stands for in a layer, without prefix and body."""
    return LAYER.sub(lambda place: str(int(place[1] or 1) * layer + int(place[2] or 0)), pattern)
