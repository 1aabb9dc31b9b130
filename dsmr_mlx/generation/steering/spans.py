"""How long the ids of several events hold keys and let notes sound, which `TokenTables` does not tell."""

from typing import NamedTuple

import numpy as np

from dsmr_mlx.music.notes import PITCHES
from dsmr_mlx.tokenizers.token_tables import TokenTables


class Holds(NamedTuple):
    """The keys that each id presses, where they are held: pitch, age `[V, R]` of those that are down when it is over,
    −1 behind the last, and for how many ticks; longest `[V]`: the most ticks for which it holds one itself.
    """

    pitch: np.ndarray
    age: np.ndarray
    longest: np.ndarray


def holds_of(tables: TokenTables) -> Holds:
    """See `Holds`. All that takes time are pauses, as wherever keys are held."""
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
    """When the last note is over that an id tells with its length, `[V]` each: in ticks from before the id, 0 for none;
    and for notes that begin where it has moved in the bar, in ticks from the beginning of the bar before, −1 for none.
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
        tells = real & (duration >= 0)
        after_id = np.where(tells & (phase < 0), np.maximum(after_id, ticks + duration), after_id)
        after_bar = np.where(tells & (phase >= 0), np.maximum(after_bar, ticks + phase + duration), after_bar)
    return after_id, after_bar
