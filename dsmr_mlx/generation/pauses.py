"""Ids that let time pass, and how to shorten pauses without making other events more likely."""

import mlx.core as mx
import numpy as np

from dsmr_mlx.tokenizers.token_tables import TokenTables


def only_waits(tables: TokenTables) -> np.ndarray:
    """Ids that let time pass and do nothing else, `(V,)` bool."""
    return tables.takes_time & tables.fades & ~tables.released.any(axis=1)


def to_longest(logits: mx.array, lost: mx.array, pause: mx.array, waits: mx.array) -> mx.array:
    """Give the probability of the logits `lost` to the longest possible pause, if there is one; all `(B, V)`.

    waits: int32, the ticks that each id takes.
    """
    possible = pause & (logits > -mx.inf)
    most = mx.where(possible, waits, 0).max(axis=-1, keepdims=True)
    longest_pauses = possible & (waits == most) & (most > 0)
    n = mx.maximum(longest_pauses.sum(axis=-1, keepdims=True), 1)
    share = mx.logsumexp(lost, axis=-1, keepdims=True) - mx.log(n)
    return mx.where(longest_pauses, mx.logaddexp(logits, share), logits)
