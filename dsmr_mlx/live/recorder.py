"""Records a session into a MIDI file that is valid at any time, with one track for each voice."""

import contextlib
import math
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from mido import Message

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import write_atomically
from dsmr_mlx.live.instrument import Voice, is_note_off, is_note_on, note_off, pedal_up
from dsmr_mlx.music.channel_messages import ALL_SOUND_OFF, RELEASES_KEYS, RESET_CONTROLLERS, SUSTAIN
from dsmr_mlx.music.growing_midi import END_OF_TRACK, TEMPO, chunk, file_header, variable_length
from dsmr_mlx.music.midi import CORPUS_LIMITS, TPQ
from dsmr_mlx.music.midi_clock import DEFAULT_TEMPO

SAVE_INTERVAL = 1.0  # seconds, at least
BYTES_PER_SECOND = 1 << 20  # that rewriting the file may take on average
MAX_BYTES = 16 << 20  # of a file; hours of music have a few
MAX_SECONDS = CORPUS_LIMITS.seconds - 60.0  # of a file, so that a corpus takes it even with its last notes
TICKS_PER_SECOND = TPQ * 1_000_000 // DEFAULT_TEMPO
TRACK_NAME = b"\xff\x03"
RECORDED = ("note_on", "note_off", "control_change")  # types of messages
CHANNELS = {Voice.HUMAN: (0, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15), Voice.MODEL: (1,)}


class Track:
    """The bytes of one track so far. Only `closed` releases what still sounds.

    channels: those of the track in the file. Each channel of the player gets one, in order of first use; if there are
    more than these, they share the last one. Unlike that of `GrowingMidi`, the file is rewritten, not extended in
    place: it has two growing tracks. Within 4 hours no wait is too long for one event.
    """

    def __init__(self, name: str, channels: Iterable[int]):
        self.events = bytearray(b"\0" + TRACK_NAME + variable_length(len(name)) + name.encode())
        self.tick = 0
        self.down: set[tuple[int, int]] = set()  # (channel, pitch)
        self.pedals: dict[int, int] = {}  # channels and values
        self._free = list(channels)
        self._channels: dict[int, int] = {}

    def add(self, tick: int, message: Message) -> None:
        """Append a message, not before the last one."""
        message = message.copy(channel=self._channel(message.channel))
        if is_note_on(message):
            self._release(tick, {(message.channel, message.note)})
            self.down.add((message.channel, message.note))
        elif is_note_off(message):
            if (message.channel, message.note) not in self.down:
                return
            self.down.remove((message.channel, message.note))
        else:
            self._control(tick, message)
        self._append(tick, message)
        if message.is_cc(ALL_SOUND_OFF) and message.channel in self.pedals:  # the pedal itself is still down
            self._append(tick + 1, pedal_up(message.channel).copy(value=self.pedals[message.channel]))

    def release(self, tick: int, pitch: int) -> None:
        """Release a pitch on all channels."""
        self._release(tick, {key for key in self.down if key[1] == pitch})

    def _channel(self, channel: int) -> int:
        if channel not in self._channels:
            self._channels[channel] = self._free.pop(0) if len(self._free) > 1 else self._free[0]
        return self._channels[channel]

    def _control(self, tick: int, message: Message) -> None:
        """Write out what a controller does to keys and pedal, for readers that do not know the controller."""
        channel = message.channel
        if message.control in RELEASES_KEYS:
            self._release(tick, {key for key in self.down if key[0] == channel})
        if message.control in (ALL_SOUND_OFF, RESET_CONTROLLERS) and channel in self.pedals:
            self._append(tick, pedal_up(channel))
        if message.control == SUSTAIN and message.value > 0:
            self.pedals[channel] = message.value
        elif message.control in (SUSTAIN, RESET_CONTROLLERS):
            self.pedals.pop(channel, None)

    def _release(self, tick: int, keys: set[tuple[int, int]]) -> None:
        for key in sorted(keys & self.down):
            self.down.remove(key)
            self._append(tick, note_off(*key))

    def _append(self, tick: int, message: Message) -> None:
        tick = max(tick, self.tick)
        self.events += variable_length(tick - self.tick) + message.bin()
        self.tick = tick

    def closed(self, tick: int) -> bytes:
        """Return the track chunk in which everything is released at a tick."""
        end = bytearray()
        wait = max(tick - self.tick, 0)
        last = [note_off(*key) for key in sorted(self.down)] + [pedal_up(channel) for channel in sorted(self.pedals)]
        for message in last:
            end += variable_length(wait) + message.bin()
            wait = 0
        return chunk(b"MTrk", bytes(self.events + end + b"\0" + END_OF_TRACK))


class RecordedFile:
    """The music of one file. start: time of its first message in seconds, None before that; now: its end so far."""

    def __init__(self, path: Path):
        self.path = path
        self.start: float | None = None
        self.now = 0.0
        self.tracks = {voice: Track(voice.value, CHANNELS[voice]) for voice in Voice}

    def add(self, voice: Voice, time: float, message: Message) -> None:
        """See `Recorder.add`."""
        self.start = time if self.start is None else self.start
        self.now = max(self.now, time)
        if is_note_on(message):  # the voices share one keyboard: the last to press a key has it
            for other in self.tracks.keys() - {voice}:
                self.tracks[other].release(self._tick(time), message.note)
        self.tracks[voice].add(self._tick(time), message)

    def is_full(self, time: float) -> bool:
        """Whether a message at this time belongs to the next file."""
        late = self.start is not None and time - self.start > MAX_SECONDS
        return late or self.size > MAX_BYTES

    @property
    def size(self) -> int:
        """The bytes of its events."""
        return sum(len(track.events) for track in self.tracks.values())

    def to_bytes(self) -> bytes:
        """Return the whole file, with everything released at `now`."""
        tempo = chunk(b"MTrk", b"\0" + TEMPO + b"\0" + END_OF_TRACK)
        tracks = [tempo, *(track.closed(self._tick(self.now)) for track in self.tracks.values())]
        return b"".join([file_header(1, len(tracks)), *tracks])

    def _tick(self, time: float) -> int:
        return 0 if self.start is None else max(round((time - self.start) * TICKS_PER_SECOND), 0)


class Recorder:
    """Records both voices. A `clock.TimedTask` that rewrites the whole file if it has grown. Thread-safe.

    A file is rewritten every second, a large one less often. Notes and controllers are recorded, 1 tick = 1 ms, from
    the first message on: the human's on channel 1 (if several channels are played, the others follow), the model's on
    channel 2. After 4 hours, the limit for a piece in a corpus, or 16 MiB, a new file NAME-2.mid, NAME-3.mid … begins;
    existing files are not replaced. paths: all files. Raises `UserError` at once if the file cannot be written, and in
    `close` if the last write fails; failures in between are ignored.
    """

    def __init__(self, path: str | os.PathLike):
        self.paths = [Path(path)]
        self.changed = threading.Condition()
        self._unsaved = [RecordedFile(self.paths[0])]  # files with unsaved music; the last one still grows
        self._due = math.inf
        self.save()

    def add(self, voice: Voice, time: float, message: Message) -> None:
        """Record a message that sounds at a time in seconds of the session's clock."""
        if message.type not in RECORDED:
            return
        with self.changed:
            if self._unsaved[-1].is_full(time):
                self.paths.append(self._next_path())
                self._unsaved.append(RecordedFile(self.paths[-1]))
            self._unsaved[-1].add(voice, time, message)
            if self._due == math.inf:
                self._due = time + max(SAVE_INTERVAL, self._unsaved[-1].size / BYTES_PER_SECOND)
                self.changed.notify_all()

    def _next_path(self) -> Path:
        first, number = self.paths[0], len(self.paths) + 1
        while True:
            path = first.with_stem(f"{first.stem}-{number}")
            try:
                path.open("xb").close()
            except FileExistsError:
                number += 1
                continue
            except OSError:  # `save` will report it
                pass
            return path

    def due(self) -> float:
        """See `clock.TimedTask`."""
        return self._due

    def act(self, now: float) -> None:
        """See `clock.TimedTask`."""
        if now >= self._due:
            self._unsaved[-1].now = max(self._unsaved[-1].now, now)
            self._due = math.inf
            with contextlib.suppress(UserError):
                self.save()

    def save(self) -> None:
        """Write all files with unsaved music. Raises `UserError` if one cannot be written."""
        with self.changed:
            files = [(file, file.to_bytes()) for file in self._unsaved]
        for file, data in files:
            try:
                write_atomically(file.path, data)
            except OSError as error:
                raise UserError(f"{file.path}: cannot be written ({error.strerror or error})") from None
        complete = [file for file, _ in files[:-1]]
        with self.changed:
            self._unsaved = [file for file in self._unsaved if file not in complete]

    def close(self, now: float | None = None) -> None:
        """Save a last time, with what still sounds until `now`. Raises `UserError` if a file cannot be written."""
        with self.changed:
            self._due = math.inf
            self._unsaved[-1].now = max(self._unsaved[-1].now, now or 0.0)
        self.save()
