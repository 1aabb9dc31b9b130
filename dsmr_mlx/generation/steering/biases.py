"""Biases, which make events more or less likely and forbid none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.generation.grammar import GrammarState
from dsmr_mlx.generation.steering.base import (
    Steering,
    TickCosts,
    at_token,
    begins_note,
    per_lane,
    presses,
    sets_velocity,
    tilt,
)
from dsmr_mlx.tokenizers.event_grammar import Moment, beginning
from dsmr_mlx.tokenizers.token_tables import NEVER, TokenTables

TYPICAL_SECONDS = 0.1  # between two notes
MAX_ERROR = math.log(4)  # a density that is off by more than a factor of 4 counts as off by 4


class Onsets(NamedTuple):
    """Pauses if notes are written before their onsets, as in Aria's vocabulary; `(1, V)` bool unless stated."""

    later: mx.array  # ids that press a key whose onset follows: a pause of `TYPICAL_SECONDS` in this bar
    steps: mx.array  # ids that begin the next bar: a pause until then plus `TYPICAL_SECONDS`
    typical: mx.array  # (1,) float32, `TYPICAL_SECONDS` in ticks

    def waits(self, ticks: mx.array) -> mx.array:
        """Return the pause that an id counts as, `(B, V)`; ticks: its own, at least 1."""
        typical = self.typical[:, None]
        room = mx.where(self.steps, ticks, 0).max(axis=-1, keepdims=True)  # until the next bar
        soon = mx.maximum(mx.minimum(typical, room / 2), 1)
        return mx.where(self.later, soon, ticks + mx.where(self.steps, typical, 0))


class Pauses(NamedTuple):
    """The ids with which time may pass, `(1, V)` bool, and the ticks that they take."""

    group: mx.array
    onsets: Onsets | tuple[()]  # empty if the time of a note is known when it begins
    costs: TickCosts

    @classmethod
    def of(cls, tables: TokenTables) -> "Pauses":
        """The pauses of one lane."""
        later, onsets = tables.contains(tables.grammar.timed_later), ()
        if later.any():
            typical = per_lane(TYPICAL_SECONDS / tables.grammar.seconds_per_tick, mx.float32)
            onsets = Onsets(per_lane(later), per_lane(tables.contains(tables.grammar.bar)), typical)
        return cls(per_lane(tables.takes_time | later), onsets, TickCosts.of(tables))

    def lengthened(self, logits: mx.array, music: GrammarState, power: mx.array | float) -> mx.array:
        """Logits `(B, V)` with the probability of a pause of d multiplied by d^power, and of all pauses unchanged."""
        ticks = mx.maximum(self.costs.ticks_taken(music), 1)
        ticks = self.onsets.waits(ticks) if self.onsets else ticks.astype(mx.float32)
        return tilt(logits, self.group, power * mx.log(ticks))


@dataclass(frozen=True)
class Tempo(Steering):
    """Slower or faster: the probability of a pause of d seconds is multiplied by d^`bias`, and normalized.

    More than 0 is slower, less than 0 faster: with 1, a pause that is twice as long gets twice as likely, relative to
    the other. The probability that there is a pause at all does not change. If notes are written before their onsets,
    as Aria's are, a note counts as a pause of 0.1 s, compared with the time step that would postpone it.
    """

    bias: float

    def begin(self, tables: TokenTables, ids: np.ndarray) -> Pauses:
        """See `Processor.begin`."""
        self.require_events(tables.takes_time, "duration")
        return Pauses.of(tables)

    def __call__(self, logits: mx.array, music: GrammarState, state: Pauses) -> mx.array:
        return state.lengthened(logits, music, self.bias)


class Tilted(NamedTuple):
    """Ids whose probabilities are shifted among themselves, `(1, V)` bool, and the nats that each gains, `(1, V)`."""

    group: mx.array
    scores: mx.array


@dataclass(frozen=True)
class Dynamics(Steering):
    """Louder (more than 0) or softer: `bias` is how many nats the loudest velocity gains on the softest.

    Linear in between, and normalized: the probability that the velocity changes at all does not change.
    """

    bias: float

    def begin(self, tables: TokenTables, ids: np.ndarray) -> Tilted:
        """See `Processor.begin`."""
        sets = sets_velocity(tables)
        self.require_events(sets, "velocities")
        scores = np.where(sets, self.bias * tables.grammar.velocities[tables.velocity] / 128, 0)
        return Tilted(per_lane(sets), per_lane(scores, mx.float32))

    def __call__(self, logits: mx.array, music: GrammarState, state: Tilted) -> mx.array:
        return tilt(logits, state.group, state.scores)


class RecentNotes(NamedTuple):
    """The meaning of the ids, and a decaying count of the notes so far."""

    notes: mx.array  # (1, V) float32, how many keys an id presses
    begins: mx.array  # (1, V) float32, 1 for ids that decide that a note begins
    pauses: Pauses
    now: mx.array  # (1,) int32, the clock at which `count` was taken
    count: mx.array  # (1,) float32, notes, each weighted by exp(−age / seconds)
    seconds_per_tick: mx.array  # (1,) float32


@dataclass(frozen=True)
class Density(Steering):
    """Aims at `notes_per_second`, by feedback from the recent density.

    A note counts exp(−age / `seconds`); the density is the sum divided by `seconds`. With e = ln(target / density), at
    most ln 4 either way, ids that begin a note gain `strength` · e nats, and the probability of a pause of d seconds is
    multiplied by d^(−`strength` · e) as in `Tempo`. Before the piece begins the density is the target.
    """

    notes_per_second: float
    seconds: float = 4.0
    strength: float = 2.0

    remembers: ClassVar = {"now": (0, NEVER), "count": (0.0, 1e9)}

    def __post_init__(self) -> None:
        self.check_types()
        self.require("notes_per_second", self.notes_per_second > 0, "more than 0")
        self.require("seconds", self.seconds >= 0.001, "at least 0.001")
        self.require("strength", self.strength >= 0, "0 or more")

    def begin(self, tables: TokenTables, ids: np.ndarray) -> RecentNotes:
        """See `Processor.begin`."""
        self.require_events(presses(tables), "pitches")
        self.require_events(tables.takes_time, "duration")
        blank = RecentNotes(
            notes=per_lane(tables.notes, mx.float32),
            begins=per_lane(begins_note(tables), mx.float32),
            pauses=Pauses.of(tables),
            now=per_lane(0, mx.int32),
            count=per_lane(self.notes_per_second * self.seconds, mx.float32),
            seconds_per_tick=per_lane(tables.grammar.seconds_per_tick, mx.float32),
        )
        return self.read(tables, blank, ids, [beginning(tables.grammar)])

    def __call__(self, logits: mx.array, music: GrammarState, state: RecentNotes) -> mx.array:
        density = mx.maximum(state.count / self.seconds, 1e-9)
        error = mx.clip(mx.log(self.notes_per_second / density), -MAX_ERROR, MAX_ERROR)
        pull = self.strength * error[:, None]
        return state.pauses.lengthened(logits, music, -pull) + pull * state.begins

    def advance(self, state: RecentNotes, token: mx.array, music: GrammarState) -> RecentNotes:
        """See `Processor.advance`."""
        waited = (music.ticks - state.now) * state.seconds_per_tick
        count = state.count * mx.exp(-waited / self.seconds) + at_token(state.notes, token)
        return state._replace(now=music.ticks, count=count)

    def read(self, tables: TokenTables, state: RecentNotes, ids: np.ndarray, before: Sequence[Moment]) -> RecentNotes:
        """See `Steering.read`."""
        notes, lanes = tables.notes[ids], []
        seconds_per_tick = tables.grammar.seconds_per_tick / self.seconds
        for moment, count in zip(before, np.array(state.count, np.float64), strict=True):
            ticks = tables.moments(moment, ids).ticks
            weights = np.exp((ticks - ticks[-1]) * seconds_per_tick)
            lanes.append((ticks[-1], count * weights[0] + (notes * weights[1:]).sum()))
        now, count = zip(*lanes, strict=True)
        return state._replace(now=mx.array(np.array(now), mx.int32), count=mx.array(np.array(count), mx.float32))
