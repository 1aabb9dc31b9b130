"""Long memories are attended to in blocks, and only where a lane has music. Needs no MLX.

A memory of up to `AT_ONCE` slots is attended to at once, with all scores `(B, H, S, M + S)` and the mask in memory,
which is fastest. With more slots they would take most of the memory of a run. Then attention runs over blocks of
`BLOCK` slots with a running softmax (Milakov & Gimelshein 2018, Dao et al. 2022), whose gradient computes the scores
again, and the mask, whether a slot holds music of a lane's piece, is `(B, 1, 1, slots)`: it does not depend on the
query. Blocks in which no lane has music are left out. Their number is a `view_size`, so that few graphs are compiled.
"""

from typing import NamedTuple

import numpy as np

AT_ONCE = 2048  # tokens: the longest horizon whose scores are computed at once
BLOCK = 1024  # slots


class Blocks(NamedTuple):
    """The n blocks of C slots of a long memory that a chunk attends to.

    starts: `(n,)` int32, the first slot of each; seen: `(B, n · C)` bool, which of their slots each lane sees
    """

    starts: np.ndarray
    seen: np.ndarray


def is_long(horizon: int) -> bool:
    """Return whether a memory of `horizon` slots is attended to in blocks."""
    return horizon > AT_ONCE


def view_size(needed: int, available: int) -> int:
    """Return the smallest of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, … and `available` that is not below `needed`."""
    size = 1
    while size < needed:
        size = size * 3 // 2 if size & (size - 1) == 0 and size > 1 else (1 << size.bit_length())
    return min(size, available) if needed else 0


def filled_blocks(remembered: np.ndarray) -> Blocks:
    """Return the blocks in which any lane has music, padded with unseen ones to a `view_size`.

    remembered: `(B, M)` bool, which slots of the ring hold a token of each lane's piece. The blocks divide the ring
    from its first slot on. The last ends with the ring, so it may overlap the one before; a slot is seen in one block.
    """
    M = remembered.shape[1]
    C = min(BLOCK, M)
    firsts = np.arange(0, M, C)
    filled = np.flatnonzero(np.logical_or.reduceat(remembered.any(axis=0), firsts))
    n = view_size(len(filled), len(firsts))
    chosen = firsts[np.concatenate([filled, np.zeros(n - len(filled), np.int64)])]  # the rest is not seen
    starts = np.minimum(chosen, M - C)
    slots = starts[:, None] + np.arange(C)  # (n, C)
    seen = remembered[:, slots] & (slots >= chosen[:, None])
    seen[:, len(filled) :] = False
    return Blocks(starts.astype(np.int32), seen.reshape(len(remembered), n * C))


def filled_prefix(remembered: np.ndarray) -> int:
    """Return how many of a ring's first slots contain everything that any lane remembers, in blocks as above."""
    M = remembered.shape[1]
    filled = np.flatnonzero(remembered.any(axis=0))
    blocks = -(-(int(filled[-1]) + 1) // BLOCK) if len(filled) else 0
    return min(view_size(blocks, -(-M // BLOCK)) * BLOCK, M)
