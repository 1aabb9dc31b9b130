"""Attention over long memories, block by block with a running softmax, see `memory_blocks`.

Results of blocks are joined by the logarithms of their sums of exp(scores). The gradient computes the scores again, so
only one block's scores live at a time, and uses the output instead of another sum over the keys (Dao et al. 2022).
Memory is constant: only the segment's keys and values have a gradient.
"""

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.model.attention import as_bias
from dsmr_mlx.model.memory_blocks import filled_blocks


class View(NamedTuple):
    """The slots of a long memory and its segment that a chunk of T tokens sees; biases as in `attention.as_bias`.

    starts:  `(n,)` int32, the first slots of n blocks of C slots
    memory:  `(B, 1, 1, n · C)`, the bias of their slots, the same for every query
    segment: `(T, S)`, the bias of the working segment
    slot:    `(1,)` int32, offset of the chunk in the working segment
    """

    starts: mx.array
    memory: mx.array
    segment: mx.array
    slot: mx.array

    @classmethod
    def of(cls, remembered: np.ndarray, slot: int, n: int, segment_length: int, dtype: mx.Dtype) -> "View":
        """Return the view of n tokens from `slot` on; remembered: `(B, M)`, see `memory_blocks.filled_blocks`."""
        starts, seen = filled_blocks(remembered)
        causal = mx.arange(segment_length) <= mx.arange(slot, slot + n)[:, None]
        return cls(
            mx.array(starts),
            as_bias(mx.array(seen)[:, None, None], 1, seen.shape[1], dtype),
            as_bias(causal, n, segment_length, dtype),
            mx.array([slot], mx.int32),
        )


def view_attention(q: mx.array, k: mx.array, v: mx.array, keys: mx.array, values: mx.array, view: View) -> mx.array:
    """Return the attention `(B, H, T, D)` of queries over a view of memory and segment, with scores scaled by 1/√D.

    q: `(B, H, T, D)`; keys, values: `(B, H_kv, M + S, D)`, constants to the gradient
    k, v: `(B, H_kv, T, D)`, equal to the chunk's slots of keys and values; the gradient goes to them
    """
    groups = q.shape[1] // k.shape[1]
    # The queries of a group of heads become the rows of one matrix.
    grouped = q.reshape(*k.shape[:2], -1, q.shape[-1])  # (B, H_kv, groups · T, D)
    segment = mx.concatenate([view.segment] * groups) if groups > 1 else view.segment
    keys, values = mx.stop_gradient(keys), mx.stop_gradient(values)
    y, _ = _attention(grouped, k, v, keys, values, view.starts, view.memory, segment, view.slot)
    return y.astype(q.dtype).reshape(q.shape)


def prefix_attention(q: mx.array, keys: mx.array, values: mx.array, mask: mx.array, segment_length: int) -> mx.array:
    """Return the attention `(B, H, 1, D)` of one query per lane over the first slots of memory and the segment.

    mask: bool `(B, 1, 1, V + S)`, True = attend, of the first V slots of the memory and all S of the segment. Nothing
    is copied: both parts are views of keys and values `(B, H_kv, M + S, D)`.
    """
    grouped = q.reshape(*keys.shape[:2], -1, q.shape[-1])  # (B, H_kv, groups, D)
    bias, V = as_bias(mask, 1, mask.shape[-1], q.dtype), mask.shape[-1] - segment_length
    joined = _attend(grouped, keys[:, :, -segment_length:], values[:, :, -segment_length:], bias[..., V:])
    if V:
        joined = _join(joined, _attend(grouped, keys[:, :, :V], values[:, :, :V], bias[..., :V]))
    return joined[0].astype(q.dtype).reshape(q.shape)


def _attend(q: mx.array, keys: mx.array, values: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """Return the attention `(B, H_kv, R, D)` over a block and the logarithm `(B, H_kv, R, 1)` of its sum, float32."""
    scores = _scores(q, keys, bias)
    y = mx.softmax(scores, axis=-1, precise=True) @ values
    # From float32: in 16 bits, rounding the logarithm would change the block's share by several percent.
    return y.astype(mx.float32), mx.logsumexp(scores.astype(mx.float32), axis=-1, keepdims=True)


def _join(a: tuple[mx.array, mx.array], b: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
    """Return the attention over two blocks, given the result of `_attend` for each."""
    total = mx.logaddexp(a[1], b[1])
    return a[0] * mx.exp(a[1] - total) + b[0] * mx.exp(b[1] - total), total


def _scores(q: mx.array, keys: mx.array, bias: mx.array) -> mx.array:
    return mx.addmm(bias, q, keys.swapaxes(-1, -2), alpha=q.shape[-1] ** -0.5)


def _blocks(
    keys: mx.array, values: mx.array, starts: mx.array, memory: mx.array
) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
    """Yield keys and values `(B, H_kv, C, D)` and bias of each block; an array of starts lets one graph serve all."""
    n = starts.shape[0]
    for i in range(n):
        C = memory.shape[-1] // n
        shape = (*keys.shape[:2], C, keys.shape[3])
        start = starts[i : i + 1]
        yield mx.slice(keys, start, (2,), shape), mx.slice(values, start, (2,), shape), memory[..., i * C : (i + 1) * C]


@mx.custom_function
def _attention(q, k, v, keys, values, starts, memory, segment, slot):
    S = segment.shape[-1]
    joined = _attend(q, keys[:, :, -S:], values[:, :, -S:], segment)
    for block in _blocks(keys, values, starts, memory):
        q = mx.depends(q, joined[0])  # one block after the other, so that only one block's scores live at a time
        joined = _join(joined, _attend(q, *block))
    return joined


@_attention.vjp
def _gradient(primals, cotangents, outputs):
    (q, k, _, *constant), (y, logsum), dy = primals, outputs, cotangents[0].astype(primals[0].dtype)
    keys, values, starts, memory, segment, slot = constant
    S, scale = segment.shape[-1], q.shape[-1] ** -0.5
    # In float32: in 16 bits the rounding error would exceed the gradients of the scores, which must sum to zero.
    total = (dy.astype(mx.float32) * y).sum(axis=-1, keepdims=True)

    def of_scores(keys, values, bias):
        """The weights of a block and the gradient of its scores, each `(B, H_kv, R, slots)`."""
        weights = mx.exp(_scores(q, keys, bias).astype(mx.float32) - logsum)
        return weights.astype(q.dtype), (weights * (dy @ values.swapaxes(-1, -2) - total)).astype(q.dtype)

    weights, dscores = of_scores(keys[:, :, -S:], values[:, :, -S:], segment)
    dk, dv = dscores.swapaxes(-1, -2) @ q * scale, weights.swapaxes(-1, -2) @ dy
    dq = (dscores @ keys[:, :, -S:]).astype(mx.float32)
    for block_keys, block_values, bias in _blocks(keys, values, starts, memory):
        q = mx.depends(q, dq)
        _, dscores = of_scores(block_keys, block_values, bias)
        dq = dq + dscores @ block_keys
    dk, dv = (mx.slice(array, slot, (2,), k.shape) for array in (dk, dv))
    return (dq * scale).astype(q.dtype), dk, dv, *map(mx.zeros_like, constant)
