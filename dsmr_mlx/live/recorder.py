"""What sounded, as a MIDI file that is whole at any time: a track for each of the two."""

import contextlib
import math
import os
import threading
from pathlib import Path

from mido import Message

from dsmr_mlx.errors import UserError
from dsmr_mlx.files import write_atomically
from dsmr_mlx.live.instrument import SUSTAIN, note_off, releases, strikes
from dsmr_mlx.live.voice import Voice
from dsmr_mlx.midi import DEFAULT_TEMPO, TPQ
from dsmr_mlx.recording import END_OF_TRACK, TEMPO, variable_length

SECONDS_BETWEEN_SAVES = 1.0
TICKS_PER_SECOND = TPQ * 1_000_000 // DEFAULT_TEMPO
TRACK_NAME = b"\xff\x03"
KEPT = ("note_on", "note_off", "control_change")


class Track:
    """The bytes of one track so far; what still sounds is released in `closed` alone."""

    def __init__(self, name: str, channel: int):
        self.channel = channel
        self.events = bytearray(b"\0" + TRACK_NAME + variable_length(len(name)) + name.encode())
        self.tick = 0
        self.down: set[int] = set()
        self.pedal = False

    def add(self, tick: int, message: Message) -> None:
        """Append a message; the time never goes back."""
        message = message.copy(channel=self.channel)
        if strikes(message):
            if message.note in self.down:
                self._append(tick, note_off(self.channel, message.note))
            self.down.add(message.note)
        elif releases(message):
            if message.note not in self.down:
                return
            self.down.remove(message.note)
        elif message.control == SUSTAIN:
            self.pedal = message.value > 0
        self._append(tick, message)

    def _append(self, tick: int, message: Message) -> None:
        tick = max(tick, self.tick)
        self.events += variable_length(tick - self.tick) + message.bin()
        self.tick = tick

    def closed(self, tick: int) -> bytes:
        """The track as a chunk of a file in which everything is released at a tick."""
        end = bytearray()
        wait = max(tick - self.tick, 0)
        last = [note_off(self.channel, pitch) for pitch in sorted(self.down)]
        if self.pedal:
            last.append(Message("control_change", channel=self.channel, control=SUSTAIN, value=0))
        for message in last:
            end += variable_length(wait) + message.bin()
            wait = 0
        return chunk(b"MTrk", bytes(self.events + end + b"\0" + END_OF_TRACK))


class Recorder:
    """Keeps what both voices play, and writes it again and again, each time a whole file that replaces the last.

    Notes and controllers are kept, the human's on channel 1, the model's on channel 2; 1 tick is 1 ms, and time begins
    with the first message. It is served by a clock (`clock.Timed`); any thread may add. Raises `UserError` at once if
    the file cannot be written, and in `close` if it could not be in the end: in between the music goes on.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.changed = threading.Condition()
        self._tracks = {voice: Track(voice.value, channel) for channel, voice in enumerate(Voice)}
        self._start: float | None = None
        self._due = math.inf
        self._now = 0.0
        self.save()

    def add(self, voice: Voice, time: float, message: Message) -> None:
        """Keep a message that sounds at a time, seconds of the session's clock."""
        if message.type not in KEPT:
            return
        with self.changed:
            self._start = time if self._start is None else self._start
            self._tracks[voice].add(self._tick(time), message)
            self._now = max(self._now, time)
            if self._due == math.inf:
                self._due = time + SECONDS_BETWEEN_SAVES
                self.changed.notify_all()

    def _tick(self, time: float) -> int:
        return 0 if self._start is None else max(round((time - self._start) * TICKS_PER_SECOND), 0)

    def due(self) -> float:
        """See `clock.Timed`."""
        return self._due

    def act(self, now: float) -> None:
        """See `clock.Timed`."""
        if now >= self._due:
            self._now = max(self._now, now)
            self._due = math.inf
            with contextlib.suppress(UserError):
                self.save()

    def save(self) -> None:
        """Write the file. Raises `UserError` if that cannot be done."""
        with self.changed:
            tracks = [track.closed(self._tick(self._now)) for track in self._tracks.values()]
        tempo = b"\0" + TEMPO + b"\0" + END_OF_TRACK
        counts = (1, 1 + len(tracks), TPQ)
        header = chunk(b"MThd", b"".join(number.to_bytes(2) for number in counts))
        try:
            write_atomically(self.path, b"".join([header, chunk(b"MTrk", tempo), *tracks]))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from None

    def close(self) -> None:
        """Write the file a last time."""
        self._due = math.inf
        self.save()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a standard MIDI file."""
    return kind + len(data).to_bytes(4) + data
