"""What sounded, as a MIDI file that is whole at any time: a track for each of the two."""

import contextlib
import math
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from mido import Message

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import write_atomically
from dsmr_mlx.live.instrument import KEYS_ARE_UP, PEDAL_IS_UP, SUSTAIN, Voice, note_off, releases, strikes
from dsmr_mlx.music.growing_midi import END_OF_TRACK, TEMPO, variable_length
from dsmr_mlx.music.midi import DEFAULT_TEMPO, PIECE, TPQ

SECONDS_BETWEEN_SAVES = 1.0
LONGEST = PIECE.seconds - 60.0  # of a file: with all that rings on it can still be learned from
TICKS_PER_SECOND = TPQ * 1_000_000 // DEFAULT_TEMPO
TRACK_NAME = b"\xff\x03"
KEPT = ("note_on", "note_off", "control_change")
CHANNELS = {Voice.HUMAN: (0, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15), Voice.MODEL: (1,)}


class Track:
    """The bytes of one track so far; what still sounds is released in `closed` alone.

    channels: those that the track has in the file; the player's get one each, in the order in which they are used, and
    share the last one if there are more.
    """

    def __init__(self, name: str, channels: Iterable[int]):
        self.events = bytearray(b"\0" + TRACK_NAME + variable_length(len(name)) + name.encode())
        self.tick = 0
        self.down: set[tuple[int, int]] = set()  # (channel, pitch)
        self.pedals: set[int] = set()  # channels
        self._free = list(channels)
        self._channels: dict[int, int] = {}

    def add(self, tick: int, message: Message) -> None:
        """Append a message; the time never goes back."""
        message = message.copy(channel=self._channel(tick, message.channel))
        if strikes(message):
            self._release(tick, {(message.channel, message.note)})
            self.down.add((message.channel, message.note))
        elif releases(message):
            if (message.channel, message.note) not in self.down:
                return
            self.down.remove((message.channel, message.note))
        else:
            self._control(tick, message)
        self._append(tick, message)

    def release(self, tick: int, pitch: int) -> None:
        """A key goes up, on whatever channels it is down."""
        self._release(tick, {key for key in self.down if key[1] == pitch})

    def _channel(self, tick: int, channel: int) -> int:
        if channel not in self._channels:
            self._channels[channel] = found = self._free.pop(0) if len(self._free) > 1 else self._free[0]
            # Readers apply one hand's pedal to another track that has none: each has its own.
            self._append(tick, pedal_up(found))
        return self._channels[channel]

    def _control(self, tick: int, message: Message) -> None:
        """What a controller means for keys and pedal, for readers that do not know it."""
        channel = message.channel
        if message.control in KEYS_ARE_UP:
            self._release(tick, {key for key in self.down if key[0] == channel})
        if message.control in PEDAL_IS_UP and channel in self.pedals:
            self._append(tick, pedal_up(channel))
        if message.control == SUSTAIN and message.value > 0:
            self.pedals.add(channel)
        elif message.control in (SUSTAIN, *PEDAL_IS_UP):
            self.pedals.discard(channel)

    def _release(self, tick: int, keys: set[tuple[int, int]]) -> None:
        for key in sorted(keys & self.down):
            self.down.remove(key)
            self._append(tick, note_off(*key))

    def _append(self, tick: int, message: Message) -> None:
        tick = max(tick, self.tick)
        self.events += variable_length(tick - self.tick) + message.bin()
        self.tick = tick

    def closed(self, tick: int) -> bytes:
        """The track as a chunk of a file in which everything is released at a tick."""
        end = bytearray()
        wait = max(tick - self.tick, 0)
        last = [note_off(*key) for key in sorted(self.down)] + [pedal_up(channel) for channel in sorted(self.pedals)]
        for message in last:
            end += variable_length(wait) + message.bin()
            wait = 0
        return chunk(b"MTrk", bytes(self.events + end + b"\0" + END_OF_TRACK))


class Part:
    """The music of one file. start: when it begins, None before the first message; now: how far it goes by now."""

    def __init__(self, path: Path):
        self.path = path
        self.start: float | None = None
        self.now = 0.0
        self.tracks = {voice: Track(voice.value, CHANNELS[voice]) for voice in Voice}

    def add(self, voice: Voice, time: float, message: Message) -> None:
        """See `Recorder`."""
        self.start = time if self.start is None else self.start
        self.now = max(self.now, time)
        if strikes(message):  # they share one keyboard: whoever strikes a key has it
            for other in self.tracks.keys() - {voice}:
                self.tracks[other].release(self._tick(time), message.note)
        self.tracks[voice].add(self._tick(time), message)

    def is_full(self, time: float) -> bool:
        """Whether a message at this time is for another file."""
        return self.start is not None and time - self.start > LONGEST

    def to_bytes(self) -> bytes:
        """The whole file, in which all ends now."""
        tempo = chunk(b"MTrk", b"\0" + TEMPO + b"\0" + END_OF_TRACK)
        tracks = [tempo, *(track.closed(self._tick(self.now)) for track in self.tracks.values())]
        header = b"".join(number.to_bytes(2) for number in (1, len(tracks), TPQ))
        return b"".join([chunk(b"MThd", header), *tracks])

    def _tick(self, time: float) -> int:
        return 0 if self.start is None else max(round((time - self.start) * TICKS_PER_SECOND), 0)


class Recorder:
    """Keeps what both voices play, and writes it again and again, each time a whole file that replaces the last.

    Notes and controllers are kept, the human's on channel 1, other channels of theirs on others, the model's on channel
    2; 1 tick is 1 ms, and time begins with the first message. After 4 hours, the most that a piece may last in a
    corpus, a new file begins, NAME-2.mid and so on, which replaces none. `paths`: all files. It is served by a clock
    (`clock.Timed`); any thread may add. Raises `UserError` at once if the file cannot be written, and in `close` if it
    could not be in the end: in between the music goes on.
    """

    def __init__(self, path: str | os.PathLike):
        self.paths = [Path(path)]
        self.changed = threading.Condition()
        self._parts = [Part(self.paths[0])]  # that are not yet in their files, or not all of it
        self._due = math.inf
        self.save()

    def add(self, voice: Voice, time: float, message: Message) -> None:
        """Keep a message that sounds at a time, seconds of the session's clock."""
        if message.type not in KEPT:
            return
        with self.changed:
            if self._parts[-1].is_full(time):
                self.paths.append(self._next_path())
                self._parts.append(Part(self.paths[-1]))
            self._parts[-1].add(voice, time, message)
            if self._due == math.inf:
                self._due = time + SECONDS_BETWEEN_SAVES
                self.changed.notify_all()

    def _next_path(self) -> Path:
        first, number = self.paths[0], len(self.paths) + 1
        while (path := first.with_stem(f"{first.stem}-{number}")).exists():
            number += 1
        return path

    def due(self) -> float:
        """See `clock.Timed`."""
        return self._due

    def act(self, now: float) -> None:
        """See `clock.Timed`."""
        if now >= self._due:
            self._parts[-1].now = max(self._parts[-1].now, now)
            self._due = math.inf
            with contextlib.suppress(UserError):
                self.save()

    def save(self) -> None:
        """Write all that is not in its file yet. Raises `UserError` if that cannot be done."""
        with self.changed:
            files = [(part, part.to_bytes()) for part in self._parts]
        for part, data in files:
            try:
                write_atomically(part.path, data)
            except OSError as error:
                raise UserError(f"{part.path}: cannot be written ({error.strerror or error})") from None
        complete = [part for part, _ in files[:-1]]
        with self.changed:
            self._parts = [part for part in self._parts if part not in complete]

    def close(self) -> None:
        """Write the file a last time."""
        self._due = math.inf
        self.save()


def pedal_up(channel: int) -> Message:
    """The message that releases the sustain pedal."""
    return Message("control_change", channel=channel, control=SUSTAIN, value=0)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a standard MIDI file."""
    return kind + len(data).to_bytes(4) + data
