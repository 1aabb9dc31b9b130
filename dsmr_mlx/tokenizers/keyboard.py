"""Convert events of any vocabulary, one at a time, to timed key presses and releases of a piano."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np

from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.event_grammar import EventGrammar, Moment, beginning
from dsmr_mlx.tokenizers.performance import DEFAULT_BIN

DEFAULT_VELOCITY = 100  # of a vocabulary without velocities, as in MidiTok


class KeyEvent(NamedTuple):
    """At a tick, a key goes down with a MIDI velocity, or up with velocity 0."""

    tick: int
    pitch: int
    velocity: int


class Keyboard:
    """The keys of one lane: `tick` is its clock, `down` maps each key that it has pressed to the tick of the press.

    before: the moment at which it starts; None for the beginning of a piece. Keys that were down then are not in
    `down`, and their releases have no effect. A note whose length is a separate event begins at that event. It is
    released after its length or, if a pedal is down then, when the pedal goes up. The notes equal those of
    `Tokenizer.decode` if the events follow a grammar that `plays_keys`.
    """

    def __init__(self, grammar: EventGrammar, before: Moment | None = None) -> None:
        before = before or beginning(grammar)
        self.tick = 0
        self.down: dict[int, int] = {}
        self._phase = before.phase
        self._velocities = grammar.velocities.tolist()
        self._velocity = before.velocity if before.velocity >= 0 else min(DEFAULT_BIN, len(self._velocities) - 1)
        self._pending_pitch = before.pending_pitch if before.pending_pitch >= 0 else None
        self._ends: dict[int, tuple[int, int]] = {}  # pitch → (tick, velocity) of the end of a note with a length
        self._bar_ticks = grammar.bar_ticks
        tables = (grammar.ticks, grammar.bar, grammar.position, grammar.velocity, grammar.press, grammar.release)
        self._effects = list(zip(*(table.tolist() for table in tables), strict=True))
        self._begins, self._duration = grammar.begins.tolist(), grammar.duration.tolist()
        self._pedal, self._next_state, self._state = grammar.pedal, grammar.next_state, before.state
        self._pedal_down = self._pedal is not None and bool(self._pedal[before.state])

    def play(self, event: int) -> Iterator[KeyEvent]:
        """Yield the key events that one event causes, in order of time."""
        ticks, bar, position, velocity, press, release = self._effects[event]
        yield from self._wait(ticks, bar, position)
        if velocity >= 0:
            self._velocity = velocity
        if release in self.down:
            yield self._release(release, self.tick)
        if press >= 0:
            self._pending_pitch = press
        if self._begins[event] and self._pending_pitch is not None:
            pitch, self._pending_pitch = self._pending_pitch, None
            yield from self._press(pitch, self._duration[event])
        if self._pedal is not None:
            yield from self._move_pedal(event)

    def _move_pedal(self, event: int) -> Iterator[KeyEvent]:
        """Move the pedal if the event does that. When it goes up, end the notes that it has held."""
        self._state = int(self._next_state[self._state, event])
        before, self._pedal_down = self._pedal_down, bool(self._pedal[self._state])
        if before and not self._pedal_down:
            for pitch in sorted(self.down.keys() - self._ends.keys()):
                yield self._release(pitch, self.tick)

    def _press(self, pitch: int, duration: int) -> Iterator[KeyEvent]:
        """Begin a note of `duration` ticks, or until its release if −1.

        Of two notes that begin together, the longer one is kept, then the louder one.
        """
        velocity = self._velocities[self._velocity] if self._velocities else DEFAULT_VELOCITY
        end = self.tick + max(duration, 1), velocity
        if pitch in self.down:
            if self.down[pitch] == self.tick and end <= self._ends.get(pitch, (0, 0)):
                return
            yield self._release(pitch, self.tick)
        self.down[pitch] = self.tick
        if duration >= 0:
            self._ends[pitch] = end
        yield KeyEvent(self.tick, pitch, velocity)

    def release_all(self) -> Iterator[KeyEvent]:
        """Release all keys: each note at the end of its length, or now if it has none, but after at least a tick."""
        without_length = {pitch: max(self.tick, begun + 1) for pitch, begun in self.down.items()}
        ends = without_length | {pitch: end for pitch, (end, _) in self._ends.items()}
        for pitch in sorted(ends, key=lambda pitch: (ends[pitch], pitch)):
            yield self._release(pitch, ends[pitch])

    def _wait(self, ticks: int, bar: bool, position: int) -> Iterator[KeyEvent]:
        """Advance the time by one event and release the keys of notes that end. A past position means now."""
        passed = ticks
        if bar or position >= 0:
            passed = max((self._bar_ticks if bar else position) - self._phase, 0)
        self._phase = 0 if bar else self._phase + passed
        self.tick += passed
        ended = sorted((end, pitch) for pitch, (end, _) in self._ends.items() if end <= self.tick)
        for end, pitch in ended:
            if self._pedal_down:
                del self._ends[pitch]  # it sounds until the pedal goes up
            else:
                yield self._release(pitch, end)

    def _release(self, pitch: int, tick: int) -> KeyEvent:
        del self.down[pitch]
        self._ends.pop(pitch, None)
        return KeyEvent(tick, pitch, 0)


def completed_notes(events: Iterable[KeyEvent], pressed: dict[int, KeyEvent]) -> Iterator[tuple[KeyEvent, KeyEvent]]:
    """Yield the press and the release of every note that the events end; presses of later notes stay in `pressed`.

    A note that is replaced by another one in the tick of its onset is left out.
    """
    for event in events:
        if event.velocity:
            pressed[event.pitch] = event
        elif event.tick > (start := pressed.pop(event.pitch)).tick:
            yield start, event


def notes_played(grammar: EventGrammar, events: Iterable[int], before: Moment | None = None) -> Notes:
    """Return the notes of some events that follow the moment `before`. Keys that are down at the end are released.

    Of several presses of a key at one time, the last is kept, or the longest if the notes have lengths.
    """
    keyboard = Keyboard(grammar, before)
    keys = chain(chain.from_iterable(map(keyboard.play, events)), keyboard.release_all())
    rows = [(start.tick, end.tick, end.pitch, start.velocity) for start, end in completed_notes(keys, {})]
    if not rows:
        return Notes.empty()
    onset, offset, pitch, velocity = np.array(rows).T
    per_second = 1 / grammar.seconds_per_tick  # dividing by it gives the same last bit as `Tokenizer.decode`
    return Notes.sorted(onset / per_second, offset / per_second, pitch.astype(np.uint8), velocity.astype(np.uint8))
