"""What is played, as events, while it is played: the stream that `performance.encode_notes` gives, bit by bit."""

import math
from typing import NamedTuple

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.instrument import Voice
from dsmr_mlx.music.notes import PITCHES
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.performance import VELOCITY_BINS, velocity_bins

LONGEST_PAUSE = 10.0  # seconds: more of a time in which nothing happens is not told


class Vocabulary:
    """The events of a vocabulary by their meaning, and the ids that stand for them.

    grammar: that of the events; press, release: the event for each pitch; velocity: the event for each bin; wait: the
    event for each number of ticks, from 1; longest: the most ticks of one event. Raises `UserError` for a tokenizer
    whose events do not say all that.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.grammar = tokenizer, tokenizer.event_grammar()
        grammar = self.grammar
        if grammar is None or not grammar.plays_keys:
            raise UserError(f"tokenizer {tokenizer.label}: what its tokens play is not known, expected 'performance'")
        if not grammar.held:
            raise UserError(
                f"tokenizer {tokenizer.label}: it tells notes with their lengths, which nobody knows while keys are "
                "down, expected 'performance'"
            )
        self.longest = int(grammar.ticks.max())
        self.press = events_of(grammar.press, range(PITCHES))
        self.release = events_of(grammar.release, range(PITCHES))
        self.velocity = events_of(grammar.velocity, range(VELOCITY_BINS))
        self.wait = [-1, *events_of(grammar.ticks, range(1, self.longest + 1))]
        needed = (*self.press, *self.release, *self.velocity, *self.wait[1:])
        if not self.longest or -1 in needed or not grammar.running_velocity:
            raise UserError(
                f"tokenizer {tokenizer.label}: not every key, velocity and pause has a token that says it at once, "
                "expected 'performance'"
            )
        self.open = grammar.allowed[:, self.wait[1]]  # (Q,) bool: states in which time may pass
        self._special = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]

    def ids(self, events: list[int]) -> list[int]:
        """The ids that stand for some events."""
        ids = self.tokenizer.from_events(np.array(events, np.int64))
        return ids[~np.isin(ids, self._special)].tolist()

    def events(self, token: int) -> list[int]:
        """The events that an id stands for."""
        return self.tokenizer.to_events([token]).tolist()

    def waiting(self, ticks: int) -> list[int]:
        """The events for a pause: as many of the longest as fit, then the rest."""
        full, rest = divmod(max(ticks, 0), self.longest)
        return [self.wait[self.longest]] * full + [self.wait[rest]] * (rest > 0)


def events_of(table: np.ndarray, values: range) -> list[int]:
    """The event that has each value in a table `[E]`, −1 where none has."""
    events = {int(value): i for i, value in enumerate(table)}
    return [events.get(value, -1) for value in values]


class Key(NamedTuple):
    """A key that is down in the stream: since which tick, and who pressed it."""

    pressed: int
    voice: Voice


class Event(NamedTuple):
    """A key event that is yet to be told. Events sort in canonical order."""

    tick: int
    is_press: bool
    pitch: int
    velocity_bin: int


class Transcript:
    """Turns what the human does into events, and keeps count of what the model has played in between.

    Times are seconds of the session's clock, rounded to ticks. What happens in one tick is told when it is over, for
    its order is that of the canonical stream. The stream's clock begins with the first key; a model whose stream goes
    on has one already, with `start` its time now. Where events come too late for their tick, or a key would be
    pressed and released in the same one, they move to the next that is possible.
    """

    def __init__(
        self, vocabulary: Vocabulary, state: int | None = None, velocity: int = -1, held=(), start: float = 0.0
    ):
        self.vocabulary, self.grammar = vocabulary, vocabulary.grammar
        self.ticks_per_second = round(1 / self.grammar.seconds_per_tick)
        ended = state is None or not self.grammar.allowed[state].any()
        self.state = self.grammar.start if ended else state
        self.velocity = velocity  # the running bin, −1 before the first
        self.origin, self.tick = start, 0
        self.keys = {pitch: Key(-1, Voice.MODEL) for pitch in held}  # once all events are told
        self._events: dict[int, list[Event]] = {}  # by pitch, each list in order
        self._quiet = 0  # ticks since the last event

    @property
    def begun(self) -> bool:
        """Whether there is a first key, from which on time counts."""
        return self.state != self.grammar.start or bool(self._events)

    def tick_of(self, time: float) -> int:
        """The tick nearest to a time."""
        return int(np.rint((time - self.origin) * self.ticks_per_second))

    def time_of(self, tick: float) -> float:
        """When a tick is, seconds of the session's clock."""
        return self.origin + tick / self.ticks_per_second

    def press(self, time: float, pitch: int, velocity: int) -> None:
        """The human presses a key, at a MIDI velocity."""
        self._begin(time)
        tick = max(self.tick_of(time), self.tick)
        velocity_bin = int(velocity_bins(np.array(velocity)))
        events = self._events.setdefault(pitch, [])
        again = next((i for i, e in enumerate(events) if e[:2] == (tick, True)), None)
        if again is not None:  # of several presses in one tick the last counts
            del events[again:]
        elif pitch in self.keys:
            tick = self._release(tick, pitch)
        elif events:
            tick = max(tick, events[-1].tick)
        self.keys[pitch] = Key(tick, Voice.HUMAN)
        events.append(Event(tick, True, pitch, velocity_bin))

    def release(self, time: float, pitch: int) -> None:
        """The human lets a key go; without effect if it is up, or the model's by now."""
        if self.holds(Voice.HUMAN, pitch):
            self._release(self.tick_of(time), pitch)

    def release_voice(self, time: float, voice: Voice) -> None:
        """All keys of one of the two go up."""
        for pitch in [pitch for pitch in self.keys if self.holds(voice, pitch)]:
            self._release(self.tick_of(time), pitch)

    def holds(self, voice: Voice, pitch: int) -> bool:
        """Whether a key is down because one of the two has pressed it."""
        return pitch in self.keys and self.keys[pitch].voice is voice

    def _begin(self, time: float) -> None:
        if not self.begun:
            self.origin, self.tick = time, 0

    def _release(self, tick: int, pitch: int) -> int:
        """Release a key that is down as near to a tick as possible; the tick."""
        may_release = self.grammar.allowed[self.state, self.vocabulary.release[pitch]]
        earliest = max(self.tick + (not may_release), self.keys.pop(pitch).pressed + 1)
        tick = max(tick, earliest)
        self._events.setdefault(pitch, []).append(Event(tick, False, pitch, 0))
        return tick

    def tell(self, time: float) -> list[int]:
        """The events of all ticks that are over at a time, and of the full pauses since."""
        events, now, longest = self.tell_all(self.tick_of(time) - 1), self.tick_of(time), self.vocabulary.longest
        while self.begun and not self._events and now - self.tick >= longest:
            if self._quiet < LONGEST_PAUSE * self.ticks_per_second:
                events += self._tell(self.vocabulary.wait[longest])
            else:
                self.origin += longest / self.ticks_per_second
                now -= longest
        return events

    def tell_all(self, until: int | None = None) -> list[int]:
        """The events up to a tick, or all, as the vocabulary has them."""
        until = math.inf if until is None else until
        due = sorted(e for events in self._events.values() for e in events if e.tick <= until)
        left = {pitch: [e for e in events if e.tick > until] for pitch, events in self._events.items()}
        self._events = {pitch: events for pitch, events in left.items() if events}
        return [said for event in due for said in self._said(event)]

    def _said(self, event: Event) -> list[int]:
        v = self.vocabulary
        said = [event for wait in v.waiting(event.tick - self.tick) for event in self._tell(wait)]
        if not event.is_press:
            return said + self._tell(v.release[event.pitch])
        if event.velocity_bin != self.velocity or not self.grammar.allowed[self.state, v.press[event.pitch]]:
            said += self._tell(v.velocity[event.velocity_bin])
        return said + self._tell(v.press[event.pitch])

    def _tell(self, event: int) -> list[int]:
        """Go one event further."""
        g = self.grammar
        self.state = int(g.next_state[event])
        self.tick += int(g.ticks[event])
        self._quiet = self._quiet + int(g.ticks[event]) if g.press[event] < 0 and g.release[event] < 0 else 0
        if g.velocity[event] >= 0:
            self.velocity = int(g.velocity[event])
        return [event]

    def next_time(self) -> float:
        """When `tell` will have something to tell, if nothing happens until then; inf before the first key."""
        if self._events:
            return self.time_of(min(events[0].tick for events in self._events.values()) + 1)
        return self.time_of(self.tick + self.vocabulary.longest) if self.begun else math.inf

    def waiting(self, time: float) -> list[int]:
        """The events that it takes until a time, from where all is told; none before the first key. Changes nothing,
        but that without a first key the stream's clock begins at that time.
        """
        self._begin(time)
        return self.vocabulary.waiting(self.tick_of(time) - self.tick) if self.begun else []

    def heard(self, event: int) -> None:
        """The model has played an event, and it was heard."""
        self._tell(event)
        press, release = int(self.grammar.press[event]), int(self.grammar.release[event])
        if press >= 0:
            self.keys[press] = Key(self.tick, Voice.MODEL)
        self.keys.pop(release, None)
