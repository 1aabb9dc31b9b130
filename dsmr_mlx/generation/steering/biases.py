"""Gentle pulls: they change how likely events are, and forbid none."""

import math
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
    begins_note,
    per_lane,
    presses,
    sets_velocity,
    tilt,
)
from dsmr_mlx.tokenizers.event_grammar import Moment, beginning
from dsmr_mlx.tokenizers.token_tables import TokenTables

LARGEST_ERROR = math.log(4)  # a density four times off is as wrong as can be


class Pauses(NamedTuple):
    """The ids with which time may pass, `[1, V]` bool, and how much."""

    group: mx.array
    clock: Clock

    @classmethod
    def of(cls, tables: TokenTables) -> "Pauses":
        return cls(per_lane(tables.takes_time), Clock.of(tables))

    def lengthened(self, logits: mx.array, played: Played, power: mx.array | float) -> mx.array:
        """Logits `[n, V]` that make a pause of d d^power times as likely, and pauses together as likely as before."""
        return tilt(logits, self.group, power * mx.log(mx.maximum(self.clock.passed(played), 1)))


@dataclass(frozen=True)
class Tempo(Steering):
    """A feeling for the tempo: the probability of a pause of d seconds is multiplied by d^`bias`, and normalized.

    More than 0 is slower, less than 0 faster: with 1, of two pauses the one that lasts twice as long becomes twice
    as likely. That there is a pause at all stays as likely as it was.
    """

    bias: float

    def __post_init__(self) -> None:
        self.check_types()

    def begin(self, tables: TokenTables, ids: np.ndarray) -> Pauses:
        self.require_events(tables.takes_time, "duration")
        return Pauses.of(tables)

    def __call__(self, logits: mx.array, played: Played, state: Pauses) -> mx.array:
        return state.lengthened(logits, played, self.bias)


class Tilted(NamedTuple):
    """The ids whose probabilities are shifted among themselves, `[1, V]` bool, and by how many nats, `[1, V]`."""

    group: mx.array
    scores: mx.array


@dataclass(frozen=True)
class Dynamics(Steering):
    """Louder (more than 0) or softer: `bias` is how many nats the loudest velocity gains on the softest.

    In between it is linear, and normalized: that the velocity changes at all stays as likely as it was.
    """

    bias: float

    def __post_init__(self) -> None:
        self.check_types()

    def begin(self, tables: TokenTables, ids: np.ndarray) -> Tilted:
        sets = sets_velocity(tables)
        self.require_events(sets, "velocities")
        scores = np.where(sets, self.bias * tables.grammar.velocities[tables.velocity] / 128, 0)
        return Tilted(per_lane(sets), per_lane(scores, mx.float32))

    def __call__(self, logits: mx.array, played: Played, state: Tilted) -> mx.array:
        return tilt(logits, state.group, state.scores)


class Heard(NamedTuple):
    """What the ids mean, and what was heard of late."""

    notes: mx.array  # [1, V] float32, how many keys an id presses
    begins: mx.array  # [1, V] float32, 1 for ids with which it is decided that a note begins
    pauses: Pauses
    now: mx.array  # [1] int32, the ticks at which `heard` was counted
    heard: mx.array  # [1] float32, notes, each counting the less the longer ago
    seconds_per_tick: mx.array  # [1] float32


@dataclass(frozen=True)
class Density(Steering):
    """About `notes_per_second`, by feedback from what was played of late.

    A note counts exp(−age / `seconds`); the sum over `seconds` is the density. With e = ln(wanted / heard), at most
    ln 4 either way, what begins a note gains `strength` · e nats, and a pause of d seconds is multiplied by
    d^(−`strength` · e) as in `Tempo`. What came before the music began counts as dense as wanted.
    """

    notes_per_second: float
    seconds: float = 4.0
    strength: float = 2.0

    def __post_init__(self) -> None:
        self.check_types()
        self.require("notes_per_second", self.notes_per_second > 0, "more than 0")
        self.require("seconds", self.seconds >= 0.001, "at least 0.001")
        self.require("strength", self.strength >= 0, "0 or more")

    def begin(self, tables: TokenTables, ids: np.ndarray) -> Heard:
        self.require_events(presses(tables), "pitches")
        self.require_events(tables.takes_time, "duration")
        blank = Heard(
            notes=per_lane(tables.notes, mx.float32),
            begins=per_lane(begins_note(tables), mx.float32),
            pauses=Pauses.of(tables),
            now=per_lane(0, mx.int32),
            heard=per_lane(self.notes_per_second * self.seconds, mx.float32),
            seconds_per_tick=per_lane(tables.grammar.seconds_per_tick, mx.float32),
        )
        return self.read(tables, blank, ids, [beginning(tables.grammar)])

    def __call__(self, logits: mx.array, played: Played, state: Heard) -> mx.array:
        density = mx.maximum(state.heard / self.seconds, 1e-9)
        error = mx.clip(mx.log(self.notes_per_second / density), -LARGEST_ERROR, LARGEST_ERROR)
        pull = self.strength * error[:, None]
        return state.pauses.lengthened(logits, played, -pull) + pull * state.begins

    def advance(self, state: Heard, token: mx.array, played: Played) -> Heard:
        waited = (played.ticks - state.now) * state.seconds_per_tick
        heard = state.heard * mx.exp(-waited / self.seconds) + at_token(state.notes, token)
        return state._replace(now=played.ticks, heard=heard)

    def read(self, tables: TokenTables, state: Heard, ids: np.ndarray, before: Sequence[Moment]) -> Heard:
        notes, lanes = tables.notes[ids], []
        seconds_per_tick = tables.grammar.seconds_per_tick / self.seconds
        for moment, heard in zip(before, np.array(state.heard, np.float64), strict=True):
            ticks = tables.moments(moment, ids).ticks
            weights = np.exp((ticks - ticks[-1]) * seconds_per_tick)
            lanes.append((ticks[-1], heard * weights[0] + (notes * weights[1:]).sum()))
        now, heard = zip(*lanes, strict=True)
        return state._replace(now=mx.array(np.array(now), mx.int32), heard=mx.array(np.array(heard), mx.float32))
