"""The model's keys, sent at their times."""

import math
import threading
from collections import deque
from collections.abc import Callable

from mido import Message

from dsmr_mlx.live.instrument import Instrument, Voice, strikes
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.statistics import Statistics

Record = Callable[[Voice, float, Message], None]


class Scheduler:
    """Holds what the model is about to play, in its order, and plays it when the time has come.

    It is served by a clock (`clock.Timed`). A note that is up to `options.latest` late is struck at once, a later one
    not at all, and then its release sends nothing either. `record(voice, time, message)` is told what was sent, and
    the time at which it sounds. `done`: how many messages of the turn are past; `first`: when the first key was struck.
    """

    def __init__(
        self, instrument: Instrument, options: LiveOptions, statistics: Statistics, record: Record = lambda *_: None
    ):
        self.instrument, self.options, self.statistics, self.record = instrument, options, statistics, record
        self.changed = threading.Condition()
        self.done = 0
        self.first: float | None = None
        self._ahead: deque[tuple[float, Message]] = deque()
        self._open = False

    def begin(self) -> None:
        """A turn of the model begins."""
        with self.changed:
            self._ahead.clear()
            self.done, self.first, self._open = 0, None, True

    def add(self, time: float, message: Message) -> None:
        """Have a message sound at a time, not before that of the one before; without effect outside a turn."""
        with self.changed:
            if self._open:
                self._ahead.append((time - self.options.latency, message))
                self.changed.notify_all()

    def withdraw(self, after: float) -> int:
        """Forget what is to sound later than `after`; how many messages of the turn are past, or stay."""
        with self.changed:
            while self._ahead and self._ahead[-1][0] + self.options.latency > after:
                self._ahead.pop()
            return self.done + len(self._ahead)

    def stop(self, now: float) -> None:
        """End the turn: forget what is to come, and release what sounds."""
        with self.changed:
            self._ahead.clear()
            self._open = False
            for message in self.instrument.release(Voice.MODEL):
                self.record(Voice.MODEL, now, message)

    def due(self) -> float:
        """See `clock.Timed`."""
        return self._ahead[0][0] if self._ahead else math.inf

    def act(self, now: float) -> None:
        """See `clock.Timed`."""
        with self.changed:
            while self._ahead and self._ahead[0][0] <= now:
                due, message = self._ahead.popleft()
                self.done += 1
                self._play(message, now, now - due)

    def _play(self, message: Message, now: float, late: float) -> None:
        if strikes(message):
            if late > self.options.latest:
                self.statistics.dropped += 1
                return
            self.first = now if self.first is None else self.first
            self.statistics.lateness.add(late)
        if self.instrument.play(Voice.MODEL, message):
            self.record(Voice.MODEL, now + self.options.latency, message)
