"""From events of any vocabulary, one at a time, to what happens on the keys of a piano and when."""

from __future__ import annotations

from collections.abc import Iterator

from dsmr_mlx.event_grammar import EventGrammar, Moment, beginning
from dsmr_mlx.keyboard import KeyEvent
from dsmr_mlx.performance import DEFAULT_BIN

DEFAULT_VELOCITY = 100  # where a vocabulary has no velocities, as MidiTok has it


class EventKeyboard:
    """One lane's keys, as `keyboard.Keyboard` for grammars of every kind; `down` are those it has pressed, with ticks.

    before: the moment that the music before it has left, its beginning if none. The clock `tick` begins at 0. A note
    whose length is an event of its own begins when that is known, and its release comes when time has passed. All
    instruments are one piano. The notes are those of `Tokenizer.decode` wherever events follow the grammar, but for
    PerTok's microtiming.
    """

    def __init__(self, grammar: EventGrammar, before: Moment | None = None) -> None:
        before = before or beginning(grammar)
        self.tick = 0
        self.down: dict[int, int] = {}
        self._grammar = grammar
        self._phase = before.phase
        self._velocities = grammar.velocities.tolist()
        self._velocity = before.velocity if before.velocity >= 0 else min(DEFAULT_BIN, len(self._velocities) - 1)
        self._named: int | None = None  # a pitch that lacks its velocity or its length
        self._ends: dict[int, int] = {}
        self._has_lengths = bool((grammar.duration >= 0).any())
        # An event with which a note begins: its length, its velocity, or itself.
        begins = grammar.duration if self._has_lengths else grammar.press
        waits_for_velocity = not self._has_lengths and not grammar.running_velocity and self._velocities
        self._begins = ((grammar.velocity if waits_for_velocity else begins) >= 0).tolist()

    def play(self, event: int) -> Iterator[KeyEvent]:
        """What one event does, in the order of time."""
        yield from self._wait(event)
        g = self._grammar
        if g.velocity[event] >= 0:
            self._velocity = int(g.velocity[event])
        if (pitch := int(g.release[event])) in self.down:
            yield self._release(pitch, self.tick)
        if g.press[event] >= 0:
            self._named = int(g.press[event])
        if self._begins[event] and self._named is not None:
            pitch, self._named = self._named, None
            if pitch in self.down:
                yield self._release(pitch, self.tick)
            self.down[pitch] = self.tick
            if self._has_lengths:
                self._ends[pitch] = self.tick + max(int(g.duration[event]), 1)
            yield KeyEvent(self.tick, pitch, self._velocities[self._velocity] if self._velocities else DEFAULT_VELOCITY)

    def release_all(self) -> Iterator[KeyEvent]:
        """Let go of all keys: of notes with a length when that is over, of others now; no note lasts no time."""
        ends = {pitch: self._ends.get(pitch, max(self.tick, begun + 1)) for pitch, begun in self.down.items()}
        for pitch in sorted(ends, key=lambda pitch: (ends[pitch], pitch)):
            yield self._release(pitch, ends[pitch])

    def _wait(self, event: int) -> Iterator[KeyEvent]:
        """Let the time of an event pass; keys whose notes are over by then go up."""
        g = self._grammar
        if g.bar[event]:
            passed, self._phase = g.bar_ticks - self._phase, 0
        elif g.position[event] >= 0:
            passed, self._phase = int(g.position[event]) - self._phase, int(g.position[event])
        else:
            passed = int(g.ticks[event])
            self._phase += passed
        if not passed:
            return
        self.tick += passed
        over = [pitch for pitch, end in self._ends.items() if end <= self.tick]
        for pitch in sorted(over, key=lambda pitch: (self._ends[pitch], pitch)):
            yield self._release(pitch, self._ends[pitch])

    def _release(self, pitch: int, tick: int) -> KeyEvent:
        del self.down[pitch]
        self._ends.pop(pitch, None)
        return KeyEvent(tick, pitch, 0)
