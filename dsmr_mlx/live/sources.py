"""Inputs that are not MIDI ports: a file that is played in time, and the Enter key."""

import contextlib
import math
import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

from mido import Message

from dsmr_mlx.live.hands import Hands
from dsmr_mlx.live.ports import Listener
from dsmr_mlx.music.performance_messages import read_performance


class TimedMessage(NamedTuple):
    """A message and its time in seconds after the first note."""

    time: float
    message: Message


def read_messages(path: str | os.PathLike) -> list[TimedMessage]:
    """Read the messages of a MIDI file from its first note on; they play the notes that `midi.read_notes` reads.

    Raises `UserError` like `midi.read_notes`.
    """
    return [TimedMessage(time, Message.from_bytes(data)) for time, data in read_performance(path)]


class FilePlayer:
    """A `clock.TimedTask` that sends messages at their times, then releases all keys and pedals and finishes."""

    is_input = True

    def __init__(self, messages: Sequence[TimedMessage], name: str = "file"):
        self.name = name
        self.changed = threading.Condition()
        hands, self._end = Hands(), messages[-1].time if messages else 0.0
        for _, message in messages:
            hands.update(message)
        self._messages = [*messages, *(TimedMessage(self._end, message) for message in hands.release_messages())]
        self._next, self._start = 0, math.inf
        self._listener: Listener | None = None

    def start(self, listener: Listener) -> None:
        """Begin to play now."""
        self._listener, self._start = listener, listener.clock.now()
        listener.clock.schedule(self)

    def due(self) -> float:
        """See `clock.TimedTask`."""
        if self._next > len(self._messages):
            return math.inf
        return self._start + (self._messages[self._next].time if self._next < len(self._messages) else self._end)

    def act(self, now: float) -> None:
        """See `clock.TimedTask`."""
        while self.due() <= now:
            self._next += 1
            if self._next <= len(self._messages):
                self._listener.receive(self._messages[self._next - 1].message)
            else:
                self._listener.finish()


class EnterKey:
    """Passes the turn with each line of standard input until it ends."""

    is_input = True

    def __init__(self, descriptor: int = 0):
        self._descriptor = descriptor

    def start(self, listener: Listener) -> None:
        """Read lines in a daemon thread."""
        threading.Thread(target=self._read, args=(listener,), daemon=True).start()

    def _read(self, listener: Listener) -> None:
        # Not `sys.stdin`: the interpreter aborts at exit if a thread is blocked in it.
        with contextlib.suppress(OSError):  # the terminal is gone
            while data := os.read(self._descriptor, 1024):
                for _ in range(data.count(b"\n")):
                    listener.pass_turn()
        listener.finish()
