"""Exact loops: the same events over and over again."""

from dataclasses import dataclass

import numpy as np

LONGEST_CYCLE = 64  # tokens
LOOPING_COPIES = 4  # in a row: of the 976 performances in ASAP none has more than 3 (cycles of up to 64 tokens)


@dataclass(frozen=True)
class Loop:
    """A cycle of `length` tokens that comes `copies` ≥ 2 times in a row, from index `start` on."""

    length: int
    copies: int
    start: int


def repeats(ids: np.ndarray, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """Where `ids` `[T]` repeat what was `cycle` ids before: starts and lengths `[R]` of all runs i with ids[i + cycle]
    = ids[i]. A run of n from s on means that ids[s : s + n + cycle] have the period `cycle`."""
    same = ids[cycle:] == ids[:-cycle] if cycle < len(ids) else np.zeros(0, bool)
    edges = np.flatnonzero(np.diff(same.astype(np.int8), prepend=0, append=0))
    return edges[::2], edges[1::2] - edges[::2]


def worst_loop(ids: np.ndarray, notes: np.ndarray, longest: int = LONGEST_CYCLE) -> Loop | None:
    """The cycle of at most `longest` ids that comes most often in a row in `ids` `[T]`; of several the longest, then
    the first. None where nothing comes twice.

    notes `[V]`: how many keys an id presses; a cycle must press one, for a long pause is no loop. In a vocabulary of
    unknown pitches every cycle counts. Exact repeats only, as in `steering.LoopPenalty`.
    """
    ids = np.asarray(ids, np.int64)
    sounds = notes[ids] > 0 if notes.any() else np.ones(len(ids), bool)
    before = np.append(0, np.cumsum(sounds))
    worst = None
    for cycle in range(1, min(longest, len(ids) - 1) + 1):
        starts, lengths = repeats(ids, cycle)
        whole = (lengths >= cycle) & (before[np.minimum(starts + cycle, len(ids))] > before[starts])
        if whole.any():
            copies = np.where(whole, lengths // cycle + 1, 0)
            i = int(copies.argmax())
            if worst is None or copies[i] >= worst.copies:
                worst = Loop(cycle, int(copies[i]), int(starts[i]))
    return worst
