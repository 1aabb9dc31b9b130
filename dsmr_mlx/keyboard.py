"""From tokens, one at a time, to what happens on the keys of a piano and when."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dsmr_mlx.performance import DEFAULT_BIN, Grammar, bin_velocities


class KeyEvent(NamedTuple):
    """At a tick a key goes down with a MIDI velocity, or up again: velocity 0."""

    tick: int
    pitch: int
    velocity: int


class Keyboard:
    """One lane's keys; `tick` is its clock, `down` the keys that it has pressed with the ticks when.

    velocity: the bin that the music before it has left, −1 if none. Keys that were down before are not its own: their
    releases pass unheard. Its notes are those of `Tokenizer.decode` wherever the tokens follow the grammar.
    """

    def __init__(self, tables: Grammar, velocity: int = -1):
        loudness = np.where(tables.velocity >= 0, bin_velocities(np.maximum(tables.velocity, 0)), 0)
        lists = (table.tolist() for table in (tables.ticks, tables.press, tables.release, loudness))
        self._ticks, self._press, self._release, self._loudness = lists
        self._loud = int(bin_velocities(np.array(velocity if velocity >= 0 else DEFAULT_BIN)))
        self.tick = 0
        self.down: dict[int, int] = {}

    def play(self, token: int) -> Iterator[KeyEvent]:
        """What one token does."""
        self.tick += self._ticks[token]
        self._loud = self._loudness[token] or self._loud
        pitch = max(self._press[token], self._release[token])
        if pitch in self.down:
            del self.down[pitch]
            yield KeyEvent(self.tick, pitch, 0)
        if self._press[token] >= 0:
            self.down[pitch] = self.tick
            yield KeyEvent(self.tick, pitch, self._loud)

    def release_all(self) -> Iterator[KeyEvent]:
        """Let go of all keys, now, or a tick later those that went down just now: no note lasts no time."""
        yield from sorted(KeyEvent(max(self.tick, pressed + 1), pitch, 0) for pitch, pressed in self.down.items())
        self.down.clear()
