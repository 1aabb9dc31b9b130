"""A take on the MIDI output: its notes at their times; all keys are up at the end.

While a take grows, playback waits where it is not made yet.
"""

import heapq
import math
import threading
from collections.abc import Callable

import numpy as np
from mido import Message

from dsmr_mlx.live.clock import RealClock
from dsmr_mlx.live.instrument import Instrument, Voice, note_off
from dsmr_mlx.music.notes import Notes

LOOK_SECONDS = 0.1  # between two looks at a take that grows
BUFFER_SECONDS = 0.5  # of music that is made, after a wait
CHANNEL = 0
ROUNDING = 1e-6  # seconds


class Playback:
    """A `clock.TimedTask` that plays a piece from a time on.

    music(): the notes, and the time up to which they are made, inf if all are. send(message): to the output; returns
    whether that worked. finished(): called once, when all has been played or a message could not be sent.
    resumed(time): called when it goes on after a wait, with the time of the take
    """

    def __init__(
        self,
        music: Callable[[], tuple[Notes, float]],
        at: float,
        now: float,
        send: Callable[[Message], bool],
        finished: Callable[[], None],
        resumed: Callable[[float], None] = lambda time: None,
    ):
        self.music, self.send, self.finished, self.resumed = music, send, finished, resumed
        self.instrument = Instrument(self._sent)
        self.changed = threading.Condition()
        self._start, self._at = now, at  # the clock at the beginning, and the time of the take there
        self._ends: list[tuple[float, int]] = []  # heap of (end, pitch)
        self._done = at  # notes that begin before have been played
        self._looked = now  # when a growing take was looked at last
        self._waiting = self._over = False
        self.notes, self.made = self.music()

    @property
    def growing(self) -> bool:
        """Whether more notes will come."""
        return self.made < math.inf

    def _sent(self, message: Message) -> bool:
        sent = self.send(message)
        if not sent:
            self._over = True
        return sent

    def time_at(self, now: float) -> float:
        """Return the time of the take at a time of the clock."""
        return self._at if self._waiting else self._at + now - self._start

    def due(self) -> float:
        """See `clock.TimedTask`."""
        if self._over:
            return math.inf
        look = self._looked + LOOK_SECONDS if self.growing else math.inf
        if self._waiting:
            return look
        times = [*self._coming[:1].tolist(), *(end for end, _ in self._ends[:1])]
        if self.growing:
            times.append(self.made)
        return min(look, self._start + min(times, default=self._at) - self._at)

    @property
    def _coming(self) -> np.ndarray:
        """The onsets that have not been played."""
        return self.notes.onset[np.searchsorted(self.notes.onset, self._done) :]

    def act(self, now: float) -> None:
        """See `clock.TimedTask`."""
        if self._over:
            return
        if self.growing and (now >= self._looked + LOOK_SECONDS or self.time_at(now) >= self.made):
            self.notes, self.made = self.music()
            self._looked = now
        if self._waiting:
            if self.made < self._at + BUFFER_SECONDS:
                return
            self._waiting, self._start = False, now
            self.resumed(self._at)
        time = self.time_at(now) + ROUNDING
        if time >= self.made:
            time = self._wait()
        self._release(time)
        self._press(time)
        if self._over or not (self._ends or self.growing or len(self._coming)):
            self.close()
            self.finished()

    def _wait(self) -> float:
        """Stop the clock where the music is not made yet. Return the time just before."""
        self._waiting, self._at = True, max(self.made, self._done)
        for _, pitch in self._ends:
            self.instrument.play(Voice.MODEL, note_off(CHANNEL, pitch))
        self._ends.clear()
        return math.nextafter(self._at, -math.inf)

    def _press(self, time: float) -> None:
        due = (self.notes.onset >= self._done) & (self.notes.onset <= time)
        for _, end, pitch, velocity in self.notes.take(due).rows:
            self.instrument.play(Voice.MODEL, Message("note_on", channel=CHANNEL, note=pitch, velocity=velocity))
            self._ends = [each for each in self._ends if each[1] != pitch]
            heapq.heapify(self._ends)
            heapq.heappush(self._ends, (end, pitch))
        self._done = math.nextafter(time, math.inf)

    def _release(self, time: float) -> None:
        while self._ends and self._ends[0][0] <= time:
            end, pitch = heapq.heappop(self._ends)
            later = self._end_of(pitch, time) if self.growing else end
            if later > time:  # it was still held when it was begun
                heapq.heappush(self._ends, (later, pitch))
            else:
                self.instrument.play(Voice.MODEL, note_off(CHANNEL, pitch))

    def _end_of(self, pitch: int, time: float) -> float:
        """When the last note of a pitch that has begun ends."""
        begun = (self.notes.pitch == pitch) & (self.notes.onset < self._done)
        return float(self.notes.offset[begun].max(initial=0.0))

    def close(self) -> None:
        """Release all keys, and send nothing after that."""
        self._over = True
        self.instrument.close()


def close_later(clock: RealClock) -> None:
    """Close a clock from any thread, also from one of its own, which could not wait for itself."""
    threading.Thread(target=clock.close, daemon=True).start()
