"""Find exact loops: the same ids several times in a row."""

from dataclasses import dataclass

import numpy as np

MAX_CYCLE = 64  # tokens
LOOPING_COPIES = 4  # in a row; none of the 976 performances in ASAP has more than 3 (cycles of up to 64 tokens)


@dataclass(frozen=True)
class Loop:
    """A cycle of `length` tokens that occurs `copies` ≥ 2 times in a row from index `start` on."""

    length: int
    copies: int
    start: int


def repeats(ids: np.ndarray, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """Find where ids `(T,)` repeat the ids `cycle` before: return the starts `(R,)` and lengths `(R,)` of all runs.

    A run is a range of i with ids[i + cycle] = ids[i]: if it has n from s on, ids[s : s + n + cycle] has that period.
    """
    same = ids[cycle:] == ids[:-cycle] if cycle < len(ids) else np.zeros(0, bool)
    edges = np.flatnonzero(np.diff(same.astype(np.int8), prepend=0, append=0))
    return edges[::2], edges[1::2] - edges[::2]


def worst_loop(ids: np.ndarray, notes: np.ndarray, max_cycle: int = MAX_CYCLE) -> Loop | None:
    """Return the cycle that occurs most often in a row in ids `(T,)`; ties go to the longest, then the first.

    Cycles have at most `max_cycle` ids; None if no cycle repeats. notes: `(V,)`, the number of keys that each id
    presses. A cycle must press a key, because a long pause is not a loop; if no id presses one, every cycle counts.
    Repeats are exact, as in `steering.LoopPenalty`.
    """
    ids = np.asarray(ids, np.int64)
    sounds = notes[ids] > 0 if notes.any() else np.ones(len(ids), bool)
    before = np.append(0, np.cumsum(sounds))  # (T + 1,), sounding ids before each index
    worst = None
    for cycle in range(1, min(max_cycle, len(ids) - 1) + 1):
        starts, lengths = repeats(ids, cycle)
        # Two whole cycles are equal, and the first of them sounds.
        whole = (lengths >= cycle) & (before[np.minimum(starts + cycle, len(ids))] > before[starts])
        if whole.any():
            copies = np.where(whole, lengths // cycle + 1, 0)
            i = int(copies.argmax())
            if worst is None or copies[i] >= worst.copies:
                worst = Loop(cycle, int(copies[i]), int(starts[i]))
    return worst
