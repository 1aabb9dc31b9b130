"""End a piece within a span of time, at a moment that suits the music."""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.generation.grammar import GrammarState
from dsmr_mlx.generation.steering.base import (
    ByState,
    Steering,
    TickCosts,
    begins_note,
    ends_of,
    per_lane,
    presses,
    sets_velocity,
    ticks_of,
    until_stable,
)
from dsmr_mlx.generation.steering.spans import note_ends
from dsmr_mlx.tokenizers.token_tables import TokenTables

END_NATS, RELEASE_NATS, PRESS_NATS = 12.0, 3.0, 6.0  # gained or lost at the end of the span
CLOSING = 0.75  # share of the span after which no note begins


class Ending(NamedTuple):
    """The meaning of the ids, `(1, V)` bool unless stated, and times in ticks after the prompt, `(1,)` int32."""

    end: mx.array
    press: mx.array  # presses a key or sets a velocity
    begins: mx.array  # the same, or only such an id can follow
    release: mx.array
    announces: mx.array
    onset: ByState  # the time of a note that has been pressed; its length follows
    shortest: mx.array  # (1,) int32, ticks that such a note needs at least, 0 if there are none
    stays: ByState  # the piece cannot end after it before another note begins
    net_presses: mx.array  # int32, keys that it adds to those that are down
    costs: TickCosts
    over: mx.array  # int32, when the last of its notes ends, in ticks from before it
    over_in_bar: mx.array  # int32, the same in ticks from the beginning of the bar, or −1
    first: mx.array  # when the piece may end
    closing: mx.array  # when notes stop beginning
    last: mx.array  # when the piece must have ended


@dataclass(frozen=True)
class EndWithin(Steering):
    """The piece ends between `start` and `start` + `within` seconds after the prompt, in silence, by its EOS.

    In this span EOS gains up to 12 nats, each release gains up to 3 and each press loses up to 6, growing with time. In
    the last quarter no note begins, and when the last one is released the piece ends. No pause and no note with a
    length passes the end of the span; keys that are still down then are released. There is no EOS before `start`,
    unless `may_end`. A vocabulary that can announce the end, as Aria's, does so where the span begins.

    The generation needs `may_end=True` and at least `seconds=start + within`.
    """

    start: float
    within: float
    may_end: bool = False

    stage = "constraint"

    def __post_init__(self) -> None:
        self.check_types()
        self.require("start", self.start >= 0, "0 or more")
        self.require("within", self.within > 0, "more than 0")

    def begin(self, tables: TokenTables, ids: np.ndarray) -> Ending:
        """See `Processor.begin`."""
        self.require_events(ends_of(tables), "end")
        self.require_events(tables.takes_time, "duration")
        first, last = ticks_of(self.start, tables), ticks_of(self.start + self.within, tables)
        closing = max(first + int(CLOSING * (last - first)), 1)
        g, ends = tables.grammar, ends_of(tables)
        can_end = g.allowed[:, tables.events[ends, 0]].any(axis=1)
        press = presses(tables) | sets_velocity(tables)
        announces = np.zeros_like(press) if g.announces is None else tables.contains(g.announces)
        kinds = (ends, press, begins_note(tables), tables.released.any(axis=1), announces)
        stays = ByState.of(~_may_end_soon(tables, can_end)[tables.next_state])
        onsets = _lengths_only(tables)[tables.next_state] & tables.takes_time & tables.allowed
        last_ends = (per_lane(table, mx.int32) for table in note_ends(tables))
        times = (per_lane(ticks, mx.int32) for ticks in (first, closing, max(last, 1)))
        net_presses = per_lane(tables.net_presses, mx.int32)
        shortest = per_lane(onsets.any(), mx.int32)
        return Ending(
            *map(per_lane, kinds),
            *(ByState.of(onsets), shortest, stays, net_presses, TickCosts.of(tables), *last_ends, *times),
        )

    def __call__(self, logits: mx.array, music: GrammarState, state: Ending) -> mx.array:
        now = music.new_ticks[:, None]
        first, closing, last = (ticks[:, None] for ticks in (state.first, state.closing, state.last))
        progress = mx.clip((now - first) / mx.maximum(last - first, 1), 0, 1)
        logits = logits + progress * (END_NATS * state.end + RELEASE_NATS * state.release - PRESS_NATS * state.press)

        # In silence a pause must not reach the last quarter if the end cannot follow it: then nothing could.
        waits = state.costs.ticks_taken(music)
        then, is_closing = now + waits, now + waits >= closing
        silence = music.sounding.sum(axis=-1, keepdims=True) + state.net_presses == 0
        stuck = silence & state.stays.at(music.state) & is_closing & (waits > 0)
        onset, shortest = state.onset.at(music.state), state.shortest[:, None]
        logits = logits - END_NATS * (onset & is_closing & (waits > 0))
        in_bar = mx.where(state.over_in_bar >= 0, state.over_in_bar - music.phase[:, None], 0)
        too_long = (waits > 0) & (then + onset > last)
        too_long = too_long | (now + mx.maximum(state.over, in_bar) > mx.maximum(last - shortest, now + shortest))
        forbidden = too_long | stuck | (state.begins & is_closing)
        if not self.may_end:
            forbidden = forbidden | ((state.end | state.announces) & (now < first))
        logits = mx.where(forbidden, -mx.inf, logits)
        announcing = (now >= first) & state.announces & (logits > -mx.inf)
        return mx.where(announcing.any(axis=-1, keepdims=True), mx.where(announcing, logits, -mx.inf), logits)


def _may_end_soon(tables: TokenTables, can_end: np.ndarray) -> np.ndarray:
    """States `(Q,)` bool from which an end comes without a pause, a release or another note."""
    g = tables.grammar
    idle = ~((g.press >= 0) | (g.velocity >= 0) | (g.release >= 0) | (g.ticks > 0) | g.bar | (g.position >= 0))
    return until_stable(lambda soon: soon | (g.allowed & idle & soon[g.next_state]).any(axis=1), can_end)


def _lengths_only(tables: TokenTables) -> np.ndarray:
    """States `(Q,)` bool in which a note gets its length and nothing else can come."""
    g = tables.grammar
    return g.allowed.any(axis=1) & ~(g.allowed & (g.duration < 0)).any(axis=1)
