"""Sends the model's messages at their times."""

import math
import threading
from collections import deque
from collections.abc import Callable

from mido import Message

from dsmr_mlx.live.instrument import Instrument, Voice, is_note_on
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.statistics import Statistics

Record = Callable[[Voice, float, Message], None]


class Scheduler:
    """A `clock.TimedTask` with a queue of the model's messages. Thread-safe.

    A note up to `options.max_late` seconds late is sent at once; a later one is dropped together with its note-off.
    `record(voice, time, message)` is called for each message sent, with the time at which it sounds. Of the turn: done:
    number of messages that have left the queue; dropped: number of notes; first: time of the first note-on, None before
    it.
    """

    def __init__(self, instrument: Instrument, options: LiveOptions, statistics: Statistics, record: Record):
        self.instrument, self.options, self.statistics, self.record = instrument, options, statistics, record
        self.changed = threading.Condition()
        self.done = self.dropped = 0
        self.first: float | None = None
        self._queue: deque[tuple[float, Message]] = deque()  # (time to send, message)
        self._open = False

    def begin(self) -> None:
        """Begin a turn of the model."""
        with self.changed:
            self._queue.clear()
            self.done, self.dropped, self.first, self._open = 0, 0, None, True

    def add(self, time: float, message: Message) -> None:
        """Queue a message that sounds at a time, not before the last one. Ignored outside a turn."""
        with self.changed:
            if self._open:
                self._queue.append((time - self.options.latency, message))
                self.changed.notify_all()

    def cancel(self, after: float) -> int:
        """Drop the messages that sound later than `after`. Return how many of the turn were not dropped."""
        with self.changed:
            while self._queue and self._queue[-1][0] + self.options.latency > after:
                self._queue.pop()
            return self.done + len(self._queue)

    def stop(self, now: float) -> None:
        """End the turn: drop the queue and release the model's keys."""
        with self.changed:
            self._queue.clear()
            self._open = False
            self.release(now)

    def release(self, now: float) -> None:
        """Release the model's keys."""
        with self.changed:
            for message in self.instrument.release(Voice.MODEL):
                self.record(Voice.MODEL, now + self.options.latency, message)

    def due(self) -> float:
        """See `clock.TimedTask`."""
        return self._queue[0][0] if self._queue else math.inf

    def act(self, now: float) -> None:
        """See `clock.TimedTask`."""
        with self.changed:
            while self._queue and self._queue[0][0] <= now:
                due, message = self._queue.popleft()
                self.done += 1
                self._send(message, now, now - due)

    def _send(self, message: Message, now: float, late: float) -> None:
        if is_note_on(message):
            if late > self.options.max_late:
                self.dropped += 1
                self.statistics.dropped += 1
                return
            self.first = now if self.first is None else self.first
            self.statistics.lateness.add(late)
        if self.instrument.play(Voice.MODEL, message):
            self.record(Voice.MODEL, now + self.options.latency, message)
