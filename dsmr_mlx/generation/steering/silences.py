"""A limit on the length of silences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.generation.grammar import GrammarState
from dsmr_mlx.generation.pauses import only_waits
from dsmr_mlx.generation.steering.base import (
    Constraint,
    TickCosts,
    at_token,
    max_ticks,
    per_lane,
    presses,
)
from dsmr_mlx.generation.steering.spans import Lengths, note_ends
from dsmr_mlx.generation.verdicts import Verdict
from dsmr_mlx.tokenizers.event_grammar import Moment, beginning
from dsmr_mlx.tokenizers.token_tables import NEVER, TokenTables


class Sounds(NamedTuple):
    """The meaning of the ids, and until when something sounds; int32 unless bool."""

    releases: mx.array  # (1, V), the most keys that an id releases
    sounds: mx.array  # (1, V, 5), `tail_of`, both of `note_ends`, and `ticks` and `phase` of `TokenTables`
    pause: mx.array  # (1, V) bool, ids that let time pass and do nothing else
    costs: TickCosts
    limit: mx.array  # (1,), in ticks
    notes: Lengths | tuple[()]  # empty if their lengths are not known
    until: mx.array  # (1,), when the last sound ends, as far as is known; not known while keys are down
    now: mx.array  # (1,), the clock at which that was known


@dataclass(frozen=True)
class MaxSilenceSeconds(Constraint):
    """No silence lasts more than `seconds`, from the end of the last note to the beginning of the next.

    In silence no pause passes the time when a note is due; the longest pause that does not gets the probability of the
    longer ones. Then a note begins, or the piece ends. The silence at the end of the prompt and that before the first
    note count. An id of several events counts as silent for as long as it takes, unless a key is down that it does not
    release.
    """

    seconds: float

    remembers: ClassVar = {"until": (-NEVER, NEVER), "now": (0, NEVER), "notes": (-1, NEVER)}

    def __post_init__(self) -> None:
        self.check_types()
        self.require("seconds", self.seconds > 0, "more than 0")

    def begin(self, tables: TokenTables, ids: np.ndarray) -> Sounds:
        """See `Processor.begin`."""
        g = tables.grammar
        self.require_events(g.held or (g.duration >= 0).any(), "releases")
        self.require_events(tables.takes_time, "duration")
        self.require_events(presses(tables), "pitches")
        releases = ((g.release >= 0)[tables.events] & (tables.events >= 0)).sum(axis=1)
        blank = Sounds(
            releases=per_lane(releases, mx.int32),
            sounds=per_lane(
                np.stack([tail_of(tables), *note_ends(tables), tables.ticks, tables.phase], axis=1), mx.int32
            ),
            pause=per_lane(only_waits(tables)),
            costs=TickCosts.of(tables),
            limit=per_lane(max_ticks(self.seconds, tables), mx.int32),
            notes=Lengths.of(tables) if Lengths.known(tables) else (),
            until=per_lane(0, mx.int32),
            now=per_lane(0, mx.int32),
        )
        return self.read(tables, blank, ids, [beginning(g)])

    def judge(self, music: GrammarState, state: Sounds) -> Verdict:
        """See `Constraint.judge`."""
        down, waits = music.sounding.sum(axis=-1, keepdims=True), state.costs.ticks_taken(music)
        silent = mx.where(down > 0, 0, (state.now - state.until)[:, None])
        too_long = waits > mx.maximum(state.limit[:, None] - silent, 0)
        return Verdict(~((down <= state.releases) & too_long), pause=state.pause, waits=waits)

    def advance(self, state: Sounds, token: mx.array, music: GrammarState) -> Sounds:
        """See `Processor.advance`."""
        if state.notes:
            notes = state.notes.advance(token, music.ticks)
            return state._replace(notes=notes, until=notes.until.max(axis=-1), now=music.ticks)
        tail, after_id, after_bar, ticks, phase = at_token(state.sounds, token).T
        until = mx.maximum(state.until, mx.where(tail >= 0, music.ticks - tail, 0))
        until = mx.maximum(until, mx.where(after_id > 0, state.now + after_id, 0))
        bar = music.ticks - ticks - phase  # when the bar before the id began, also if music went on after an end
        until = mx.maximum(until, mx.where(after_bar >= 0, bar + after_bar, 0))
        return state._replace(until=until, now=music.ticks)

    def read(self, tables: TokenTables, state: Sounds, ids: np.ndarray, before: Sequence[Moment]) -> Sounds:
        """See `Steering.read`."""
        if state.notes:
            notes = state.notes.read(tables, ids, before)
            now = [tables.moments(moment, ids).ticks[-1] for moment in before]
            return state._replace(notes=notes, until=notes.until.max(axis=-1), now=mx.array(np.array(now), mx.int32))
        tail, after_id, after_bar, *_ = np.array(state.sounds)[0][ids].T
        lanes = []
        for until, moment in zip(np.array(state.until), before, strict=True):
            m = tables.moments(moment, ids)
            ends = (
                (m.ticks[1:] - tail)[tail >= 0],
                (m.ticks[:-1] + after_id)[after_id > 0],
                (m.ticks[:-1] - m.phase[:-1] + after_bar)[after_bar >= 0],
            )
            lanes.append((max(until, *(moments.max(initial=0) for moments in ends)), m.ticks[-1]))
        until, now = (mx.array(np.array(column), mx.int32) for column in zip(*lanes, strict=True))
        return state._replace(until=until, now=now)


def tail_of(tables: TokenTables) -> np.ndarray:
    """The ticks of each id after the last key that it presses or releases, `(V,)`; −1 if it does neither, or if the
    vocabulary gives notes a length.
    """
    g = tables.grammar
    tail = np.full(len(tables.events), -1)
    for column in tables.events.T if g.held else ():
        real = column >= 0
        acts = real & ((g.press >= 0) | (g.release >= 0))[column]
        tail = np.where(acts, 0, tail + (tail >= 0) * np.where(real, g.ticks[column], 0))
    return tail
