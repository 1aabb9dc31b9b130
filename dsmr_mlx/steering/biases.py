"""Gentle pulls: they change how likely events are, and forbid none."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.grammar import Played
from dsmr_mlx.performance import Grammar
from dsmr_mlx.steering.base import Steering, at_token, per_lane, tilt, velocity_of

LARGEST_ERROR = math.log(4)  # a density four times off is as wrong as can be


class Tilted(NamedTuple):
    """The ids whose probabilities are shifted among themselves, `[1, V]` bool, and by how many nats, `[1, V]`."""

    group: mx.array
    scores: mx.array


@dataclass(frozen=True)
class Tempo(Steering):
    """A feeling for the tempo: the probability of a pause of d seconds is multiplied by d^`bias`, and normalized.

    More than 0 is slower, less than 0 faster: with 1, of two pauses the one that lasts twice as long becomes twice
    as likely. That there is a pause at all stays as likely as it was.
    """

    bias: float

    def __post_init__(self) -> None:
        self.check_types()

    def begin(self, tables: Grammar, ids: np.ndarray) -> Tilted:
        self.require_events(tables.ticks > 0, "duration")
        return Tilted(per_lane(tables.ticks > 0), per_lane(self.bias * log_ticks(tables), mx.float32))

    def __call__(self, logits: mx.array, played: Played, state: Tilted) -> mx.array:
        return tilt(logits, state.group, state.scores)


@dataclass(frozen=True)
class Dynamics(Steering):
    """Louder (more than 0) or softer: `bias` is how many nats the loudest velocity gains on the softest.

    In between it is linear, and normalized: that the velocity changes at all stays as likely as it was.
    """

    bias: float

    def __post_init__(self) -> None:
        self.check_types()

    def begin(self, tables: Grammar, ids: np.ndarray) -> Tilted:
        self.require_events(tables.velocity >= 0, "velocities")
        sets = tables.velocity >= 0
        scores = np.where(sets, self.bias * velocity_of(tables) / 128, 0)
        return Tilted(per_lane(sets), per_lane(scores, mx.float32))

    def __call__(self, logits: mx.array, played: Played, state: Tilted) -> mx.array:
        return tilt(logits, state.group, state.scores)


class Heard(NamedTuple):
    """What the ids mean, and what was heard of late."""

    press: mx.array  # [1, V] float32, 1 for ids that press a key
    begins: mx.array  # [1, V] float32, 1 for ids that press a key or set the velocity of the next one
    pause: mx.array  # [1, V] bool, ids that take time
    log_ticks: mx.array  # [1, V] float32
    clock: mx.array  # [1] int32, the ticks at which `notes` was counted
    notes: mx.array  # [1] float32, each the less the longer ago
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
        self.require("seconds", self.seconds > 0, "more than 0")
        self.require("strength", self.strength >= 0, "0 or more")

    def begin(self, tables: Grammar, ids: np.ndarray) -> Heard:
        self.require_events(tables.press >= 0, "pitches")
        self.require_events(tables.ticks > 0, "duration")
        ids = np.asarray(ids, np.int64)
        elapsed = np.cumsum(tables.ticks[ids]) * tables.seconds_per_tick
        end = elapsed[-1] if len(ids) else 0.0
        notes = np.exp((elapsed[tables.press[ids] >= 0] - end) / self.seconds).sum()
        notes += self.notes_per_second * self.seconds * math.exp(-end / self.seconds)
        return Heard(
            press=per_lane(tables.press >= 0, mx.float32),
            begins=per_lane((tables.press >= 0) | (tables.velocity >= 0), mx.float32),
            pause=per_lane(tables.ticks > 0),
            log_ticks=per_lane(log_ticks(tables), mx.float32),
            clock=per_lane(0, mx.int32),
            notes=per_lane(notes, mx.float32),
            seconds_per_tick=per_lane(tables.seconds_per_tick, mx.float32),
        )

    def __call__(self, logits: mx.array, played: Played, state: Heard) -> mx.array:
        heard = mx.maximum(state.notes / self.seconds, 1e-9)
        error = mx.clip(mx.log(self.notes_per_second / heard), -LARGEST_ERROR, LARGEST_ERROR)
        pull = self.strength * error[:, None]
        return tilt(logits, state.pause, -pull * state.log_ticks) + pull * state.begins

    def advance(self, state: Heard, token: mx.array, played: Played) -> Heard:
        waited = (played.ticks - state.clock) * state.seconds_per_tick
        notes = state.notes * mx.exp(-waited / self.seconds) + at_token(state.press, token)
        return state._replace(clock=played.ticks, notes=notes)


def log_ticks(tables: Grammar) -> np.ndarray:
    """`[V]` ln of an id's ticks, 0 where it takes no time."""
    return np.log(np.maximum(tables.ticks, 1))
