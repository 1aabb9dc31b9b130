"""Horizon schedules: how many tokens of memory each layer carries from segment to segment.

A schedule is written as one line, `family:values,option=value,flag`, and `parse` reads it:

    two-scale:long=2x1024,short=128            two-scale:budget=2560,long=2,ratio=8
    inverse-two-scale:long=2x1024,short=128    inverse-two-scale:budget=2560,long=2
    interleaved:long=1024,every=3,short=128    interleaved:budget=2560,every=3
    binary:long=1024@0+3,short=128             binary:budget=2560,long=@0+3
    uniform:512                                uniform:budget=2560
    linear:budget=2560,reverse                 geometric:budget=2560,ratio=0.5,granularity=128
    full:4096    custom:1024,512,256,128       none
    whole        whole:32768                   whole:32768,longest=104064

`horizon_families` has the families. Source of the idea: arXiv 2602.19816. Needs neither MLX nor NumPy.
"""

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, Self, get_args

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.formatting import format_bytes
from dsmr_mlx.model.config import CANON_WIDTH, ModelConfig
from dsmr_mlx.model.horizon_families import FAMILIES, Counted, Horizons, Placed, integer, within

_DTYPES = {1: "int8", 2: "bf16", 4: "float32"}
_MAX_TERMS = 6  # of a sum such as `2 × 1024 + 4 × 128`; longer ones are hard to read


@dataclass(frozen=True)
class HorizonSchedule:
    """The memory horizons M_l of a stack of layers, in tokens, and the text form that produced them.

    `horizons[0]` belongs to the lowest layer. `spec` is the canonical text form, with options in the family's order:
    `parse(schedule.spec, len(schedule.horizons)) == schedule`.
    """

    family: str
    horizons: Horizons
    spec: str

    @classmethod
    def custom(cls, horizons: Sequence[int]) -> Self:
        """Return the schedule of family `custom` with these horizons, lowest layer first."""
        return parse(f"custom:{','.join(map(str, horizons))}", len(horizons))

    @property
    def budget(self) -> int:
        """The recurrent-state budget Σ M_l, in tokens."""
        return sum(self.horizons)

    @property
    def summary(self) -> str:
        """The horizons in short, lowest layer first, such as `2 × 1024 + 4 × 128`."""
        return _summary(self.horizons)

    def state_bytes(
        self,
        n_kv_heads: int,
        head_dim: int,
        segment_length: int = 0,
        batch_size: int = 1,
        itemsize: int = 2,
        canon_size: int = 0,
    ) -> int:
        """Return the bytes of the state: of keys and values 2 · Σ (M_l + S) · H_kv · D · itemsize · B.

        With `segment_length=0` this is the recurrent-state budget; with S, everything that a state allocates. Canon
        layers add the inputs of 3 + S tokens in each layer, `ModelConfig.canon_size` numbers a token.
        """
        layers = len(self.horizons)
        numbers = 2 * (self.budget + segment_length * layers) * n_kv_heads * head_dim
        numbers += layers * (CANON_WIDTH - 1 + segment_length) * canon_size
        return numbers * itemsize * batch_size

    def reach(self, segment_length: int, canon: bool = False) -> Horizons:
        """Return, per layer l, how many tokens before a segment's start can influence the outputs of layers 0…l in it.

        A key in memory depends on its own segment from the start, and on the memory before that segment. Hence, above
        the lowest layer, a horizon counts as all the segments it touches. Keys of the lowest layer depend on single
        tokens. With Canon layers this is an upper limit: attention reads 3 tokens further, and the first tokens of a
        segment also read the outputs of attention for the 3 before, which saw the memory of their own segment. Raises
        `UserError` for a segment length below 1.
        """
        within("segment_length", segment_length, 1)

        def whole_segments(tokens: int) -> int:
            return -(-tokens // segment_length) * segment_length

        extra = CANON_WIDTH - 1 + whole_segments(CANON_WIDTH - 1) if canon else 0
        lowest, *upper = (horizon + extra for horizon in self.horizons)
        return tuple(accumulate(map(whole_segments, upper), initial=lowest))

    def describe(
        self, n_kv_heads: int | None = None, head_dim: int | None = None, itemsize: int = 2, canon_size: int = 0
    ) -> str:
        """Return a one-line description; given the heads, with the budget in bytes of one lane.

        >>> parse("two-scale:long=2x1024,short=128", 6).describe(n_kv_heads=8, head_dim=64)
        'two-scale: 2 × 1024 + 4 × 128, budget 2560 tokens, 5.0 MiB at bf16, 58 % below full'

        "Full" is every layer at this schedule's longest horizon.
        """
        parts = [f"{self.family}: {_summary(self.horizons)}", f"budget {self.budget} tokens"]
        if n_kv_heads is not None and head_dim is not None:
            size = format_bytes(self.state_bytes(n_kv_heads, head_dim, itemsize=itemsize, canon_size=canon_size))
            parts.append(f"{size} at {_DTYPES.get(itemsize, f'{itemsize} bytes a number')}")
        full = max(self.horizons) * len(self.horizons)
        if full == 0:
            parts.append("only the memory of the Canon layers" if canon_size else "each segment stands alone")
        elif below := round(100 * (1 - self.budget / full)):
            parts.append(f"{below} % below full")
        return ", ".join(parts)


def model_reach(config: ModelConfig) -> int:
    """Return how many tokens before the current segment can influence a model's predictions."""
    return HorizonSchedule.custom(config.horizons).reach(config.segment_length, config.canon)[-1]


@dataclass(frozen=True)
class LayerRow:
    """One layer of a schedule: `horizon` and `reach` in tokens, `bytes` carried between segments."""

    layer: int
    horizon: int
    bytes: int
    reach: int


def table(
    schedule: HorizonSchedule,
    n_kv_heads: int,
    head_dim: int,
    segment_length: int,
    itemsize: int = 2,
    canon_size: int = 0,
) -> list[LayerRow]:
    """Return the schedule layer by layer, lowest first, for one lane.

    The bytes are those of the carried tokens, without the working segment. They sum to
    `schedule.state_bytes(n_kv_heads, head_dim, itemsize=itemsize, canon_size=canon_size)`.
    """
    reaches = schedule.reach(segment_length, canon=canon_size > 0)
    rows = enumerate(zip(schedule.horizons, reaches, strict=True))
    token, inputs = 2 * n_kv_heads * head_dim, (CANON_WIDTH - 1) * canon_size
    return [LayerRow(layer, M, (M * token + inputs) * itemsize, reach) for layer, (M, reach) in rows]


def parse(spec: str, n_layers: int) -> HorizonSchedule:
    """Parse the text form of a schedule for `n_layers` layers. A plain list of integers is `custom`.

    Raises `UserError`, which quotes `spec`, for an unknown family, an unknown, repeated, missing or unused option, and
    a value out of bounds or unfit for the layers or the budget.
    """
    try:
        name, tokens = _tokens(spec)
        values, options = _arguments(name, tokens)
        horizons = FAMILIES[name](n_layers, *values, **options)
    except UserError as error:
        raise UserError(f"horizons {spec!r}: {error}") from None
    texts = [
        *map(str, values),
        *(key if value is True else f"{key}={value}" for key, value in options.items()),
    ]
    return HorizonSchedule(name, horizons, f"{name}:{','.join(texts)}" if texts else name)


def resolve(spec: str, longest_piece: int, segment_length: int) -> str:
    """Return the text of a schedule; of the family `whole`, with the longest piece of a corpus, in tokens, filled in.

    It is rounded up to whole segments. Text that is already resolved is unchanged.
    """
    name, colon, rest = spec.partition(":")
    if name.strip() != "whole" or "longest" in rest:
        return spec
    return f"{spec}{',' if colon else ':'}longest={-(-longest_piece // segment_length) * segment_length}"


def _tokens(spec: str) -> tuple[str, list[str]]:
    """Return the family's name and the parts between commas."""
    if re.match(r"\s*[-+]?\d", spec):
        spec = f"custom:{spec}"
    name, colon, rest = (part.strip() for part in spec.partition(":"))
    if name not in FAMILIES:
        raise UserError(f"unknown family, expected one of {', '.join(FAMILIES)}")
    tokens = [token.strip() for token in rest.split(",")] if colon else []
    if "" in tokens:
        raise UserError("an empty value or option, expected one after each colon and comma")
    return name, tokens


def _arguments(name: str, tokens: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of the family: positional values, and options in the order of its signature."""
    signature = inspect.signature(FAMILIES[name])
    n_layers, *parameters = signature.parameters.values()
    named = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    positional = next((p for p in parameters if p.name not in named), None)
    takes = f"{name} takes {', '.join(p.name for p in parameters) or 'nothing'}"
    values, options = [], {}
    for token in tokens:
        key, equals, text = (part.strip() for part in token.partition("="))
        if key in options:
            raise UserError(f"{key} is given twice, expected once")
        if key in named:
            options[key] = _value(named[key], text if equals else None)
        elif positional is None or (equals and key != positional.name):
            raise UserError(f"unknown option {key!r}, {takes}")
        else:
            values.append(_value(positional, text if equals else token))
    try:
        signature.bind(n_layers, *values, **options)
    except TypeError as error:  # too many values, or one missing: Python's message names it
        raise UserError(f"{error}, {takes}") from None
    return values, {key: options[key] for key in named if key in options}


def _value(parameter: inspect.Parameter, text: str | None) -> Any:
    """Parse one value as annotated, `T` or `T | None`; text: None for an option without a value."""
    kind, *_ = get_args(parameter.annotation) or (parameter.annotation,)
    if kind is bool:
        if text is not None:
            raise UserError(f"{parameter.name} is {text!r}, expected no value: the name alone turns it on")
        return True
    read, expected = _READERS[kind]
    try:
        return read(text or "")
    except ValueError:
        raise UserError(f"{parameter.name} is {text or ''!r}, expected {expected}") from None


def _number(text: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return int(value) if value.is_integer() else value  # 8, not 8.0, in the canonical text


_READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    int: (integer, "an integer"),
    float: (_number, "a number"),
    Counted: (Counted.read, "COUNTxHORIZON, or COUNT with a budget"),
    Placed: (Placed.read, "HORIZON@LAYER+LAYER+…, or @LAYER+LAYER+… with a budget"),
}


def _summary(horizons: Horizons) -> str:
    """Return `2 × 1024 + 4 × 128`: runs from the lowest layer up, or counts per value if there are many runs."""
    runs = [(len(list(run)), horizon) for horizon, run in groupby(horizons)]
    counts = [(count, horizon) for horizon, count in Counter(horizons).items()]
    for terms in runs, counts:
        if len(terms) <= _MAX_TERMS:
            return " + ".join(f"{count} × {horizon}" for count, horizon in terms)
    return f"{len(horizons)} layers of {min(horizons)} to {max(horizons)}"
