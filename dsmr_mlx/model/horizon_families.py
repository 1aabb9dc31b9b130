"""The families of horizon schedules: from a few values, or a budget in tokens, to one horizon per layer.

A family is a function decorated with `@family`. Its positional parameters are the values of the text form, its
keyword-only parameters the options (a bool is a flag), and the annotations determine how `horizons.parse` reads each.
Arithmetic is exact, so a schedule is the same on every machine.
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Self

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.limits import MAX_LAYERS, MAX_TOKENS

Horizons = tuple[int, ...]  # M_l in tokens, lowest layer first

FAMILIES: dict[str, Callable[..., Horizons]] = {}


class Counted(NamedTuple):
    """`2x1024`: two layers with this horizon; `2`: two layers whose horizon follows from a budget."""

    count: int
    horizon: int | None = None

    @classmethod
    def read(cls, text: str) -> Self:
        """Parse the text form. Raises `ValueError` if it is invalid."""
        count, times, horizon = text.partition("x")
        return cls(integer(count, MAX_LAYERS), integer(horizon) if times else None)

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
        return cls(integer(horizon) if horizon else None, tuple(sorted(map(integer, layers.split("+")))))

    def __str__(self) -> str:
        return f"{'' if self.horizon is None else self.horizon}@{'+'.join(map(str, self.layers))}"


def integer(text: str, most: int = MAX_LAYERS * MAX_TOKENS) -> int:
    """Parse an integer of at most `most` in size. Raises `ValueError` if it is invalid."""
    value = int(text)
    if abs(value) > most:
        raise ValueError(text)
    return value


def family(function: Callable[..., Horizons]) -> Callable[..., Horizons]:
    """Register a family under its name, with dashes for underscores, and check that it returns n_layers horizons ≥ 0.

    Every family takes the number of layers, then either horizons or a budget in tokens, and raises `UserError`.
    """

    @functools.wraps(function)
    def checked(n_layers: int, *values: Any, **options: Any) -> Horizons:
        within("n_layers", n_layers, 1, MAX_LAYERS)
        horizons = function(n_layers, *values, **options)
        if len(horizons) != n_layers:
            raise UserError(f"{len(horizons)} horizons found, expected {n_layers}, one for each layer")
        for layer, horizon in enumerate(horizons):
            within(f"horizon of layer {layer}", horizon, 0, MAX_TOKENS)
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
    within("number of long layers", count, 1, n_layers)
    return _two_valued(n_layers, range(count), horizon, short, budget, ratio, granularity)


@family
def inverse_two_scale(
    n_layers: int, *, budget: int | None = None, long: Counted,
    short: int | None = None, ratio: float | None = None, granularity: int | None = None,
) -> Horizons:  # fmt: skip
    """Long for the highest layers, short for all others."""
    count, horizon = long
    within("number of long layers", count, 1, n_layers)
    highest = range(n_layers - count, n_layers)
    return _two_valued(n_layers, highest, horizon, short, budget, ratio, granularity)


@family
def interleaved(
    n_layers: int, *, budget: int | None = None, long: int | None = None, every: int,
    short: int | None = None, ratio: float | None = None, granularity: int | None = None,
) -> Horizons:  # fmt: skip
    """Long for layers 0, k, 2k, … with k = `every`, short for the others."""
    within("every", every, 1, n_layers)
    return _two_valued(n_layers, range(0, n_layers, every), long, short, budget, ratio, granularity)


@family
def binary(
    n_layers: int, *, budget: int | None = None, long: Placed,
    short: int | None = None, ratio: float | None = None, granularity: int | None = None,
) -> Horizons:  # fmt: skip
    """Long for the listed layers, short for the others."""
    horizon, layers = long
    for layer in layers:
        within("long layer", layer, 0, n_layers - 1)
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
    within("ratio", ratio, 1)
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
    within("budget", budget, 0)
    unit = math.gcd(budget, 64) if granularity is None else granularity
    within("granularity", unit, 1)
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


def within(name: str, value: float, low: int, high: int | None = None) -> None:
    """Raise `UserError` unless low ≤ value ≤ high; high: None for no upper bound."""
    if not low <= value or (high is not None and value > high):  # `not <=` refuses NaN, too
        expected = f"{low} or more" if high is None else f"{low} to {high}"
        raise UserError(f"{name} is {value}, expected {expected}")
