"""Dropout with a random key for each lane."""

import mlx.core as mx


def dropout(x: mx.array, rate: float, keys: mx.array | None) -> mx.array:
    """Apply inverted dropout to `(B, T, d)`; keys: `(B, 2)` uint32, a random key per lane; None: no dropout.

    A lane's noise depends only on its key, not on other lanes or on how often a block is computed.
    """
    if keys is None or rate == 0:
        return x
    kept = mx.vmap(lambda key: mx.random.bernoulli(1 - rate, x.shape[1:], key=key))(keys)
    return mx.where(kept, x / (1 - rate), 0).astype(x.dtype)
