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

A family is a function decorated with `@family`. Its positional parameters are the values of the text form, its
keyword-only parameters the options (a bool is a flag), and the annotations determine how each is parsed. Arithmetic is
exact, so a schedule is the same on every machine. Source of the idea: arXiv 2602.19816. Needs neither MLX nor NumPy.
"""

import functools
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, groupby
from typing import Any, NamedTuple, Self, get_args

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.formatting import format_bytes
from dsmr_mlx.common.limits import MAX_LAYERS, MAX_TOKENS
from dsmr_mlx.model.config import CANON_WIDTH, ModelConfig

Horizons = tuple[int, ...]  # M_l in tokens, lowest layer first

FAMILIES: dict[str, Callable[..., Horizons]] = {}

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
        _within("segment_length", segment_length, 1)

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


class Counted(NamedTuple):
    """`2x1024`: two layers with this horizon; `2`: two layers whose horizon follows from a budget."""

    count: int
    horizon: int | None = None

    @classmethod
    def read(cls, text: str) -> Self:
        """Parse the text form. Raises `ValueError` if it is invalid."""
        count, times, horizon = text.partition("x")
        return cls(_integer(count, MAX_LAYERS), _integer(horizon) if times else None)

    def __str__(self) -> str:
        return f"{self.count}" if self.horizon is None else f"{self.count}x{self.horizon}"


class Placed(NamedTuple):
    """`1024@0+3`: this horizon at layers 0 and 3; `@0+3`: at layers whose horizon follows from a budget."""

    horizon: int | None
    layers: tuple[int, ...]

    @classmethod
    def read(cls, text: str) -> Self:
        """Parse the text form. Raises `ValueError` if it is invalid."""
        horizon, _, layers = text.partition("@")
        return cls(_integer(horizon) if horizon else None, tuple(sorted(map(_integer, layers.split("+")))))

    def __str__(self) -> str:
        return f"{'' if self.horizon is None else self.horizon}@{'+'.join(map(str, self.layers))}"


def family(function: Callable[..., Horizons]) -> Callable[..., Horizons]:
    """Register a family under its name, with dashes for underscores, and check that it returns n_layers horizons ≥ 0.

    Every family takes the number of layers, then either horizons or a budget in tokens, and raises `UserError`.
    """

    @functools.wraps(function)
    def checked(n_layers: int, *values: Any, **options: Any) -> Horizons:
        _within("n_layers", n_layers, 1, MAX_LAYERS)
        horizons = function(n_layers, *values, **options)
        if len(horizons) != n_layers:
            raise UserError(f"{len(horizons)} horizons found, expected {n_layers}, one for each layer")
        for layer, horizon in enumerate(horizons):
            _within(f"horizon of layer {layer}", horizon, 0, MAX_TOKENS)
        return horizons

    FAMILIES[function.__name__.replace("_", "-")] = checked
    return checked


@family
def two_scale(
    n_layers: int, *, budget: int | None = None, long: Counted,
    short: int | None = None, ratio: float | None = None, granularity: int | None = None,
) -> Horizons:  # fmt: skip
    """Long for the lowest layers, short for all others: the paper's main schedule."""
    count, horizon = long
    _within("number of long layers", count, 1, n_layers)
    return _two_valued(n_layers, range(count), horizon, short, budget, ratio, granularity)


@family
def inverse_two_scale(
    n_layers: int, *, budget: int | None = None, long: Counted,
    short: int | None = None, ratio: float | None = None, granularity: int | None = None,
) -> Horizons:  # fmt: skip
    """Long for the highest layers, short for all others."""
    count, horizon = long
    _within("number of long layers", count, 1, n_layers)
    highest = range(n_layers - count, n_layers)
    return _two_valued(n_layers, highest, horizon, short, budget, ratio, granularity)


@family
def interleaved(
    n_layers: int, *, budget: int | None = None, long: int | None = None, every: int,
    short: int | None = None, ratio: float | None = None, granularity: int | None = None,
) -> Horizons:  # fmt: skip
    """Long for layers 0, k, 2k, … with k = `every`, short for the others."""
    _within("every", every, 1, n_layers)
    return _two_valued(n_layers, range(0, n_layers, every), long, short, budget, ratio, granularity)


@family
def binary(
    n_layers: int, *, budget: int | None = None, long: Placed,
    short: int | None = None, ratio: float | None = None, granularity: int | None = None,
) -> Horizons:  # fmt: skip
    """Long for the listed layers, short for the others."""
    horizon, layers = long
    for layer in layers:
        _within("long layer", layer, 0, n_layers - 1)
    if len(set(layers)) < len(layers):
        raise UserError(f"long layers are {'+'.join(map(str, layers))}, expected each layer once")
    return _two_valued(n_layers, layers, horizon, short, budget, ratio, granularity)


@family
def uniform(
    n_layers: int, horizon: int | None = None, /, *, budget: int | None = None, granularity: int | None = None
) -> Horizons:
    """The same for every layer; from a budget, equal up to one granularity."""
    _budget_or({"horizon": horizon}, budget, {"granularity": granularity})
    return (horizon,) * n_layers if budget is None else _spread(budget, granularity, [1] * n_layers)


@family
def linear(n_layers: int, *, budget: int, granularity: int | None = None, reverse: bool = False) -> Horizons:
    """Decreasing from the lowest layer up, in proportion to L, L − 1, …, 1; `reverse` mirrors it."""
    horizons = _spread(budget, granularity, range(n_layers, 0, -1))
    return horizons[::-1] if reverse else horizons


@family
def geometric(
    n_layers: int, *, budget: int, ratio: float = 0.5, granularity: int | None = None, reverse: bool = False
) -> Horizons:
    """Decreasing from the lowest layer up, each `ratio` times the one below; `reverse` mirrors it."""
    if not 0 < ratio <= 1:
        raise UserError(f"ratio is {ratio}, expected 0 < ratio ≤ 1 (`reverse` makes horizons rise)")
    horizons = _spread(budget, granularity, [Fraction(str(ratio)) ** layer for layer in range(n_layers)])
    return horizons[::-1] if reverse else horizons


@family
def full(n_layers: int, cap: int, /) -> Horizons:
    """The full-memory recurrent reference: every layer carries the whole history, up to `cap` tokens."""
    return (cap,) * n_layers


@family
def whole(n_layers: int, cap: int | None = None, /, *, longest: int | None = None) -> Horizons:
    """Whole pieces in every layer, or their newest `cap` tokens; `longest` comes from a corpus, see `resolve`."""
    if longest is None:
        raise UserError("the longest piece of a corpus is unknown, expected `data`, the corpus, or longest=TOKENS")
    return (longest if cap is None else min(cap, longest),) * n_layers


@family
def custom(n_layers: int, /, *horizons: int) -> Horizons:
    """The horizons as listed, lowest layer first."""
    return horizons


@family
def none(n_layers: int) -> Horizons:
    """No memory: each segment stands alone (the fixed-excerpt baseline)."""
    return (0,) * n_layers


def _two_valued(
    n_layers: int,
    layers: Collection[int],
    long: int | None,
    short: int | None,
    budget: int | None,
    ratio: float | None,
    granularity: int | None,
) -> Horizons:
    """Return `long` at `layers` and `short` at the others; both are given, or both follow from the budget.

    From a budget, each short layer gets the share given by long : short = `ratio` (default 8), rounded down to the
    granularity. The long layers get the rest, as evenly as the granularity allows.
    """
    _budget_or({"long horizon": long, "short": short}, budget, {"ratio": ratio, "granularity": granularity})
    if budget is None:
        if not 0 <= short <= long:
            raise UserError(f"short is {short} and long {long}, expected 0 ≤ short ≤ long")
        return tuple(long if layer in layers else short for layer in range(n_layers))
    ratio = 8 if ratio is None else ratio
    _within("ratio", ratio, 1)
    units, unit = _units(budget, granularity)
    n_short = n_layers - len(layers)
    share = math.floor(units / (len(layers) * Fraction(str(ratio)) + n_short))
    rest = iter(_apportion(units - n_short * share, [1] * len(layers)))
    return tuple(unit * (next(rest) if layer in layers else share) for layer in range(n_layers))


def _spread(budget: int, granularity: int | None, weights: Sequence[int | Fraction]) -> Horizons:
    units, unit = _units(budget, granularity)
    return tuple(share * unit for share in _apportion(units, weights))


def _apportion(total: int, weights: Sequence[int | Fraction]) -> list[int]:
    """Split `total` in proportion to `weights` by largest remainder; ties go to the lower index.

    Non-increasing weights give non-increasing shares: of two quotas with the same floor, the larger one, or on a tie
    the one with the lower index, is rounded up first.
    """
    scale = Fraction(total) / sum(weights)
    quotas = [weight * scale for weight in weights]
    shares = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: shares[i] - quotas[i])
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _units(budget: int, granularity: int | None) -> tuple[int, int]:
    """Return the budget as (number of units, tokens per unit); by default a unit is gcd(budget, 64) tokens."""
    _within("budget", budget, 0)
    unit = math.gcd(budget, 64) if granularity is None else granularity
    _within("granularity", unit, 1)
    if budget % unit:
        raise UserError(f"budget is {budget}, expected a multiple of the granularity {unit}")
    return budget // unit, unit


def _budget_or(explicit: dict[str, Any], budget: int | None, tuning: dict[str, Any]) -> None:
    """Raise `UserError` unless there is a budget, with or without tuning, or every explicit value, and nothing else."""
    unused, where = (tuning, "without") if budget is None else (explicit, "with")
    for name, value in unused.items():
        if value is not None:
            raise UserError(f"{name} is {value}, expected no {name} {where} a budget")
    if budget is None and (missing := [name for name, value in explicit.items() if value is None]):
        raise UserError(f"{' and '.join(missing)} missing, expected {' and '.join(explicit)}, or a budget")


def _within(name: str, value: float, low: int, high: int | None = None) -> None:
    if not low <= value or (high is not None and value > high):  # `not <=` refuses NaN, too
        expected = f"{low} or more" if high is None else f"{low} to {high}"
        raise UserError(f"{name} is {value}, expected {expected}")


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
        elif equals or positional is None:
            raise UserError(f"unknown option {key!r}, {takes}")
        else:
            values.append(_value(positional, token))
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


def _integer(text: str, most: int = MAX_LAYERS * MAX_TOKENS) -> int:
    value = int(text)
    if abs(value) > most:
        raise ValueError(text)
    return value


def _number(text: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return int(value) if value.is_integer() else value  # 8, not 8.0, in the canonical text


_READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    int: (_integer, "an integer"),
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
