"""How long ids hold keys and let notes sound, which is not in `TokenTables`."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.music.notes import PITCHES
from dsmr_mlx.tokenizers.event_grammar import Moment
from dsmr_mlx.tokenizers.token_tables import TokenTables


class Holds(NamedTuple):
    """The keys that each id holds.

    pitch:   `(V, R)`, the keys that it presses and leaves down, padded with −1
    age:     `(V, R)`, for how many ticks they are down at its end
    longest: `(V,)`, the most ticks for which it holds a key
    """

    pitch: np.ndarray
    age: np.ndarray
    longest: np.ndarray


def holds_of(tables: TokenTables) -> Holds:
    """The `Holds` of a vocabulary whose only ids that take time are pauses."""
    g, rows = tables.grammar, np.arange(len(tables.events))
    now, longest = np.zeros((2, len(rows)), np.int64)
    since = np.full((len(rows), PITCHES), -1)
    for column in tables.events.T:
        real = column >= 0
        now += np.where(real, g.ticks[column], 0)
        for table, value in ((g.release, -1), (g.press, now)):
            acts = real & (table[column] >= 0)
            at = rows[acts], table[column][acts]
            held = since[at] >= 0
            longest[acts] = np.maximum(longest[acts], np.where(held, now[acts] - since[at], 0))
            since[at] = value if np.isscalar(value) else value[acts]
    down = since >= 0
    pitch = np.argsort(~down, axis=1, kind="stable")[:, : max(int(down.sum(axis=1).max()), 1)]
    is_down = np.take_along_axis(down, pitch, axis=1)
    age = np.where(is_down, now[:, None] - np.take_along_axis(since, pitch, axis=1), 0)
    return Holds(np.where(is_down, pitch, -1), age, np.maximum(longest, age.max(axis=1)))


class Lengths(NamedTuple):
    """The notes of a vocabulary whose ids are single events and give notes a length; int32.

    press, duration: `(1, V)`, the pitch that an id presses and the ticks that it gives to a note, or −1
    pitch: `(1,)`, of the note that has no length yet, or −1
    begun, until: `(1, 128)`, when the last note of each pitch begins and ends. It ends the one before it; of two that
        begin together the longer one counts
    """

    press: mx.array
    duration: mx.array
    pitch: mx.array
    begun: mx.array
    until: mx.array

    @staticmethod
    def known(tables: TokenTables) -> bool:
        """Whether the lengths of all notes are known."""
        g, single = tables.grammar, (tables.events >= 0).sum(axis=1).max() == 1
        return bool(g.plays_keys and not g.held and single and (g.duration >= 0).any())

    @classmethod
    def of(cls, tables: TokenTables) -> "Lengths":
        """Return one lane without notes."""
        g, event = tables.grammar, tables.events[:, 0]
        meanings = (np.where(event >= 0, table[event], -1)[None] for table in (g.press, g.duration))
        return cls(*(mx.array(a, mx.int32) for a in (*meanings, [-1], *np.zeros((2, 1, PITCHES)))))

    def advance(self, token: mx.array, ticks: mx.array) -> "Lengths":
        """The notes after ids `(B,)`, with the clock `(B,)`."""
        press, duration = (mx.take_along_axis(t, token[:, None], axis=1)[:, 0] for t in (self.press, self.duration))
        pitch = mx.where(press >= 0, press, self.pitch)
        begins = (duration >= 0) & (pitch >= 0)
        is_it = begins[:, None] & (mx.arange(PITCHES) == pitch[:, None])
        now = ticks[:, None]
        end = now + mx.maximum(duration, 1)[:, None]
        end = mx.where(self.begun == now, mx.maximum(end, self.until), end)
        return self._replace(
            pitch=mx.where(begins, -1, pitch),
            begun=mx.where(is_it, now, self.begun),
            until=mx.where(is_it, end, self.until),
        )

    def read(self, tables: TokenTables, ids: np.ndarray, before: Sequence[Moment]) -> "Lengths":
        """The notes after all lanes have read `ids` `(T,)` from the B moments `before`."""
        press, duration = (np.array(table)[0][ids].tolist() for table in (self.press, self.duration))
        pitches, begun, ends = self.pitch.tolist(), np.array(self.begun), np.array(self.until)
        for lane, moment in enumerate(before):
            ticks, pitch = tables.moments(moment, ids).ticks[1:].tolist(), pitches[lane]
            for tick, pressed, length in zip(ticks, press, duration, strict=True):
                pitch = pressed if pressed >= 0 else pitch
                if length >= 0 and pitch >= 0:
                    end, same = tick + max(length, 1), begun[lane, pitch] == tick
                    ends[lane, pitch] = max(end, ends[lane, pitch]) if same else end
                    begun[lane, pitch], pitch = tick, -1
            pitches[lane] = pitch
        return self._replace(pitch=mx.array(pitches, mx.int32), begun=mx.array(begun), until=mx.array(ends))


def note_ends(tables: TokenTables) -> tuple[np.ndarray, np.ndarray]:
    """The end of the last note with a length that an id starts, `(V,)` each.

    First in ticks from before the id, 0 if none; second, for notes that start after it has moved within the bar, in
    ticks from the beginning of the bar before, −1 if none.
    """
    g = tables.grammar
    ticks, after_id = np.zeros((2, len(tables.events)), np.int64)
    phase, after_bar = np.full((2, len(tables.events)), -1)
    for column in tables.events.T:
        real, duration = column >= 0, g.duration[column]
        bar, position = real & g.bar[column], np.where(real, g.position[column], -1)
        moves = bar | (position >= 0)
        waits = np.where(real & ~moves, g.ticks[column], 0)
        ticks = np.where(moves & (phase < 0), 0, ticks) + np.where(bar, g.bar_ticks, np.where(phase < 0, waits, 0))
        phase = np.where(bar, 0, np.where(moves, position, np.where(phase < 0, phase, phase + waits)))
        starts = real & (duration >= 0)
        after_id = np.where(starts & (phase < 0), np.maximum(after_id, ticks + duration), after_id)
        after_bar = np.where(starts & (phase >= 0), np.maximum(after_bar, ticks + phase + duration), after_bar)
    return after_id, after_bar
