"""Turns music into events while it is played: the same stream that `performance.encode_notes` returns for the whole."""

import math
from typing import NamedTuple

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.instrument import Voice
from dsmr_mlx.music.notes import PITCHES
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.performance import VELOCITY_BINS, velocity_bins

MAX_PAUSE = 10.0  # seconds of silence in the stream; longer pauses are shortened to it
MAX_AHEAD = 100  # ticks that the events of a key may lie ahead of the clock


class EventIds:
    """Lookup from the meaning of an event to the event, and between events and token ids.

    grammar: the tokenizer's event grammar; press, release: the event of each pitch; velocity: the event of each
    velocity bin; wait: the event of each number of ticks from 1 to max_ticks; may_wait: `(Q,)` bool, grammar states in
    which time may pass. Raises `UserError` for a vocabulary without live support.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.grammar = tokenizer, tokenizer.event_grammar()
        grammar = self.grammar
        if grammar is None or not grammar.plays_keys:
            raise unplayable(tokenizer, "its tokens are not key events")
        if not grammar.held:
            raise unplayable(tokenizer, "a note has a length, unknown while its key is down")
        self.max_ticks = int(grammar.ticks.max())
        self.press = find_events(grammar.press, range(PITCHES))
        self.release = find_events(grammar.release, range(PITCHES))
        self.velocity = find_events(grammar.velocity, range(VELOCITY_BINS))
        self.wait = [-1, *find_events(grammar.ticks, range(1, self.max_ticks + 1))]
        needed = (*self.press, *self.release, *self.velocity, *self.wait[1:])
        if not self.max_ticks or -1 in needed or not grammar.running_velocity:
            raise unplayable(tokenizer, "some keys, velocities or pauses have no separate token")
        self.may_wait = grammar.allowed[:, self.wait[1]]
        self._special = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]

    def to_ids(self, events: list[int]) -> list[int]:
        """Return the token ids of events."""
        ids = self.tokenizer.from_events(np.array(events, np.int64))
        return ids[~np.isin(ids, self._special)].tolist()

    def to_events(self, token: int) -> list[int]:
        """Return the events of a token id."""
        return self.tokenizer.to_events([token]).tolist()

    def waits(self, ticks: int) -> list[int]:
        """Return the events of a pause: as many full waits as fit, then the rest."""
        full, rest = divmod(max(ticks, 0), self.max_ticks)
        return [self.wait[self.max_ticks]] * full + [self.wait[rest]] * (rest > 0)


def find_events(table: np.ndarray, values: range) -> list[int]:
    """Return the event that has each value in a table `(E,)`, −1 if none has."""
    events = {int(value): i for i, value in enumerate(table)}
    return [events.get(value, -1) for value in values]


def unplayable(tokenizer: Tokenizer, reason: str) -> UserError:
    """Return the error for a vocabulary without live support."""
    return UserError(f"tokenizer {tokenizer.label}: {reason}; a live session needs 'performance' or 'aria'")


class Key(NamedTuple):
    """A key that is down in the stream: the tick of its press, and who pressed it."""

    pressed: int
    voice: Voice


class Event(NamedTuple):
    """A key event that is not flushed yet. Events sort in canonical order."""

    tick: int
    is_press: bool
    pitch: int
    velocity_bin: int


class Transcript:
    """Turns the human's keys into events, and follows the events that the model plays in between.

    Times are seconds of the session's clock, rounded to ticks. The events of a tick are flushed when it is over, in
    the canonical order. The stream's clock starts with the first key; for a player that has played before (`state`,
    `velocity`, `held` keys), it starts at `start`. An event that is too late for its tick, or that would release a key
    in the tick of its press, moves to the next possible tick.
    """

    def __init__(self, event_ids: EventIds, state: int | None = None, velocity: int = -1, held=(), start: float = 0.0):
        self.event_ids, self.grammar = event_ids, event_ids.grammar
        self.ticks_per_second = round(1 / self.grammar.seconds_per_tick)
        ended = state is None or not self.grammar.allowed[state].any()
        self.state = self.grammar.start if ended else state
        self.velocity = velocity  # current bin, −1 before the first
        self.origin, self.tick = start, 0  # time of tick 0, tick of the last flushed event
        self.keys = {pitch: Key(-1, Voice.MODEL) for pitch in held}  # as after the unflushed events
        self._unflushed: dict[int, list[Event]] = {}  # by pitch, each list in order
        self._silent_ticks = 0  # since the last key event

    @property
    def started(self) -> bool:
        """Whether there has been a key, so that time counts."""
        return self.state != self.grammar.start or bool(self._unflushed)

    def tick_of(self, time: float) -> int:
        """Return the tick nearest to a time."""
        return int(np.rint((time - self.origin) * self.ticks_per_second))

    def time_of(self, tick: float) -> float:
        """Return the time of a tick in seconds of the session's clock."""
        return self.origin + tick / self.ticks_per_second

    def press(self, time: float, pitch: int, velocity: int) -> None:
        """Add a key press of the human at a MIDI velocity. It is left out if too many of this key wait already."""
        self._start(time)
        tick = max(self.tick_of(time), self.tick)
        pending = self._unflushed.get(pitch)
        if pending and pending[-1].tick > tick + MAX_AHEAD:
            return  # pressed more often than ticks can represent: the waiting events would pile up
        velocity_bin = int(velocity_bins(np.array(velocity)))
        events = self._unflushed.setdefault(pitch, [])
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
        """Add a key release of the human. Ignored if the key is up or the model's."""
        if self.holds(Voice.HUMAN, pitch):
            self._release(self.tick_of(time), pitch)

    def release_voice(self, time: float, voice: Voice) -> None:
        """Release all keys of a voice."""
        for pitch in [pitch for pitch in self.keys if self.holds(voice, pitch)]:
            self._release(self.tick_of(time), pitch)

    def move_pedal(self, time: float, down: bool, holds: bool) -> None:
        """Do nothing: in this vocabulary keys that the pedal holds are down."""

    def holds(self, voice: Voice, pitch: int) -> bool:
        """Whether a key is down and the voice has pressed it."""
        return pitch in self.keys and self.keys[pitch].voice is voice

    def _start(self, time: float) -> None:
        if not self.started:
            self.origin, self.tick = time, 0

    def _release(self, tick: int, pitch: int) -> int:
        """Release a key that is down at the first possible tick from `tick` on. Return that tick."""
        may_release = self.grammar.allowed[self.state, self.event_ids.release[pitch]]
        earliest = max(self.tick + (not may_release), self.keys.pop(pitch).pressed + 1)
        tick = max(tick, earliest)
        self._unflushed.setdefault(pitch, []).append(Event(tick, False, pitch, 0))
        return tick

    def flush(self, time: float) -> list[int]:
        """Return the events of all ticks that are over at a time, and the full waits since then."""
        flushed, now, full = self.flush_all(self.tick_of(time) - 1), self.tick_of(time), self.event_ids.max_ticks
        while self.started and not self._unflushed and now - self.tick >= full:
            if self._silent_ticks < MAX_PAUSE * self.ticks_per_second:
                flushed += self._advance(self.event_ids.wait[full])
            else:  # leave the wait out: shift the stream's clock instead
                self.origin += full / self.ticks_per_second
                now -= full
        return flushed

    def flush_all(self, until: int | None = None) -> list[int]:
        """Return all events, or those up to a tick."""
        until = math.inf if until is None else until
        due = sorted(e for events in self._unflushed.values() for e in events if e.tick <= until)
        left = {pitch: [e for e in events if e.tick > until] for pitch, events in self._unflushed.items()}
        self._unflushed = {pitch: events for pitch, events in left.items() if events}
        return [flushed for event in due for flushed in self._encode(event)]

    def _encode(self, event: Event) -> list[int]:
        ids = self.event_ids
        encoded = [e for wait in ids.waits(event.tick - self.tick) for e in self._advance(wait)]
        if not event.is_press:
            return encoded + self._advance(ids.release[event.pitch])
        if event.velocity_bin != self.velocity or not self.grammar.allowed[self.state, ids.press[event.pitch]]:
            encoded += self._advance(ids.velocity[event.velocity_bin])
        return encoded + self._advance(ids.press[event.pitch])

    def _advance(self, event: int) -> list[int]:
        """Move state, tick and velocity past an event. Return it as a list."""
        g = self.grammar
        self.state = int(g.next_state[self.state, event])
        self.tick += int(g.ticks[event])
        moves_key = g.press[event] >= 0 or g.release[event] >= 0
        self._silent_ticks = 0 if moves_key else self._silent_ticks + int(g.ticks[event])
        if g.velocity[event] >= 0:
            self.velocity = int(g.velocity[event])
        return [event]

    def next_time(self) -> float:
        """Return when `flush` will return events if no key moves first; inf before the first key."""
        if self._unflushed:
            return self.time_of(min(events[0].tick for events in self._unflushed.values()) + 1)
        return self.time_of(self.tick + self.event_ids.max_ticks) if self.started else math.inf

    def waits_until(self, time: float) -> list[int]:
        """Return the waits from the last flushed event, with nothing left to flush, until a time.

        They are not added. Before the first key there are none, and the stream's clock starts at that time.
        """
        self._start(time)
        return self.event_ids.waits(self.tick_of(time) - self.tick) if self.started else []

    def add_model_event(self, event: int) -> None:
        """Add an event of the model that has sounded."""
        self._advance(event)
        press, release = int(self.grammar.press[event]), int(self.grammar.release[event])
        if press >= 0:
            self.keys[press] = Key(self.tick, Voice.MODEL)
        self.keys.pop(release, None)
