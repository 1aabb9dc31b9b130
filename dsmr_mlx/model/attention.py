"""Attention of a segment over its memory with a custom gradient, for training.

On a CPU and on Metal, MLX has no fused kernel for the gradient of attention, and passes over the scores
`(B, H, S, M + S)` cost more than the matrix products. This version makes fewer passes: the product that computes the
scores adds the mask, and the gradient of the softmax uses the output instead of another sum over the keys (Dao et al.
2022). Memory is constant, so only the segment's keys and values have a gradient.
"""

import mlx.core as mx

from dsmr_mlx.model.device import on_gpu


def is_fused(dtype: mx.Dtype, rows: int, head_dim: int) -> bool:
    """Return whether MLX has fused kernels for attention of `rows` queries and its gradient: cuDNN, in 16 bits."""
    on_cuda = on_gpu() and mx.cuda.is_available()
    return on_cuda and dtype.size == 2 and rows % 128 == 0 and head_dim % 8 == 0 and head_dim <= 128


def as_bias(mask: mx.array | str, rows: int, slots: int, dtype: mx.Dtype) -> mx.array:
    """Return a mask as an additive bias `(…, rows, slots)`: 0 if True, else low enough that the weight becomes 0.

    mask: bool, True = attend; or "causal", lower-right aligned: the last row sees all slots.
    """
    if isinstance(mask, str):
        mask = mx.arange(slots) <= mx.arange(slots - rows, slots)[:, None]
    return mx.where(mask, 0, mx.finfo(dtype).min / 2).astype(dtype)


def segment_attention(
    q: mx.array, k: mx.array, v: mx.array, keys: mx.array, values: mx.array, bias: mx.array
) -> mx.array:
    """Return the attention `(B, H, S, D)` of queries over keys and values, with scores scaled by 1/√D.

    q: `(B, H, S, D)`; keys, values: `(B, H_kv, M + S, D)`, constants to the gradient
    k, v: `(B, H_kv, S, D)`, equal to the last S of keys and values; the gradient goes to them
    bias: `(S, M + S)` or `(B, 1, S, M + S)`, see `as_bias`
    """
    groups = q.shape[1] // k.shape[1]
    # The queries of a group of heads become the rows of one matrix: S rows of each head, which share the bias's S rows.
    grouped = q.reshape(*k.shape[:2], -1, q.shape[-1])  # (B, H_kv, groups · S, D)
    if groups > 1:
        bias = mx.concatenate([bias] * groups, axis=-2)  # (…, groups · S, M + S)
    keys, values = mx.stop_gradient(keys), mx.stop_gradient(values)
    y, _ = _attention(grouped, k, v, keys, values, bias)
    return y.reshape(q.shape)


@mx.custom_function
def _attention(q, k, v, keys, values, bias):
    scores = mx.addmm(bias, q, keys.swapaxes(-1, -2), alpha=q.shape[-1] ** -0.5)
    weights = mx.softmax(scores, axis=-1, precise=True)
    return weights @ values, weights


@_attention.vjp
def _gradient(primals, cotangents, outputs):
    (q, k, _, *constant), (y, weights), dy = primals, outputs, cotangents[0]
    keys, values, _ = constant
    S, scale = k.shape[2], q.shape[-1] ** -0.5
    # In float32: in 16 bits the rounding error would exceed the gradients of the scores, which must sum to zero.
    total = (dy.astype(mx.float32) * y.astype(mx.float32)).sum(axis=-1, keepdims=True)
    dscores = (weights * (dy @ values.swapaxes(-1, -2) - total)).astype(q.dtype)
    dq = dscores @ keys * scale
    dk = dscores[..., -S:].swapaxes(-1, -2) @ q * scale
    dv = weights[..., -S:].swapaxes(-1, -2) @ dy
    return dq, dk, dv, *map(mx.zeros_like, constant)
