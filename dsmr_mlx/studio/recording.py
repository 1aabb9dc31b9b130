"""What is played becomes a take while it is played."""

import math
import threading
from collections.abc import Callable
from typing import Any

from mido import Message

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.hands import Hands
from dsmr_mlx.live.instrument import Voice, is_note_off, is_note_on
from dsmr_mlx.music.channel_messages import SUSTAIN
from dsmr_mlx.studio.session import Session
from dsmr_mlx.studio.takes import Row, ms

VOICES = {Voice.HUMAN: 0, Voice.MODEL: 1}
REFRESH_SECONDS = 0.25  # between two updates of notes that are held
WRITE_SECONDS = 0.1  # between two writes at least: a pedal sends a hundred messages a second
RECENT = 100  # notes; earlier ones that are held are refreshed less often, because all later ones are written again
EARLIER_REFRESH_SECONDS = 5.0
RETRY_SECONDS = 2.0  # between two attempts to write if the disk is full
MAX_PAUSE = 10.0  # seconds; a longer pause between notes is shortened to it


class TakeRecorder:
    """Writes what human and model play into a take, which is added at the first note.

    A `clock.TimedTask`, and what `live.Session` takes for a recorder. `add` is thread-safe and never waits for the
    disk; the clock's thread writes.

    kind: of the take; fields: see `Session.add`; begin: the time of the take at which the music begins
    tell(pitch, velocity, voice, time): called for each key, at once; tell_pedal(value): for the human's sustain pedal,
    which is up when the recording is closed. failed(reason): called if the take cannot be written,
    once until it is written again; without it, `act` raises the `UserError`
    """

    def __init__(
        self,
        session: Session,
        kind: str,
        begin: float = 0.0,
        tell: Callable[[int, int, int, float], None] = lambda *key: None,
        tell_pedal: Callable[[int], None] = lambda value: None,
        failed: Callable[[str], None] | None = None,
        **fields: Any,
    ):
        self.session, self.kind, self.begin, self.fields = session, kind, begin, fields
        self.tell, self.tell_pedal, self.failed = tell, tell_pedal, failed
        self.take: int | None = None
        self.changed = threading.Condition()
        self._writing = threading.Lock()  # one thread at a time: that of the clock, or who ends it
        self._hands = Hands()
        self._rows: list[Row] = []
        self._voice: list[int] = []
        self._pedal: list[tuple[float, int]] = []  # not written yet
        self._held: dict[int, int] = {}  # pitch → index of its note: both play at one keyboard
        self._unwritten = 0  # index of the first note that has changed
        self._due = math.inf
        self._written = self._refreshed = -math.inf  # when, on the clock; the latter with all held notes
        self._shift: float | None = None  # from the clock's time to that of the take
        self._last = self._last_note = 0.0  # times of the last message and of the last change of a note, on the clock
        self._told = False  # that the take cannot be written
        self._closed = self._complete = False

    def time_of(self, now: float) -> float:
        """Return the time of the take at a time of the clock."""
        return self.begin if self._shift is None else ms(max(now + self._shift, self.begin))

    def add(self, voice: Voice, time: float, message: Message) -> None:
        """Record a message of a channel, not the drums', that comes at a time of the clock."""
        with self.changed:
            if self._closed:
                return
            if is_note_on(message):
                self._follow(time)
            now = self.time_of(time)
            changes = self._changes(voice, message)
            if changes:
                self._last_note = time
            elif not self._held:  # a pedal: a pause in which it moves is shortened too
                now = min(now, ms(self.time_of(self._last_note) + MAX_PAUSE))
            for pitch, velocity in changes:
                self._move(now, pitch, velocity, VOICES[voice])
                if voice is Voice.MODEL or velocity:
                    self.tell(pitch, velocity, VOICES[voice], now)
            if voice is Voice.HUMAN and is_note_off(message):
                self.tell(message.note, 0, VOICES[voice], now)  # the pedal may let it sound on
            is_pedal = voice is Voice.HUMAN and message.is_cc(SUSTAIN)
            if is_pedal:
                self.tell_pedal(message.value)
            if is_pedal and self._shift is not None:
                self._pedal.append((now, message.value))
            if changes or is_pedal:
                self._last, self._due = time, min(self._due, max(time, self._written + WRITE_SECONDS))
                self.changed.notify_all()

    def _follow(self, time: float) -> None:
        """Begin at the first note; shorten a long pause."""
        if self._shift is None:
            self._shift = self.begin - time
        elif not self._held and time - self._last_note > MAX_PAUSE:
            self._shift -= time - self._last_note - MAX_PAUSE

    def _changes(self, voice: Voice, message: Message) -> list[tuple[int, int]]:
        """The pitches that begin to sound, with their velocities, or cease to (0)."""
        if voice is Voice.HUMAN:
            return [tuple(change) for change in self._hands.update(message)]
        if is_note_on(message):
            return [(message.note, message.velocity)]
        return [(message.note, 0)] if is_note_off(message) else []

    def _move(self, now: float, pitch: int, velocity: int, voice: int) -> None:
        """Begin or end a note. A release ends only a note of the same voice."""
        held = self._held.get(pitch)
        if held is not None and (velocity or self._voice[held] == voice):
            del self._held[pitch]
            self._end(held, now)
        if velocity:
            self._held[pitch] = len(self._rows)
            self._rows.append((now, ms(now + 0.001), pitch, velocity))
            self._voice.append(voice)

    def _end(self, i: int, now: float) -> None:
        onset, _, pitch, velocity = self._rows[i]
        self._rows[i] = (onset, max(now, ms(onset + 0.001)), pitch, velocity)
        self._unwritten = min(self._unwritten, i)

    def due(self) -> float:
        """See `clock.TimedTask`."""
        return self._due

    def act(self, now: float) -> None:
        """See `clock.TimedTask`."""
        if now < self._due:
            return
        try:
            self._write(now)
        except UserError as error:
            self._due, self._written = math.inf, now + RETRY_SECONDS - WRITE_SECONDS
            if self.failed is None:
                raise
            if not self._told:
                self._told = True
                self.failed(str(error))
        else:
            self._told = False

    def _write(self, now: float, growing: bool = True) -> None:
        """Write what has come since the last time; nothing more once it is closed."""
        with self._writing:
            with self.changed:
                if not self._rows or (growing and self._closed):
                    self._due = math.inf
                    return
            if self.take is None:
                begin, fields = self.begin, self.fields
                (self.take,) = self.session.add(self.kind, begin=begin, end=begin, growing=True, **fields)
            with self.changed:
                self._written = now
                self._due = now + REFRESH_SECONDS if self._held and growing else math.inf
                at = self.time_of(now)
                if refresh := now - self._refreshed >= EARLIER_REFRESH_SECONDS:
                    self._refreshed = now
                for i in self._held.values():
                    if refresh or i >= len(self._rows) - RECENT:
                        self._end(i, at)
                first, rows, voice = self._unwritten, self._rows[self._unwritten :], self._voice[self._unwritten :]
                pedal, self._pedal, self._unwritten = self._pedal, [], len(self._rows)
                end = max([at if self._held else self.begin, *(row[1] for row in rows)])
            both = voice if self.kind == "duet" else None
            end = max(end, self.session.tree.takes[self.take].end)
            self.session.extend(self.take, first, rows, end, voice=both, pedal=pedal, growing=growing)

    def save(self) -> None:
        """Write now."""
        self._write(self._last)

    def close(self, now: float | None = None) -> None:
        """End all notes and the take; now: of the clock, None for the last message.

        Raises `UserError` if it cannot be written; then it can be called again.
        """
        with self.changed:
            if not self._closed:
                self._end_all(now)
        if not self._complete:
            self._write(self._last, growing=False)
            self._complete = True

    def _end_all(self, now: float | None) -> None:
        self._closed = True
        at = self.time_of(self._last if now is None else now)
        if any(m.is_cc(SUSTAIN) for m in self._hands.release_messages()):
            self.tell_pedal(0)
            if self._shift is not None:
                self._pedal.append((at, 0))
        for i in self._held.values():
            self._end(i, max(at, self._rows[i][1]))  # it has been written that it sounds until then
        self._held.clear()
