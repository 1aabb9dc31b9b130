"""Base classes of the built-in processors, with checked settings, and tables of the meaning of ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.config import Config
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.grammar import GrammarState, ticks_taken
from dsmr_mlx.generation.verdicts import Verdict, judged, rows_of
from dsmr_mlx.tokenizers.event_grammar import Moment
from dsmr_mlx.tokenizers.token_tables import TokenTables

MAX_SETTING = 1e6


@dataclass(frozen=True)
class Steering(Config):
    """Base of the built-in processors, see `sampling.Processor`: a frozen dataclass that can be stored as JSON.

    An id that stands for several events is affected if one of them is. Raises `UserError` for invalid settings.
    """

    stage = "bias"
    limits_releases: ClassVar[bool] = False  # whether to ignore keys that a gap keeps down
    # Fields of the state that depend on the music, with their lowest and highest value; None: the highest id.
    remembers: ClassVar[dict[str, tuple[float, float | None]]] = {}

    def __post_init__(self) -> None:
        self.check_types()

    def check_types(self) -> None:
        """As `Config.check_types`, and raise `UserError` for numbers too large for float32 or int32 arithmetic."""
        super().check_types()
        for name, value in vars(self).items():
            if isinstance(value, int | float):
                self.require(
                    name, abs(value) <= MAX_SETTING, f"at most {MAX_SETTING:,.0f}, and at least −{MAX_SETTING:,.0f}"
                )

    def begin(self, tables: TokenTables, ids: np.ndarray) -> Any:
        """See `Processor.begin`."""
        return ()

    @property
    def forbids(self) -> bool:
        """Whether it may forbid ids, and so leave a lane without any."""
        return self.stage == "constraint"

    def __call__(self, logits: mx.array, music: GrammarState, state: Any) -> mx.array:
        """See `Processor.__call__`."""
        raise NotImplementedError

    def advance(self, state: Any, token: mx.array, music: GrammarState) -> Any:
        """See `Processor.advance`."""
        return state

    def read(self, tables: TokenTables, state: Any, ids: np.ndarray, before: Sequence[Moment]) -> Any:
        """The state after all lanes have read `ids` `(T,)` from the B moments `before`; to rounding the same as
        `advance` token by token.
        """
        return state

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, and the name of the class as `kind`; JSON values."""
        return {"kind": type(self).__name__, **super().to_dict()}

    def require_events(self, known: np.ndarray | bool, what: str) -> None:
        """Raise `UserError`, naming `what` is missing, if no id of the vocabulary is `known`."""
        if not np.any(known):
            raise UserError(f"{type(self).__name__}: the tokens of this vocabulary have no known {what}")


class Constraint(Steering):
    """Base of the constraints that do not depend on the logits. Their verdicts are applied together."""

    stage = "constraint"

    def judge(self, music: GrammarState, state: Any) -> Verdict:
        """See `Processor`."""
        raise NotImplementedError

    def __call__(self, logits: mx.array, music: GrammarState, state: Any) -> mx.array:
        """See `Processor.__call__`."""
        return judged(logits, [self.judge(music, state)])


def ticks_of(seconds: float, tables: TokenTables) -> int:
    """Seconds in ticks of the vocabulary, at most 2³⁰ so that int32 clocks can add them."""
    return min(round(seconds / tables.grammar.seconds_per_tick), 2**30)


def max_ticks(seconds: float, tables: TokenTables) -> int:
    """The most whole ticks within `seconds`, at least one; rounding of floats aside."""
    return max(min(int(seconds / tables.grammar.seconds_per_tick + 1e-6), 2**30), 1)


def per_lane(value: Any, dtype: mx.Dtype | None = None) -> mx.array:
    """A scalar or an array as the state of one lane, `(1, …)`."""
    return mx.array(np.asarray(value)[None], dtype)


def at_token(table: mx.array, token: mx.array) -> mx.array:
    """The entries `(B, …)` of each lane's table `(B, V, …)` for its token `(B,)`."""
    return mx.take_along_axis(table, token.reshape(-1, *[1] * (table.ndim - 1)), axis=1)[:, 0]


def at_key(keys: mx.array, pitch: mx.array) -> mx.array:
    """The entries `(B, V)` of each lane's keys `(B, 128)` at the pitches `(B, V)` of its ids, 0 for −1."""
    return mx.where(pitch >= 0, mx.take_along_axis(keys, pitch, axis=1), 0)


class TickCosts(NamedTuple):
    """The time that each id takes, see `ticks` and `phase` of `TokenTables`: `(1, V)` int32; no phase without bars."""

    ticks: mx.array
    phase: mx.array | tuple[()]

    @classmethod
    def of(cls, tables: TokenTables) -> "TickCosts":
        """Return the costs of one lane."""
        phase = per_lane(tables.phase, mx.int32) if (tables.phase >= 0).any() else ()
        return cls(per_lane(tables.ticks, mx.int32), phase)

    def ticks_taken(self, music: GrammarState) -> mx.array:
        """The ticks that each id would take, `(B, V)` int32."""
        return self.ticks if self.phase == () else ticks_taken(self.ticks, self.phase, music)


class ByState(NamedTuple):
    """A property of ids that depends on the state before them: a table `(Q, V)`, stored as its few distinct columns.

    columns: `(1, Q, K)` bool; column: `(1, V)` int32, the index of an id's column
    """

    columns: mx.array
    column: mx.array

    @classmethod
    def of(cls, table: np.ndarray) -> "ByState":
        """Return a table `(Q, V)` bool for one lane."""
        packed = np.packbits(table, axis=0)  # an eighth to sort, of large vocabularies
        _, first, column = np.unique(packed, axis=1, return_index=True, return_inverse=True)
        return cls(per_lane(table[:, first]), per_lane(column.ravel(), mx.int32))

    def at(self, state: mx.array) -> mx.array:
        """The property in states `(B,)`, `(B, V)` bool."""
        columns = mx.take_along_axis(self.columns, state[:, None, None], axis=1)[:, 0]  # (B, K)
        return mx.take_along_axis(columns, self.column, axis=1)


class PedalRule(NamedTuple):
    """Keeps the pedal up, so that notes last as long as their lengths say; `(1, V)` bool unless stated."""

    lowers: mx.array  # ids after which the pedal goes down
    press: mx.array
    is_down: mx.array  # (1, Q), states in which it is down

    @classmethod
    def of(cls, tables: TokenTables) -> "PedalRule | tuple[()]":
        """Return the rule for one lane, empty if the vocabulary has no pedal."""
        g, down = tables.grammar, tables.grammar.pedal
        if down is None:
            return ()
        only = ~down & g.allowed.any(axis=1) & (down[g.next_state] | ~g.allowed).all(axis=1)
        return cls(*map(per_lane, (tables.after_any(only), presses(tables), down)))

    def forbidden(self, music: GrammarState) -> mx.array:
        """Ids that let the pedal go down, and notes until it is up, `(B, V)` bool."""
        return self.lowers | (self.press & mx.take_along_axis(self.is_down, music.state[:, None], axis=1))


def presses(tables: TokenTables) -> np.ndarray:
    """Ids that press a key, `(V,)` bool."""
    return tables.notes > 0


def sets_velocity(tables: TokenTables) -> np.ndarray:
    """Ids that set a velocity, `(V,)` bool."""
    return tables.velocity >= 0


def leaves_velocity(tables: TokenTables) -> np.ndarray:
    """Ids of several events that end with a velocity, so that a key must be pressed next, `(V,)` bool."""
    return tables.ends_in_velocity & ((tables.events >= 0).sum(axis=1) > 1)


def begins_note(tables: TokenTables) -> np.ndarray:
    """Ids that press a key or set a velocity, or after which only such ids may come, `(V,)` bool."""
    g = tables.grammar
    starts = (g.press >= 0) | (g.velocity >= 0)
    silent = ~(starts | (g.release >= 0) | (g.duration >= 0) | (g.ticks > 0) | g.bar | (g.position >= 0) | g.ends)
    only = until_stable(  # states in which only a note can follow
        lambda only: g.allowed.any(axis=1) & ~(g.allowed & ~(starts | silent & only[g.next_state])).any(axis=1),
        np.zeros(len(g.allowed), bool),
    )
    leads = tables.after_any(only) & ~tables.takes_time & ~tables.released.any(axis=1) & ~tables.contains(~silent)
    return presses(tables) | sets_velocity(tables) | leads


def until_stable(step: Callable[[np.ndarray], np.ndarray], states: np.ndarray) -> np.ndarray:
    """Apply `step` to a set of states, `(Q,)` bool, until nothing changes; each step must only add states."""
    while not np.array_equal(after := step(states), states):
        states = after
    return states


def ends_of(tables: TokenTables) -> np.ndarray:
    """Ids that end the piece and that the grammar allows somewhere, `(V,)` bool."""
    return tables.ends & tables.allowed.any(axis=0)


def tilt(logits: mx.array, group: mx.array, scores: mx.array) -> mx.array:
    """Add `scores` to the logits of a group of ids and keep the probability of the group as a whole; all `(B, V)`."""
    return reweighted(logits, group, logits + scores)


def reweighted(logits: mx.array, group: mx.array, changed: mx.array) -> mx.array:
    """The logits `changed` for a group of ids, shifted so that the group keeps its probability; all `(B, V)`."""
    rows = rows_of(mx.where(group, logits, -mx.inf), mx.where(group, changed, -mx.inf))
    before, after = mx.logsumexp(rows, axis=-1, keepdims=True)
    return mx.where(group & (before > -mx.inf), changed - (after - before), logits)
