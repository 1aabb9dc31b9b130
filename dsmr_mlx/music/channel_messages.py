"""Channel messages of simultaneous tracks, as arrays, and the controllers that act on keys (MIDI 1.0).

All times are ticks. A channel or key and a tick of `TICK_BITS` bits are packed into one sortable int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsmr_mlx.music.midi_track import CONTROL, MAX_TICK, Track

SUSTAIN, ALL_SOUND_OFF, RESET_CONTROLLERS, ALL_NOTES_OFF = 64, 120, 121, 123  # controllers
PEDAL_DOWN = 64  # from this value on
RELEASES_KEYS = (ALL_SOUND_OFF, ALL_NOTES_OFF, 124, 125, 126, 127)  # the modes 124 to 127 imply "all notes off"
DRUM_CHANNEL = 9
CHANNELS = 16 * 256  # of all ports; channels from here on belong to one track
TICK_BITS = MAX_TICK.bit_length()
MAX_CHANNELS = 1 << (63 - TICK_BITS - 7)
NEVER = 2 * MAX_TICK - 1


@dataclass(frozen=True)
class Messages:
    """E channel messages of simultaneous tracks, ordered by track, then by time.

    tick, track, channel: `(E,)` int64; kind, first, second: `(E,)` uint8, see `Track`
    origin: `(C,)` int64, the channel number in the file of each channel
    end: tick of the last event of any kind
    """

    tick: np.ndarray
    track: np.ndarray
    channel: np.ndarray
    kind: np.ndarray
    first: np.ndarray
    second: np.ndarray
    origin: np.ndarray
    end: int

    @classmethod
    def of(cls, tracks: list[Track]) -> Messages:
        """Return the messages of simultaneous tracks."""
        number = np.repeat(np.arange(len(tracks)), [len(track.tick) for track in tracks])
        names = ("tick", "channel", "kind", "first", "second")
        columns = {name: np.concatenate([getattr(track, name) for track in tracks]) for name in names}
        end = max(track.end for track in tracks)
        return cls(**columns, track=number, origin=np.arange(CHANNELS), end=end)

    def controls(self, *numbers: int) -> np.ndarray:
        """Return the indices of the messages of some controllers."""
        chosen = np.zeros(256, bool)
        chosen[list(numbers)] = True
        return np.flatnonzero(chosen[self.first] & (self.kind == CONTROL))


class Timeline:
    """Sorted events (key, tick), to look up the ones before or after others."""

    def __init__(self, key: np.ndarray, tick: np.ndarray) -> None:
        place = (key << TICK_BITS) | tick
        self._order = np.argsort(place, kind="stable")
        self._place = place[self._order]

    def last(self, key: np.ndarray, tick: np.ndarray) -> np.ndarray:
        """Return the index of the last event of each key at or before a tick, −1 without one."""
        i = np.searchsorted(self._place, (key << TICK_BITS) | tick, side="right") - 1
        same = np.append(self._place, -1)[i] >> TICK_BITS == key  # place −1 belongs to no key
        return np.where(same, np.append(self._order, -1)[i], -1)

    def next_tick(self, key: np.ndarray, tick: np.ndarray) -> np.ndarray:
        """Return the tick of the first event of each key after a tick, `NEVER` without one."""
        i = np.searchsorted(self._place, (key << TICK_BITS) | tick, side="right")
        place = np.append(self._place, -1)[i]
        return np.where(place >> TICK_BITS == key, place & ((1 << TICK_BITS) - 1), NEVER)
