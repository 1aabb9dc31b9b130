"""The meaning and the grammar of the events of a vocabulary, for every kind of vocabulary.

An *event* is an id of a base vocabulary: a key goes down, time passes, a note gets a length. An id of a subword
vocabulary is a *token* of several events, see `dsmr_mlx.tokenizers.token_tables`.

Vocabularies differ in how they encode the length of a note (a release or a length), the time (pauses that add up, or
bars and positions in them) and a velocity (of all notes to come, or of one note).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dsmr_mlx.music.notes import PITCHES


@dataclass(frozen=True, eq=False)
class EventGrammar:
    """Tables for Q states and E events.

    allowed: `(Q, E)` bool, the events that may follow a state
    next_state: `(Q, E)` int32, the state after an event, whether it may follow or not
    press, release: `(E,)` int32, the pitch that an event presses or releases, or −1
    duration: `(E,)` int32, the ticks that the note completed by this event lasts, or −1
    velocity: `(E,)` int32, the index in `velocities` that an event sets, or −1
    ticks: `(E,)` int32, the time that an event takes
    bar: `(E,)` bool, events that begin the next bar
    position: `(E,)` int32, the ticks after the beginning of the bar to which an event moves, or −1
    velocities: `(N,)` uint8, MIDI velocities
    start: the state before the first event
    seconds_per_tick: the unit of all times
    states: the names of the states
    held: whether a pressed key sounds until its release; if not, notes have a `duration`
    running_velocity: whether a velocity applies to all notes to come; if not, to the last one pressed
    bar_ticks: the length of a bar, or 0 without bars
    first_phase: ticks since the bar began before the first event: 0, or `bar_ticks` if the first event begins a bar
    pedal: `(Q,)` bool, states in which the sustain pedal is down; None without a pedal
    announces: `(E,)` bool, events that announce that the piece ends soon; None without such events
    plays_keys: whether the tables define when each key of one piano goes down and up; false for several instruments
        and if pitches or times are partly unknown
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
    plays_keys: bool = True
    pedal: np.ndarray | None = None
    announces: np.ndarray | None = None

    @classmethod
    def permissive(cls, n: int, never: np.ndarray, ending: np.ndarray) -> EventGrammar:
        """Return the grammar of n unknown events: any may come except those in `never`, until one in `ending`."""
        events, unknown = np.arange(n), np.full(n, -1, np.int32)
        is_end = np.isin(events, ending)
        may = is_end | ~np.isin(events, never)
        return cls(
            allowed=np.stack([may, np.zeros_like(may)]),
            next_state=np.broadcast_to(is_end.astype(np.int32), (2, n)),
            **dict.fromkeys(("press", "release", "duration", "velocity", "position"), unknown),
            ticks=np.zeros(n, np.int32),
            bar=np.zeros(n, bool),
            velocities=np.zeros(0, np.uint8),
            start=0,
            seconds_per_tick=0.01,
            states=("START", "END"),
            held=False,
            running_velocity=False,
            plays_keys=False,
        )

    @cached_property
    def ends(self) -> np.ndarray:
        """`(E,)` bool: the events that nothing may follow."""
        ended = ~self.allowed.any(axis=1)
        return (ended[self.next_state] | ~self.allowed).all(axis=0) & ended[self.next_state].any(axis=0)

    @cached_property
    def begins(self) -> np.ndarray:
        """`(E,)` bool: the last event needed to start a note: its pitch, velocity or length, by vocabulary."""
        if (self.duration >= 0).any():
            return self.duration >= 0
        waits = not self.running_velocity and (self.velocity >= 0).any()
        return (self.velocity if waits else self.press) >= 0

    @cached_property
    def timed_later(self) -> np.ndarray:
        """`(E,)` bool: the events that press a key before the time of the note is known."""
        may_wait = self.allowed[:, (self.ticks > 0) | self.bar | (self.position >= 0)].any(axis=1)
        return (self.press >= 0) & ~self.begins & (may_wait[self.next_state] & self.allowed).any(axis=0)

    def complete_length(self, events: np.ndarray) -> int:
        """Return how many of the events `(T,)` remain without a final pause, velocity or incomplete note."""
        may_end = self.allowed[:, self.ends & self.allowed.any(axis=0)].any(axis=1)  # (Q,)
        places = np.flatnonzero(may_end[states_after(self.next_state, self.start, events)[1:]])
        return int(places[-1]) + 1 if len(places) else 0

    @property
    def has_clock(self) -> bool:
        """Whether the time that events take is known."""
        return bool(self.ticks.any() or self.bar.any())

    def elapsed(self, events: np.ndarray, phase: int | None = None) -> np.ndarray:
        """Return the ticks that have passed after each of the events `(T,)`: int64 `(T,)`.

        phase: ticks since the bar began before the first of them; None at the beginning of a piece.
        """
        events = np.asarray(events, np.int64)
        passed = np.cumsum(self.ticks[events], dtype=np.int64)
        if not self.bar_ticks:
            return passed
        phase = self.first_phase if phase is None else phase
        bars = np.cumsum(self.bar[events])
        moves = self.bar[events] | (self.position[events] >= 0)
        # From the last bar or position on, the phase is its place plus the pauses since then.
        last = np.maximum.accumulate(np.where(moves, np.arange(len(events)), -1))
        target = np.where(self.bar[events], 0, self.position[events])
        phases = np.where(last >= 0, target[last] + passed - passed[last], phase + passed)
        return bars * self.bar_ticks + phases - phase


def states_after(next_state: np.ndarray, state: int, events: np.ndarray) -> np.ndarray:
    """Return the T + 1 states before each of the events `(T,)` and after the last: int64.

    next_state: `(Q, E)`, of an `EventGrammar` or of tokens; state: the one before the first event
    """
    events = np.asarray(events, np.int64)
    columns = next_state[:, events]  # (Q, T)
    states = np.append(state, columns[0]).astype(np.int64)
    for i in np.flatnonzero((columns != columns[0]).any(axis=0)).tolist():  # the event's effect depends on the state
        states[i + 1] = next_state[states[i], events[i]]
    return states


class Moment(NamedTuple):
    """The state of a piece between two events.

    state: of the grammar; sounding: `(128,)` bool, keys that are down; velocity: index of the last one, or −1;
    pending_pitch: pitch of a note whose velocity or length is still to come, or −1; phase: ticks since the bar began;
    ticks: ticks since the piece began
    """

    state: int
    sounding: np.ndarray
    velocity: int
    pending_pitch: int
    phase: int
    ticks: int


def beginning(grammar: EventGrammar) -> Moment:
    """Return the moment before the first event; BOS is not an event of the grammar."""
    return Moment(grammar.start, np.zeros(PITCHES, bool), -1, -1, grammar.first_phase, 0)
