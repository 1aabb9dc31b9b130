"""What the events of a vocabulary mean and what may follow what, for every kind of vocabulary.

An *event* is an id of a base vocabulary: a key goes down, time passes, a note's length is named. An id of a vocabulary
of subwords is a *piece*, several events in a row, see `dsmr_mlx.tokenizers.token_tables`. Both are walked event by event: what follows
here is that walk in NumPy, one event at a time. It defines what a fast one has to compute.

Vocabularies differ in how they say how long a note lasts (a release, or a length), how they tell the time (pauses that
add up, or bars with positions in them) and what a velocity is of (all notes to come, or the one just named).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dsmr_mlx.music.notes import PITCHES


@dataclass(frozen=True, eq=False)
class EventGrammar:
    """Tables for Q states and E events. The state is what the last event was, whatever came before.

    allowed: (Q, E) bool, the events that may follow a state; next_state: (E,) int32, the state after an event.

    press, release: (E,) int32, the pitch that an event presses or releases, or −1; held: whether a pressed key sounds
    until it is released. Where it is not, duration: (E,) int32 says how many ticks the note lasts that this event
    completes, −1 for events that complete none.
    velocity: (E,) int32, the index in `velocities`, MIDI, that an event sets, or −1; running_velocity: whether for all
    notes to come, or for the last one pressed.

    ticks: (E,) int32, the time that an event takes. Where time is told by bars of `bar_ticks` ticks, an event with
    bar (E,) bool begins the next one, and one with position (E,) int32 ≥ 0 moves to so many ticks after the bar's
    beginning. first_phase: how long the bar has lasted before the first event, 0, or `bar_ticks` where the first event
    begins the first bar. seconds_per_tick: float.

    start: the state before the first event; states: their names; closing: the event that must come between a note and
    the end, such as the end of a track, or −1. plays_keys: whether all this says when every key of
    one piano goes down and up; not where several instruments play, or where pitches and times are in part unknown.
    """

    allowed: np.ndarray
    next_state: np.ndarray
    press: np.ndarray
    release: np.ndarray
    duration: np.ndarray
    velocity: np.ndarray
    ticks: np.ndarray
    bar: np.ndarray
    position: np.ndarray
    velocities: np.ndarray
    start: int
    seconds_per_tick: float
    states: tuple[str, ...]
    held: bool = True
    running_velocity: bool = True
    bar_ticks: int = 0
    first_phase: int = 0
    closing: int = -1
    plays_keys: bool = True

    @classmethod
    def permissive(cls, n: int, never: np.ndarray, ending: np.ndarray) -> EventGrammar:
        """For n events of unknown meaning: any may come at any time but those in `never`, until one in `ending`."""
        events, unknown = np.arange(n), np.full(n, -1, np.int32)
        is_end = np.isin(events, ending)
        may = is_end | ~np.isin(events, never)
        return cls(
            allowed=np.stack([may, np.zeros_like(may)]),
            next_state=is_end.astype(np.int32),
            **dict.fromkeys(("press", "release", "duration", "velocity", "position"), unknown),
            ticks=np.zeros(n, np.int32),
            bar=np.zeros(n, bool),
            velocities=np.zeros(0, np.uint8),
            start=0,
            seconds_per_tick=0.01,
            states=("PIECE", "END"),
            held=False,
            running_velocity=False,
            plays_keys=False,
        )

    @cached_property
    def ends(self) -> np.ndarray:
        """(E,) bool: the events after which nothing may come."""
        return ~self.allowed.any(axis=1)[self.next_state]

    @cached_property
    def begins(self) -> np.ndarray:
        """(E,) bool: the events with which a note begins that was named: its length, its velocity, or itself."""
        if (self.duration >= 0).any():
            return self.duration >= 0
        waits = not self.running_velocity and (self.velocity >= 0).any()
        return (self.velocity if waits else self.press) >= 0

    def whole(self, events: np.ndarray) -> tuple[int, list[int]]:
        """How many of some events (T,) remain without a last pause, a velocity or a note that is not complete, and the
        event that closes them, if one does: then the piece may end.
        """
        after, ending = self.next_state[events], self.ends & self.allowed.any(axis=0)
        may_end = self.allowed[:, ending].any(axis=1)[after]
        may_close = self.begins[events] & self.allowed[after, self.closing] & (self.closing >= 0)
        places = np.flatnonzero(may_end | may_close)
        if not len(places):
            return 0, []
        return int(places[-1]) + 1, [] if may_end[places[-1]] else [self.closing]

    @property
    def has_clock(self) -> bool:
        """Whether it is known how much time passes."""
        return bool(self.ticks.any() or self.bar.any())

    def elapsed(self, events: np.ndarray, phase: int | None = None) -> np.ndarray:
        """Ticks (T,) int64 that have passed after each of some events (T,), the first of a piece, or those that come
        when the bar has lasted for `phase` ticks.
        """
        events = np.asarray(events, np.int64)
        passed = np.cumsum(self.ticks[events], dtype=np.int64)
        if not self.bar_ticks:
            return passed
        phase = self.first_phase if phase is None else phase
        bars = np.cumsum(self.bar[events])
        moves = self.bar[events] | (self.position[events] >= 0)
        last = np.maximum.accumulate(np.where(moves, np.arange(len(events)), -1))
        target = np.where(self.bar[events], 0, self.position[events])
        phases = np.where(last >= 0, target[last] + passed - passed[last], phase + passed)
        return bars * self.bar_ticks + phases - phase


class Moment(NamedTuple):
    """A moment in a piece: grammar state, keys that are held (128,) bool, velocity index or −1, the pitch of a note
    that was named and is yet to begin or −1, ticks since the bar began, and ticks since the piece did.
    """

    state: int
    sounding: np.ndarray
    velocity: int
    named: int
    phase: int
    ticks: int


def beginning(grammar: EventGrammar) -> Moment:
    """Before the first event, BOS not among them."""
    return Moment(grammar.start, np.zeros(PITCHES, bool), -1, -1, grammar.first_phase, 0)
