"""How long ids of several events hold keys and let notes sound, which is not in `TokenTables`."""

from typing import NamedTuple

import numpy as np

from dsmr_mlx.music.notes import PITCHES
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


def note_ends(tables: TokenTables) -> tuple[np.ndarray, np.ndarray]:
    """When the last note with a length ends that an id starts, `(V,)` each.

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
