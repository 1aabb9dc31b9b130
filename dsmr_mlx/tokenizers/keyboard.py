"""From events of any vocabulary, one at a time, to what happens on the keys of a piano and when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np

from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.event_grammar import EventGrammar, Moment, beginning
from dsmr_mlx.tokenizers.performance import DEFAULT_BIN

DEFAULT_VELOCITY = 100  # where a vocabulary has no velocities, as MidiTok has it


class KeyEvent(NamedTuple):
    """At a tick a key goes down with a MIDI velocity, or up again: velocity 0."""

    tick: int
    pitch: int
    velocity: int


class Keyboard:
    """One lane's keys; `tick` is its clock, `down` the keys that it has pressed with the ticks when.

    before: the moment that the music before it has left, its beginning if none. Keys that were held then are not its
    own: their releases pass unheard. A note whose length is an event of its own begins when that is known, and its
    release comes when time has passed. Its notes are those of `Tokenizer.decode` wherever the events follow a grammar
    that `plays_keys`.
    """

    def __init__(self, grammar: EventGrammar, before: Moment | None = None) -> None:
        before = before or beginning(grammar)
        self.tick = 0
        self.down: dict[int, int] = {}
        self._phase = before.phase
        self._velocities = grammar.velocities.tolist()
        self._velocity = before.velocity if before.velocity >= 0 else min(DEFAULT_BIN, len(self._velocities) - 1)
        self._named = before.named if before.named >= 0 else None  # a pitch that lacks its velocity or its length
        self._ends: dict[int, tuple[int, int]] = {}  # of notes told with their lengths: when, and the velocity
        self._bar_ticks = grammar.bar_ticks
        tables = (grammar.ticks, grammar.bar, grammar.position, grammar.velocity, grammar.press, grammar.release)
        self._effects = list(zip(*(table.tolist() for table in tables), strict=True))
        self._begins, self._duration = grammar.begins.tolist(), grammar.duration.tolist()

    def play(self, event: int) -> Iterator[KeyEvent]:
        """What one event does, in the order of time."""
        ticks, bar, position, velocity, press, release = self._effects[event]
        yield from self._wait(ticks, bar, position)
        if velocity >= 0:
            self._velocity = velocity
        if release in self.down:
            yield self._release(release, self.tick)
        if press >= 0:
            self._named = press
        if self._begins[event] and self._named is not None:
            pitch, self._named = self._named, None
            yield from self._strike(pitch, self._duration[event])

    def _strike(self, pitch: int, duration: int) -> Iterator[KeyEvent]:
        """A note of so many ticks, −1: until its release. Of two that begin together the longer one counts, then the
        louder one.
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
        """Let go of all keys: of notes with a length when that is over, of others now; no note lasts no time."""
        untold = {pitch: max(self.tick, begun + 1) for pitch, begun in self.down.items()}
        ends = untold | {pitch: end for pitch, (end, _) in self._ends.items()}
        for pitch in sorted(ends, key=lambda pitch: (ends[pitch], pitch)):
            yield self._release(pitch, ends[pitch])

    def _wait(self, ticks: int, bar: bool, position: int) -> Iterator[KeyEvent]:
        """Let the time of an event pass; keys whose notes are over by then go up. A place that is past is now."""
        passed = ticks
        if bar or position >= 0:
            passed = max((self._bar_ticks if bar else position) - self._phase, 0)
        self._phase = 0 if bar else self._phase + passed
        self.tick += passed
        over = sorted((end, pitch) for pitch, (end, _) in self._ends.items() if end <= self.tick)
        for end, pitch in over:
            yield self._release(pitch, end)

    def _release(self, pitch: int, tick: int) -> KeyEvent:
        del self.down[pitch]
        self._ends.pop(pitch, None)
        return KeyEvent(tick, pitch, 0)


def finished(events: Iterable[KeyEvent], pressed: dict[int, KeyEvent]) -> Iterator[tuple[KeyEvent, KeyEvent]]:
    """The press and the release of every note that ends with some events, but of those whose place another takes in
    the tick in which they begin; what begins is remembered in `pressed`.
    """
    for event in events:
        if event.velocity:
            pressed[event.pitch] = event
        elif event.tick > (start := pressed.pop(event.pitch)).tick:
            yield start, event


def notes_played(grammar: EventGrammar, events: Iterable[int], before: Moment | None = None) -> Notes:
    """The notes that some events play from the moment before them on; what sounds in the end is released.

    Of several strikes of a key at one time the last counts, where notes are told with their lengths the longest.
    """
    keyboard = Keyboard(grammar, before)
    keys = chain(chain.from_iterable(map(keyboard.play, events)), keyboard.release_all())
    rows = [(start.tick, end.tick, end.pitch, start.velocity) for start, end in finished(keys, {})]
    if not rows:
        return Notes.empty()
    onset, offset, pitch, velocity = np.array(rows).T
    per_second = 1 / grammar.seconds_per_tick  # dividing by it gives what `Tokenizer.decode` gives, to the last bit
    return Notes.sorted(onset / per_second, offset / per_second, pitch.astype(np.uint8), velocity.astype(np.uint8))
