"""Embeddings whose gradient is the same in every run.

The gradient of a look-up adds the rows of equal ids. MLX does that with atomic additions on a GPU, whose order differs
from run to run. A product with one-hot vectors has a fixed order and gives the same sums.
"""

import mlx.core as mx
import mlx.nn as nn

MAX_ONE_HOT = 1 << 26  # entries of one-hot vectors made at once


class Embedding(nn.Embedding):
    """`nn.Embedding` with a gradient of fixed order."""

    def __call__(self, ids: mx.array) -> mx.array:
        """Return the rows `(…, d)` of ids `(…)`."""
        if ids.shape[-1] == 1:  # a decoding step, which has no gradient
            return self.weight[ids]
        return look_up(self.weight, ids)


@mx.custom_function
def look_up(weight: mx.array, ids: mx.array) -> mx.array:
    """Return the rows `(…, d)` of a weight `(V, d)` at ids `(…)`."""
    return weight[ids]


@look_up.vjp
def _gradient(primals: list[mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    weight, ids = primals
    V, d = weight.shape
    flat, rows = ids.reshape(-1, 1), cotangent.reshape(-1, d)  # (N, 1), (N, d)
    step = max(MAX_ONE_HOT // V, 1)
    total = mx.zeros((V, d))
    for begin in range(0, flat.shape[0], step):
        one_hot = (flat[begin : begin + step] == mx.arange(V)).astype(rows.dtype)  # (n, V)
        total = total + one_hot.T @ rows[begin : begin + step]
    return total.astype(weight.dtype), mx.zeros_like(ids)
