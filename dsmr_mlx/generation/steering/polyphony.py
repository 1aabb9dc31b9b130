"""A limit on the number of keys that are down at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.generation.grammar import GrammarState
from dsmr_mlx.generation.steering.base import (
    Constraint,
    PedalRule,
    TickCosts,
    at_key,
    at_token,
    leaves_velocity,
    per_lane,
    presses,
)
from dsmr_mlx.generation.steering.spans import Lengths
from dsmr_mlx.generation.verdicts import Verdict
from dsmr_mlx.music.notes import PITCHES
from dsmr_mlx.tokenizers.event_grammar import Moment, beginning
from dsmr_mlx.tokenizers.token_tables import NEVER, TokenTables


class Chords(NamedTuple):
    """When notes end, and the meaning of the ids, in a vocabulary that gives notes a length."""

    notes: Lengths
    later: mx.array  # (1, V) bool, ids that press a key before its time is known
    moves: mx.array  # (1, V) bool, ids that may take time
    before: mx.array  # (1, V) bool, those after which a key must be pressed
    costs: TickCosts
    latest: mx.array  # (1,) int32, the last place in a bar
    pedal: PedalRule | tuple[()]


@dataclass(frozen=True)
class MaxPolyphony(Constraint):
    """At most `keys` are down at a time; when they are, no key is pressed until one is released.

    If the vocabulary gives notes a length, a note counts until its end. A note that is written before its onset begins
    once one of the others has ended. The pedal is not used. `begin` raises `UserError` for other vocabularies without
    releases.
    """

    keys: int

    remembers: ClassVar = {"notes": (-1, NEVER)}

    def __post_init__(self) -> None:
        self.check_types()
        self.require("keys", self.keys >= 1, "at least 1")

    def begin(self, tables: TokenTables, ids: np.ndarray) -> mx.array | Chords:
        """With lengths see `Chords`. Else the most keys that an id adds to those that are down when it presses one, or
        right after it if a key must be pressed then, `(1, V)` int32.
        """
        self.require_events(presses(tables), "pitches")
        self.require_events(tables.grammar.held or Lengths.known(tables), "releases")
        if tables.grammar.held:
            behind = np.where(leaves_velocity(tables), tables.net_presses + 1, tables.peak)
            return per_lane(np.maximum(tables.peak, behind), mx.int32)
        later, moves = tables.contains(tables.grammar.timed_later), tables.takes_time
        masks = map(per_lane, (later, moves, moves & tables.after_any(only_presses(tables))))
        latest = per_lane(tables.grammar.position.max(initial=0), mx.int32)
        blank = Chords(Lengths.of(tables), *masks, TickCosts.of(tables), latest, PedalRule.of(tables))
        return self.read(tables, blank, ids, [beginning(tables.grammar)])

    def judge(self, music: GrammarState, state: mx.array | Chords) -> Verdict:
        """See `Constraint.judge`."""
        if not isinstance(state, Chords):
            return Verdict(music.sounding.sum(axis=-1, keepdims=True) + state <= self.keys)
        if self.keys >= PITCHES:
            return Verdict(mx.array(True))
        (press, _, pitch, _, until), now = state.notes, music.ticks[:, None]
        own = mx.where(pitch >= 0, at_token(until, mx.maximum(pitch, 0)), 0)[:, None]
        then = now + state.costs.ticks_taken(music)
        too_early = (pitch >= 0)[:, None] & state.moves & (then < self._first_time(own, until))
        too_early = too_early | ((pitch < 0)[:, None] & state.before & (then < self._first_time(0, until)))
        latest = mx.where(state.later, now - music.phase[:, None] + state.latest[:, None], now)
        too_many = (press >= 0) & (latest < self._first_time(at_key(until, press), until))
        forbidden = too_early | too_many
        return Verdict(~(forbidden | state.pedal.forbidden(music) if state.pedal else forbidden))

    def _first_time(self, own: mx.array, until: mx.array) -> mx.array:
        """When a note may begin if its pitch sounds until `own`, `(B, K)`: it ends that one, so only others count."""
        last = mx.sort(until, axis=-1)
        kth, following = (last[:, PITCHES - n : PITCHES - n + 1] for n in (self.keys, self.keys + 1))
        return mx.where(own >= kth, following, kth)

    def advance(self, state: mx.array | Chords, token: mx.array, music: GrammarState) -> mx.array | Chords:
        """See `Processor.advance`."""
        if not isinstance(state, Chords):
            return state
        return state._replace(notes=state.notes.advance(token, music.ticks))

    def read(
        self, tables: TokenTables, state: mx.array | Chords, ids: np.ndarray, before: Sequence[Moment]
    ) -> mx.array | Chords:
        """See `Steering.read`."""
        if not isinstance(state, Chords):
            return state
        return state._replace(notes=state.notes.read(tables, ids, before))


def only_presses(tables: TokenTables) -> np.ndarray:
    """States after which a key is pressed or the piece ends, `(Q,)` bool."""
    g = tables.grammar
    press = g.press >= 0
    return (g.allowed & press).any(axis=1) & ~(g.allowed & ~press & ~g.ends).any(axis=1)
