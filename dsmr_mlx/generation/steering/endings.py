"""How a piece ends: not at a stroke of the clock, but where the music lets it, before the time is up."""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.generation.grammar import Played
from dsmr_mlx.generation.steering.base import (
    Clock,
    Steering,
    begins_note,
    ends_of,
    per_lane,
    presses,
    sets_velocity,
    ticks_of,
)
from dsmr_mlx.generation.steering.spans import note_ends
from dsmr_mlx.tokenizers.token_tables import TokenTables

END_NATS, RELEASE_NATS, PRESS_NATS = 12.0, 3.0, 6.0  # at the end of the span, what these events have gained or lost
CLOSING = 0.75  # of the span, after which no note begins


class Ending(NamedTuple):
    """What the ids mean, `[1, V]` bool but for the clock, and the moments of the end, `[1]` int32 in ticks."""

    end: mx.array
    press: mx.array  # that a key is pressed, or a velocity set
    begins: mx.array  # the same, or that nothing else can follow
    release: mx.array
    stays: mx.array  # that the piece cannot end at once behind it
    more: mx.array  # int32, how many keys more sound behind it
    clock: Clock
    over: mx.array  # int32, when the last of its notes is over, in ticks from before it
    over_in_bar: mx.array  # int32, the same from the beginning of the bar, or −1
    first: mx.array  # from when on the piece may end
    closing: mx.array  # from when on no note begins
    last: mx.array  # when all is over


@dataclass(frozen=True)
class EndWithin(Steering):
    """The piece ends between `start` and `start` + `within` seconds after the prompt, in silence, by its EOS.

    In this span EOS gains up to 12 nats and each release up to 3, and each press loses up to 6, all growing with
    time. In the last quarter no note begins, and when the last one is released the piece ends. No pause goes past
    the end of the span; what still sounds then is released, and no note that is told with its length is longer. Before
    `start` there is no EOS, unless `may_end`.

    For a generation that may end (`may_end=True`) and is at least as long: `seconds=start + within`.
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
        self.require_events(ends_of(tables), "end")
        self.require_events(tables.takes_time, "duration")
        first, last = ticks_of(self.start, tables), ticks_of(self.start + self.within, tables)
        closing = max(first + int(CLOSING * (last - first)), 1)
        g, ends = tables.grammar, ends_of(tables)
        can_end = g.allowed[:, tables.events[ends, 0]].any(axis=1)
        strikes = presses(tables) | sets_velocity(tables)
        kinds = (ends, strikes, begins_note(tables), tables.released.any(axis=1), ~can_end[tables.next_state])
        numbers = (per_lane(table, mx.int32) for table in note_ends(tables))
        moments = (per_lane(ticks, mx.int32) for ticks in (first, closing, max(last, 1)))
        return Ending(*map(per_lane, kinds), per_lane(tables.more, mx.int32), Clock.of(tables), *numbers, *moments)

    def __call__(self, logits: mx.array, played: Played, state: Ending) -> mx.array:
        now = played.new_ticks[:, None]
        first, closing, last = (clock[:, None] for clock in (state.first, state.closing, state.last))
        progress = mx.clip((now - first) / mx.maximum(last - first, 1), 0, 1)
        logits = logits + progress * (END_NATS * state.end + RELEASE_NATS * state.release - PRESS_NATS * state.press)

        # In silence a pause must not reach the last quarter: nothing may follow it there, not even the end.
        waits = state.clock.passed(played)
        then, is_closing = now + waits, now + waits >= closing
        silence = played.sounding.sum(axis=-1, keepdims=True) + state.more == 0
        stuck = silence & state.stays & is_closing & (waits > 0)
        in_bar = mx.where(state.over_in_bar >= 0, state.over_in_bar - played.phase[:, None], 0)
        too_long = ((waits > 0) & (then > last)) | (now + mx.maximum(state.over, in_bar) > last)
        forbidden = too_long | stuck | (state.begins & is_closing)
        if not self.may_end:
            forbidden = forbidden | (state.end & (now < first))
        return mx.where(forbidden, -mx.inf, logits)
