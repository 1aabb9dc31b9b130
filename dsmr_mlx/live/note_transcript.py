"""Turns music into Aria's ids while it is played: each note when its length is known, at most five seconds later."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dsmr_mlx.live.instrument import Voice
from dsmr_mlx.live.transcript import MAX_PAUSE, unplayable
from dsmr_mlx.tokenizers.aria.encoding import TimedMusic, encode_events
from dsmr_mlx.tokenizers.aria.grids import onset_steps
from dsmr_mlx.tokenizers.aria.tokenizer import AriaTokenizer
from dsmr_mlx.tokenizers.aria.vocabulary import DURATIONS, ONSETS, SEGMENT_MS, STEP_MS, TIME_STEP
from dsmr_mlx.tokenizers.event_grammar import Moment

MAX_LENGTH = STEP_MS * (DURATIONS - 1)  # milliseconds; a longer note is written as that long
MAX_WAITING = 4096  # notes and pedal movements
ROUNDING = 1e-6  # milliseconds


class NoteIds:
    """Aria's vocabulary in a session. Raises `UserError` for ids of several instruments."""

    def __init__(self, tokenizer: AriaTokenizer):
        self.tokenizer, self.grammar, self.vocabulary = tokenizer, tokenizer.event_grammar(), tokenizer.vocabulary
        if not self.grammar.plays_keys:
            raise unplayable(tokenizer, "its ids are of several instruments")
        self.may_begin = self.grammar.allowed[:, self.grammar.press >= 0].any(axis=1)  # (Q,), states between events

    def to_ids(self, events: list[int]) -> list[int]:
        """Return the ids of events: every id is one."""
        return list(events)


@dataclass
class LiveNote:
    """A note. time, end: milliseconds; end: None while its key is down."""

    time: int
    pitch: int
    velocity: int
    end: int | None = None

    def is_known(self, now: int) -> bool:
        """Whether its length in ids is known at a time."""
        return self.end is not None or now - self.time >= MAX_LENGTH

    def shift(self, by: int) -> None:
        """Move it in time."""
        self.time += by
        self.end = None if self.end is None else self.end + by

    def cut(self, end: int) -> None:
        """End it at a time, if it has not ended before."""
        self.end = end if self.end is None else min(self.end, end)


@dataclass
class PedalMove:
    """The pedal goes down or up. time: milliseconds; holds: whether it holds a note; if not, it is not written."""

    time: int
    down: bool
    holds: bool = True

    def is_known(self, now: int) -> bool:
        """Whether it is to be written, known at a time."""
        return self.holds

    def shift(self, by: int) -> None:
        """Move it in time."""
        self.time += by


@dataclass
class TimeStep:
    """The beginning of a segment, or another id without sound. time: milliseconds, inf if it belongs to no time."""

    time: float


Item = LiveNote | PedalMove | TimeStep


class NoteTranscript:
    """Turns the human's notes into ids, and follows the notes that the model plays in between.

    Times of methods are seconds of the session's clock, those of notes milliseconds of the stream, which starts with
    the first event; for a player that has played before it starts at `now`. Ids are written in the order of onsets,
    so a note waits for those before it.

    segment: of five seconds, in which the stream is; tick: of the last id that has a time, of 10 ms; started: whether
    its clock runs; written: whether it has ids; answered: whether the model has played; pedal_down: after what waits.
    """

    def __init__(self, event_ids: NoteIds, moment: Moment, now: float):
        self.event_ids, self.grammar, self.vocabulary = event_ids, event_ids.grammar, event_ids.vocabulary
        ended = not self.grammar.allowed[moment.state].any()
        self.started = self.written = self.answered = not ended and moment.state != self.grammar.start
        self.segment, self.tick = 0, moment.phase * self.started
        self.origin = now - self.tick * self.grammar.seconds_per_tick
        self.waiting: list[LiveNote | PedalMove] = []  # in order of time
        self.pedal_down = bool(self.started and self.grammar.pedal[moment.state])

    def tick_of(self, time: float) -> int:
        """Return the tick nearest to a time."""
        return round((time - self.origin) / self.grammar.seconds_per_tick)

    def time_of(self, tick: float) -> float:
        """Return the time of a tick in seconds of the session's clock."""
        return self.origin + tick * self.grammar.seconds_per_tick

    def milliseconds(self, time: float) -> int:
        """Return the time of the stream at a time of the session's clock, rounded down."""
        return math.floor(1000 * (time - self.origin) + ROUNDING)

    def press(self, time: float, pitch: int, velocity: int) -> None:
        """Add a key press of the human at a MIDI velocity. If too many keys wait, all go up first."""
        if len(self.waiting) >= MAX_WAITING:
            self.release_voice(time, Voice.HUMAN)
        self.waiting.append(LiveNote(self._time_of_event(time), pitch, velocity))

    def release(self, time: float, pitch: int) -> None:
        """End the human's notes of a pitch, which the pedal may have held since it was last pressed."""
        self._end(time, [note for note in self._sounding() if note.pitch == pitch])

    def release_voice(self, time: float, voice: Voice) -> None:
        """Release all keys and the pedal, which both voices share: at any time only one of them plays."""
        self._end(time, self._sounding())
        self._lift_pedal(time)

    def cut(self, time: float) -> list[LiveNote]:
        """End all notes at a time and return them. The pedal stays down if it holds notes."""
        notes = self._sounding()
        self._end(time, notes)
        if any(not move.holds for move in self._pedal_moves()):
            self._lift_pedal(time)
        return notes

    def holds(self, voice: Voice, pitch: int) -> bool:
        """Whether the human holds a key whose length is not known."""
        return voice is Voice.HUMAN and any(note.pitch == pitch for note in self._sounding())

    def move_pedal(self, time: float, down: bool, holds: bool) -> None:
        """Follow the human's pedal. holds: whether it holds a note whose key is up."""
        if self.vocabulary.pedal is None:
            return
        if down and not self.pedal_down:
            self.waiting.append(PedalMove(self._time_of_event(time), True, holds=False))
            self.pedal_down = True
        elif not down:
            self._lift_pedal(time)
        for move in self._pedal_moves():
            move.holds |= holds

    def _time_of_event(self, time: float) -> int:
        """Return the time of a new event. The stream starts with the first; longer pauses become `MAX_PAUSE`."""
        if not self.started:
            self.origin, self.started = time, True
        if not self.waiting:
            self.origin += max(time - self.time_of(self.tick) - MAX_PAUSE, 0)
        earliest = self.waiting[-1].time if self.waiting else self.tick * STEP_MS
        return max(self.milliseconds(time), earliest, self.segment * SEGMENT_MS)

    def _sounding(self) -> list[LiveNote]:
        return [item for item in self.waiting if isinstance(item, LiveNote) and item.end is None]

    def _end(self, time: float, notes: Iterable[LiveNote]) -> None:
        for note in notes:
            note.cut(max(self.milliseconds(time), note.time))

    def _pedal_moves(self) -> list[PedalMove]:
        return [item for item in self.waiting if isinstance(item, PedalMove) and item.down]

    def _lift_pedal(self, time: float) -> None:
        if not self.pedal_down:
            return
        self.pedal_down = False
        unused = [move for move in self._pedal_moves() if not move.holds]
        if unused:
            self.waiting = [item for item in self.waiting if item is not unused[0]]
            self._start_at_first_item()
        else:
            self.waiting.append(PedalMove(self._time_of_event(time), False))

    def _start_at_first_item(self) -> None:
        """Make the stream begin with the first item that waits, if it is still empty."""
        if self.written:
            return
        self.started = bool(self.waiting)
        first = self.waiting[0].time if self.waiting else 0
        self.origin += first / 1000
        for item in self.waiting:
            item.shift(-first)

    def flush(self, time: float) -> list[int]:
        """Return the ids of what is known at a time."""
        now = self.milliseconds(time)
        self._postpone_pedal(now)
        known = next((i for i, item in enumerate(self.waiting) if not item.is_known(now)), len(self.waiting))
        return self._write(known)

    def _postpone_pedal(self, now: int) -> None:
        """Let the pedal go down now if it has been down as long as a note can last, and has held none."""
        for move in self._pedal_moves():
            if not move.holds and now - move.time >= MAX_LENGTH:
                move.time = max(now, self.waiting[-1].time)
                self.waiting = [item for item in self.waiting if item is not move] + [move]

    def flush_all(self) -> list[int]:
        """Return the ids of all that waits; every key must be up."""
        return self._write(len(self.waiting))

    def flush_one(self) -> list[int]:
        """Return the ids of the first item that waits."""
        return self._write(1)

    def next_time(self) -> float:
        """Return when `flush` will return ids if no key moves first, inf if nothing waits."""
        first = self.waiting[:1]
        alone = len(self.waiting) == 1 and isinstance(first[0], PedalMove)
        return self.time_of((first[0].time + MAX_LENGTH) / STEP_MS) if first and not alone else math.inf

    def _write(self, n: int) -> list[int]:
        """Return the ids of the first n items that wait, and go past them."""
        self.written |= n > 0
        items, self.waiting = self.waiting[:n], self.waiting[n:]
        start = self.segment * SEGMENT_MS
        for item in items:
            self.go_past(item)
        return encode_events(timed_music(items, start), self.vocabulary).tolist()

    def go_past(self, item: Item) -> None:
        """Move the stream to an item that is in it now."""
        if math.isfinite(item.time):
            self.written = True
            self.segment = max(self.segment, int(item.time) // SEGMENT_MS)
            step = 0 if isinstance(item, TimeStep) else int(onset_steps(np.array(item.time % SEGMENT_MS)))
            self.tick = max(self.tick, self.segment * ONSETS + step)

    def follow(self, item: Item) -> None:
        """Move the stream to an item of the model that is in it now."""
        self.go_past(item)
        self.pedal_down = item.down if isinstance(item, PedalMove) else self.pedal_down

    def steps_until(self, time: float) -> list[int]:
        """Return the time steps to the segment of a time, with nothing left to flush. They are not added."""
        segment = self._time_of_event(time) // SEGMENT_MS
        return [TIME_STEP] * (segment - self.segment)

    def take_back(self, items: Sequence[Item], until: int) -> None:
        """Queue the model's last items again, each cut at `until` milliseconds, up to which they have sounded."""
        for item in items:
            if isinstance(item, LiveNote):
                item.cut(until)
            elif isinstance(item, PedalMove):
                self.pedal_down = item.down
        self.waiting = [item for item in items if not isinstance(item, TimeStep)] + self.waiting


def timed_music(items: Sequence[LiveNote | PedalMove], start: int) -> TimedMusic:
    """Return items as music for the encoding, in milliseconds from `start`."""
    notes = [item for item in items if isinstance(item, LiveNote)]
    moves = [item for item in items if isinstance(item, PedalMove)]

    def column(values: Iterable[int]) -> np.ndarray:
        return np.array([*values], np.int64)

    return TimedMusic(
        onset=column(note.time - start for note in notes),
        duration=column(MAX_LENGTH if note.end is None else note.end - note.time for note in notes),
        pitch=column(note.pitch for note in notes),
        velocity=column(note.velocity for note in notes),
        instrument=np.zeros(len(notes), np.int64),
        pedal_time=column(move.time - start for move in moves),
        pedal_down=np.array([move.down for move in moves], bool),
    )
