"""What the built-in processors share: they are settings that check themselves, and they speak of events, not of ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.config import Config
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.grammar import Played, passed
from dsmr_mlx.tokenizers.event_grammar import Moment
from dsmr_mlx.tokenizers.token_tables import TokenTables

LARGEST = 1e6  # of a setting


@dataclass(frozen=True)
class Steering(Config):
    """Base of the built-in processors, see `sampling.Processor`: a frozen dataclass that travels as JSON.

    They speak of events: an id that stands for several is meant by what one of them does.

    Raises `UserError` for settings that cannot be.
    """

    stage = "bias"

    def check_types(self) -> None:
        """As `Config.check_types`; and no number is so large that float32 or int32 could not reckon with it."""
        super().check_types()
        for name, value in vars(self).items():
            if isinstance(value, int | float):
                self.require(name, abs(value) <= LARGEST, f"at most {LARGEST:,.0f}, and at least −{LARGEST:,.0f}")

    def begin(self, tables: TokenTables, ids: np.ndarray) -> Any:
        """See `sampling.Processor.begin`."""
        return ()

    def __call__(self, logits: mx.array, played: Played, state: Any) -> mx.array:
        """See `sampling.Processor.__call__`."""
        raise NotImplementedError

    def advance(self, state: Any, token: mx.array, played: Played) -> Any:
        """See `sampling.Processor.advance`."""
        return state

    def read(self, tables: TokenTables, state: Any, ids: np.ndarray, before: Sequence[Moment]) -> Any:
        """The state after each of `ids` `[T]` in all lanes, which are in the moments `before` `[n]`; what `advance`
        gives token by token, to rounding.
        """
        return state

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, and under `kind` the name of the class; JSON values."""
        return {"kind": type(self).__name__, **super().to_dict()}

    def require_events(self, known: np.ndarray | bool, what: str) -> None:
        """Raise `UserError` if nothing of the vocabulary is `known` to be what is steered."""
        if not np.any(known):
            raise UserError(f"{type(self).__name__}: the tokens of this vocabulary have no known {what}")


def ticks_of(seconds: float, tables: TokenTables) -> int:
    """Seconds in ticks of the vocabulary; at most what an int32 clock can show."""
    return min(round(seconds / tables.grammar.seconds_per_tick), 2**30)


def most_ticks(seconds: float, tables: TokenTables) -> int:
    """The whole ticks, at least one, that last no longer than some seconds; rounding of floats aside."""
    return max(min(int(seconds / tables.grammar.seconds_per_tick + 1e-6), 2**30), 1)


def per_lane(value: Any, dtype: mx.Dtype | None = None) -> mx.array:
    """A scalar or an array as the state of one lane, `[1, …]`."""
    return mx.array(np.asarray(value)[None], dtype)


def at_token(table: mx.array, token: mx.array) -> mx.array:
    """What each lane's table `[n, V]` says of its token `[n]`: `[n]`."""
    return mx.take_along_axis(table, token[:, None], axis=1)[:, 0]


def at_key(keys: mx.array, pitch: mx.array) -> mx.array:
    """What each lane's keys `[n, 128]` have at the pitches `[n, V]` of its ids, 0 where that is −1: `[n, V]`."""
    values = mx.take_along_axis(keys, mx.maximum(pitch, 0), axis=1)
    return mx.where(pitch >= 0, values, mx.zeros_like(values))


class Clock(NamedTuple):
    """What the ids do to the time, see `TokenTables`: `[1, V]` int32."""

    ticks: mx.array
    phase: mx.array

    @classmethod
    def of(cls, tables: TokenTables) -> "Clock":
        return cls(per_lane(tables.ticks, mx.int32), per_lane(tables.phase, mx.int32))

    def passed(self, played: Played) -> mx.array:
        """`[n, V]` int32: the ticks that each id would take."""
        return passed(self.ticks, self.phase, played)


def presses(tables: TokenTables) -> np.ndarray:
    """`[V]` bool: the ids that press a key."""
    return tables.notes > 0


def only_waits(tables: TokenTables) -> np.ndarray:
    """`[V]` bool: the ids with which time may pass and nothing else happens."""
    return tables.takes_time & tables.fades & ~tables.released.any(axis=1)


def sets_velocity(tables: TokenTables) -> np.ndarray:
    """`[V]` bool."""
    return tables.velocity >= 0


def leaves_velocity(tables: TokenTables) -> np.ndarray:
    """`[V]` bool: the ids of several events behind which a key has to be pressed, for the last one sets a velocity."""
    return tables.ends_in_velocity & ((tables.events >= 0).sum(axis=1) > 1)


def begins_note(tables: TokenTables) -> np.ndarray:
    """`[V]` bool: the ids that press a key or set a velocity, and those behind which nothing else can come: with them
    it is decided that a note begins.
    """
    g = tables.grammar
    says = (g.press >= 0) | (g.velocity >= 0)
    silent = ~(says | (g.release >= 0) | (g.duration >= 0) | (g.ticks > 0) | g.bar | (g.position >= 0) | g.ends)
    only = np.zeros(len(g.allowed), bool)  # states in which a note is all that can come
    for _ in range(len(only)):
        only = g.allowed.any(axis=1) & ~(g.allowed & ~(says | silent & only[g.next_state])).any(axis=1)
    leads = only[tables.next_state] & ~tables.takes_time & ~tables.released.any(axis=1) & ~tables.contains(~silent)
    return presses(tables) | sets_velocity(tables) | leads


def ends_of(tables: TokenTables) -> np.ndarray:
    """`[V]` bool: the ids after which nothing comes, of those that may come at all."""
    return tables.ends & tables.allowed.any(axis=0)


def tilt(logits: mx.array, group: mx.array, scores: mx.array) -> mx.array:
    """Add `scores` to the logits of a group of ids, and keep the probability of the group as a whole; all `[n, V]`.

    Which of the group comes changes, how often one of it comes does not.
    """
    inside = mx.where(group, logits, -mx.inf)
    tilted = mx.where(group, logits + scores, -mx.inf)
    before, after = (mx.logsumexp(values, axis=-1, keepdims=True) for values in (inside, tilted))
    possible = inside.max(axis=-1, keepdims=True) > -mx.inf
    return mx.where(group & possible, tilted - mx.where(possible, after - before, 0), logits)


def to_longest(logits: mx.array, lost: mx.array, pause: mx.array, waits: mx.array) -> mx.array:
    """Give what the logits `lost` stand for to the longest pause that is possible, if there is one; all `[n, V]`.

    waits: int32, the ticks that each id takes.
    """
    possible = pause & (logits > -mx.inf)
    longest = mx.where(possible, waits, 0).max(axis=-1, keepdims=True)
    heirs = possible & (waits == longest) & (longest > 0)
    share = mx.logsumexp(lost, axis=-1, keepdims=True) - mx.log(mx.maximum(heirs.sum(axis=-1, keepdims=True), 1))
    return mx.where(heirs, mx.logaddexp(logits, share), logits)
