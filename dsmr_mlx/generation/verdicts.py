"""Verdicts of constraints on the next id, and the logits that remain after them.

Constraints are applied together instead of one after the other, which takes a tenth of the kernels.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

MAX_VERDICTS = 6  # at once: two bits each and `WAIT_BITS` fit into an int32
WAIT_BITS = 16
MAX_WAIT = 2**WAIT_BITS - 1  # ticks; longer pauses count as equally long. (A late bar line takes negative ticks.)


class Verdict(NamedTuple):
    """The verdict of a constraint on the next id; arrays that broadcast to `(B, V)`, bool unless stated.

    fits:  ids that satisfy the constraint; if no possible id does, the constraint is skipped in that lane
    first: ids of which one must come if any is possible; None: none
    gain:  float32, nats that ids gain if they fit; None: none
    pause: ids that only let time pass: the longest remaining one gets the probability of ids that take time and do not
           fit; None: this probability is lost
    waits: int32, the ticks that each id takes; only with `pause`
    """

    fits: mx.array
    first: mx.array | None = None
    gain: mx.array | None = None
    pause: mx.array | None = None
    waits: mx.array | None = None


def judged(logits: mx.array, verdicts: Iterable[Verdict]) -> mx.array:
    """Logits `(B, V)` after the verdicts, in their order; every lane keeps a token."""
    for group in _grouped(verdicts):
        logits = _judged(logits, group)
    return logits


def _grouped(verdicts: Iterable[Verdict]) -> Iterator[list[Verdict]]:
    """Group verdicts that can be applied at once with the same result as one after the other.

    A pause that one verdict keeps and the next forbids takes the probability that it got with it, unless the next
    passes it on. Gains count from their own verdict on.
    """
    group: list[Verdict] = []
    for verdict in verdicts:
        passes_on = any(v.pause is not None for v in group)
        if len(group) == MAX_VERDICTS or (passes_on and (verdict.pause is None or verdict.gain is not None)):
            yield group
            group = []
        group.append(verdict)
    if group:
        yield group


def _judged(logits: mx.array, verdicts: Sequence[Verdict]) -> mx.array:
    """Keep the possible ids that are first in rank: by the first verdict, among equals by the second, and so on."""
    rank, bits_of_time, waits = 0, 0, None
    for verdict in verdicts:
        bits = [verdict.fits] if verdict.first is None else [verdict.first, verdict.fits]
        for bit in bits:
            rank = 2 * rank + bit
        if verdict.gain is not None:
            logits = logits + mx.where(verdict.fits, verdict.gain, 0)
        if verdict.pause is not None:
            bits_of_time, pause, waits = bits_of_time + len(bits), verdict.pause, verdict.waits
    possible = logits > -mx.inf
    if waits is None:
        rank = mx.where(possible, rank, -1)
        return mx.where(rank == rank.max(axis=-1, keepdims=True), logits, -mx.inf)
    # Of the ids that are first, the longest pause comes first: one maximum finds both.
    rank = (rank << WAIT_BITS) + mx.where(pause, mx.clip(waits, 0, MAX_WAIT), 0)
    rank = mx.where(possible, rank, -1)
    top = rank.max(axis=-1, keepdims=True)
    kept, longest = rank >> WAIT_BITS == top >> WAIT_BITS, (rank == top) & pause & (waits > 0)
    # Forbidden only by the verdicts on time, which are the last.
    shift = WAIT_BITS + bits_of_time
    lost = (rank >> shift == top >> shift) & ~kept & (waits > 0)
    return _to_longest(logits, kept, lost, longest)


def _to_longest(logits: mx.array, kept: mx.array, lost: mx.array, longest: mx.array) -> mx.array:
    """The logits of the ids `kept`, of which the `longest` pauses share the probability of those `lost`; `(B, V)`."""
    rows = rows_of(*(mx.where(mask, x, -mx.inf) for mask, x in ((lost, logits), (longest, 0.0), (kept, logits))))
    of_lost, n_longest = mx.logsumexp(rows[:2], axis=-1, keepdims=True)
    is_longest, left = rows[1:]
    return mx.where(is_longest == 0, mx.logaddexp(left, of_lost - n_longest), left)


def rows_of(*arrays: mx.array) -> mx.array:
    """n arrays of one shape as the rows of another, `(n, …)`. `mx.stack` would copy each with a kernel of its own; this
    is fused with what computes them, and one reduction serves all.
    """
    rows, *others = arrays
    for i, array in enumerate(others, start=1):
        rows = mx.where(_row_numbers(len(arrays), array.ndim) < i, rows, array)
    return rows


@cache
def _row_numbers(n: int, ndim: int) -> mx.array:
    """0 … n − 1, int32 `(n, 1, …)`, as a constant: a compiled step would compute `mx.arange` each time."""
    return mx.array(np.arange(n, dtype=np.int32).reshape(n, *[1] * ndim))
