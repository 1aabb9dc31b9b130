"""Sources of music and of signals that are no MIDI port: a file that plays as a person would, and the Enter key."""

import contextlib
import io
import math
import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

import mido
from mido import Message

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.hands import Hands
from dsmr_mlx.live.instrument import strikes
from dsmr_mlx.live.ports import Listener
from dsmr_mlx.music.midi import read_bytes, read_notes


class TimedMessage(NamedTuple):
    """A message, and when it comes: seconds after the first note."""

    time: float
    message: Message


def read_messages(path: str | os.PathLike) -> list[TimedMessage]:
    """What somebody who plays a MIDI file sends, from its first note on. Raises `UserError` as `midi.read_notes`."""
    read_notes(path)
    try:
        file = mido.MidiFile(file=io.BytesIO(read_bytes(path)), clip=True)
        now, messages = 0.0, []
        for message in file:
            now += message.time
            if not message.is_meta:
                messages.append((now, message.copy(time=0)))
    except Exception as error:  # what mido raises for bad bytes is of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be played ({reason})") from error
    start = next(time for time, message in messages if strikes(message))
    return [TimedMessage(max(time - start, 0.0), message) for time, message in messages]


class FilePlayer:
    """Messages that come in at their times; in the end the hands go up. It is served by a clock (`clock.Timed`)."""

    plays = True

    def __init__(self, messages: Sequence[TimedMessage], name: str = "file"):
        self.name = name
        self.changed = threading.Condition()
        hands, end = Hands(), messages[-1].time if messages else 0.0
        for _, message in messages:
            hands.take(message)
        self._messages = [*messages, *(TimedMessage(end, message) for message in hands.lifting())]
        self._next, self._start = 0, math.inf
        self._listener: Listener | None = None

    def start(self, listener: Listener) -> None:
        """Begin to play now, to a listener."""
        self._listener, self._start = listener, listener.clock.now()
        listener.clock.serve(self)

    def due(self) -> float:
        """See `clock.Timed`."""
        if self._next > len(self._messages):
            return math.inf
        last = self._messages[-1].time if self._messages else 0.0
        return self._start + (self._messages[self._next].time if self._next < len(self._messages) else last)

    def act(self, now: float) -> None:
        """See `clock.Timed`."""
        while self.due() <= now:
            self._next += 1
            if self._next <= len(self._messages):
                self._listener.receive(self._messages[self._next - 1].message)
            else:
                self._listener.finish()

    def close(self) -> None:
        """There is nothing to let go of."""


class EnterKey:
    """Passes the turn with each line of standard input, until that ends."""

    plays = True

    def __init__(self, descriptor: int = 0):
        self._descriptor = descriptor

    def start(self, listener: Listener) -> None:
        """Begin to read, in a thread that does not keep the program from ending."""
        threading.Thread(target=self._read, args=(listener,), daemon=True).start()

    def _read(self, listener: Listener) -> None:
        # Not through `sys.stdin`: a thread that waits in there makes the interpreter abort when it ends.
        with contextlib.suppress(OSError):  # the terminal is gone
            while data := os.read(self._descriptor, 1024):
                for _ in range(data.count(b"\n")):
                    listener.pass_turn()
        listener.finish()
