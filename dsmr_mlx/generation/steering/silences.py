"""Against dead air: no silence lasts longer than it may."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.generation.grammar import Played
from dsmr_mlx.generation.steering.base import (
    Clock,
    Steering,
    at_token,
    most_ticks,
    only_waits,
    per_lane,
    presses,
    to_longest,
)
from dsmr_mlx.generation.steering.spans import note_ends
from dsmr_mlx.tokenizers.event_grammar import Moment, beginning
from dsmr_mlx.tokenizers.token_tables import TokenTables


class Sounds(NamedTuple):
    """What the ids mean, and until when something sounds; int32 but for `pause`."""

    releases: mx.array  # [1, V], keys that an id releases at most
    tail: mx.array  # [1, V], ticks that pass in an id after it has last pressed or released a key, −1 if it does not
    after_id: mx.array  # [1, V] and
    after_bar: mx.array  # [1, V], see `note_ends`
    pause: mx.array  # [1, V] bool, ids with which time may pass and nothing else happens
    clock: Clock
    limit: mx.array  # [1], in ticks
    until: mx.array  # [1], when the last sound is over, as far as is known
    now: mx.array  # [1], the ticks at which that was known


@dataclass(frozen=True)
class MaxSilenceSeconds(Steering):
    """It is never silent for more than `seconds`, from the end of the last note to the beginning of the next.

    In silence no pause goes past the moment when a note is due: the longest that does not is as likely as all longer
    ones were besides. Then a note begins, or the piece ends. The silence at the end of a prompt counts, and so does
    that before the first note. An id of several events counts as silent for as long as it takes, unless a key sounds
    that it does not release.
    """

    seconds: float

    stage = "constraint"

    def __post_init__(self) -> None:
        self.check_types()
        self.require("seconds", self.seconds > 0, "more than 0")

    def begin(self, tables: TokenTables, ids: np.ndarray) -> Sounds:
        g = tables.grammar
        self.require_events(g.held or (g.duration >= 0).any(), "releases")
        self.require_events(tables.takes_time, "duration")
        self.require_events(presses(tables), "pitches")
        after_id, after_bar = note_ends(tables)
        releases = ((g.release >= 0)[tables.events] & (tables.events >= 0)).sum(axis=1)
        blank = Sounds(
            releases=per_lane(releases, mx.int32),
            tail=per_lane(tail_of(tables), mx.int32),
            after_id=per_lane(after_id, mx.int32),
            after_bar=per_lane(after_bar, mx.int32),
            pause=per_lane(only_waits(tables)),
            clock=Clock.of(tables),
            limit=per_lane(most_ticks(self.seconds, tables), mx.int32),
            until=per_lane(0, mx.int32),
            now=per_lane(0, mx.int32),
        )
        return self.read(tables, blank, ids, [beginning(g)])

    def __call__(self, logits: mx.array, played: Played, state: Sounds) -> mx.array:
        left = state.limit - (state.now - state.until)
        may_be_silent = played.sounding.sum(axis=-1, keepdims=True) <= state.releases
        waits = state.clock.passed(played)
        forbidden = may_be_silent & (waits > mx.maximum(left, 0)[:, None])
        result = mx.where(forbidden, -mx.inf, logits)
        return to_longest(result, mx.where(forbidden, logits, -mx.inf), state.pause, waits)

    def advance(self, state: Sounds, token: mx.array, played: Played) -> Sounds:
        tail, after_id, after_bar = (at_token(t, token) for t in (state.tail, state.after_id, state.after_bar))
        until = mx.maximum(state.until, mx.where(tail >= 0, played.ticks - tail, 0))
        until = mx.where(played.sounding.any(axis=-1), played.ticks, until)
        until = mx.maximum(until, mx.where(after_id > 0, state.now + after_id, 0))
        ticks, phase = (at_token(table, token) for table in state.clock)
        bar = played.ticks - ticks - phase  # when the bar before the id began, also where music went on behind an end
        until = mx.maximum(until, mx.where(after_bar >= 0, bar + after_bar, 0))
        return state._replace(until=until, now=played.ticks)

    def read(self, tables: TokenTables, state: Sounds, ids: np.ndarray, before: Sequence[Moment]) -> Sounds:
        tail, after_id, after_bar = (np.array(t)[0][ids] for t in (state.tail, state.after_id, state.after_bar))
        lanes = []
        for until, moment in zip(np.array(state.until), before, strict=True):
            m = tables.moments(moment, ids)
            heard = (
                m.ticks[1:][m.sounding[1:].any(axis=1)],
                (m.ticks[1:] - tail)[tail >= 0],
                (m.ticks[:-1] + after_id)[after_id > 0],
                (m.ticks[:-1] - m.phase[:-1] + after_bar)[after_bar >= 0],
            )
            lanes.append((max(until, *(moments.max(initial=0) for moments in heard)), m.ticks[-1]))
        until, now = (mx.array(np.array(column), mx.int32) for column in zip(*lanes, strict=True))
        return state._replace(until=until, now=now)


def tail_of(tables: TokenTables) -> np.ndarray:
    """`[V]`: the ticks that pass in each id after the last key that it presses or releases, −1 for those that do
    neither, and where keys are not held.
    """
    g = tables.grammar
    tail = np.full(len(tables.events), -1)
    for column in tables.events.T if g.held else ():
        real = column >= 0
        acts = real & ((g.press >= 0) | (g.release >= 0))[column]
        tail = np.where(acts, 0, tail + (tail >= 0) * np.where(real, g.ticks[column], 0))
    return tail
