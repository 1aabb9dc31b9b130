"""The attention of training steps and its gradient, compared with plain attention differentiated by MLX."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmr_mlx.model.attention import as_bias, is_fused, segment_attention

S, D = 5, 8


def arrays(seed: int, B: int, kv_heads: int, groups: int, M: int, dtype: mx.Dtype) -> list[mx.array]:
    """q, k, v, the memory's keys and values, and a cotangent `(B, H, S, D)` of the output."""
    rng = np.random.default_rng(seed)
    heads = kv_heads * groups
    sizes = [(heads, S), (kv_heads, S), (kv_heads, S), (kv_heads, M), (kv_heads, M), (heads, S)]
    return [mx.array(rng.normal(size=(B, h, n, D)).astype(np.float32)).astype(dtype) for h, n in sizes]


def plain(q, k, v, old_keys, old_values, mask):
    """Softmax attention with a bool mask; memory and segment are concatenated."""
    keys, values = mx.concatenate([old_keys, k], axis=2), mx.concatenate([old_values, v], axis=2)
    keys, values = (mx.repeat(a, q.shape[1] // k.shape[1], axis=1) for a in (keys, values))
    scores = mx.where(mask, (q @ keys.swapaxes(-1, -2)) / D**0.5, -mx.inf)
    weights = mx.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)) @ values


def ours(q, k, v, old_keys, old_values, bias):
    keys, values = mx.concatenate([old_keys, k], axis=2), mx.concatenate([old_values, v], axis=2)
    return segment_attention(q, k, v, keys, values, bias)


def both(inputs: list[mx.array], mask: mx.array | str) -> tuple[list, list]:
    """Output and gradients with respect to q, k and v, of our attention and of plain attention."""
    *given_arrays, direction = inputs
    M = given_arrays[3].shape[2]
    visible = mx.arange(M + S) <= mx.arange(M, M + S)[:, None] if isinstance(mask, str) else mask
    results = []
    for attention, how in ((ours, as_bias(mask, S, M + S, direction.dtype)), (plain, visible)):

        def along(q, k, v, attention=attention, how=how):
            return (attention(q, k, v, *given_arrays[3:], how) * direction).astype(mx.float32).sum()

        gradients = mx.grad(along, argnums=(0, 1, 2))(*given_arrays[:3])
        results.append([attention(*given_arrays, how), *gradients])
    return tuple([np.array(a.astype(mx.float32)) for a in result] for result in results)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    B=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    M=st.integers(0, 11),
    filling=st.booleans(),
)
def test_output_and_gradients_equal_plain_attention(seed, B, kv_heads, groups, M, filling):
    """With full memory, and with lanes that see different parts of their memory."""
    mask = "causal"
    if filling:
        seen = np.random.default_rng(seed).random((B, 1, 1, M + S)) < 0.5
        seen = seen | (np.arange(M + S) >= M)
        mask = mx.array(seen & (np.arange(M + S) <= np.arange(M, M + S)[:, None]))
    for actual, expected in zip(*both(arrays(seed, B, kv_heads, groups, M, mx.float32), mask), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_bfloat16_is_close_to_float32(groups):
    """Within a few units of its 8 significant bits, for values near 1."""
    inputs = arrays(0, 2, 2, groups, 11, mx.bfloat16)
    exact, _ = both([a.astype(mx.float32) for a in inputs], "causal")
    rounded, _ = both(inputs, "causal")
    for actual, expected in zip(rounded, exact, strict=True):
        np.testing.assert_allclose(actual, expected, atol=0.06)


def test_bfloat16_error_with_a_common_key_component_is_no_larger_than_mlx():
    """The gradients of a row's scores must sum to zero; otherwise the query's gradient is off by the mean key."""
    errors = []
    for seed in range(4):
        q, k, v, old_keys, old_values, dy = arrays(seed, 2, 2, 1, 200, mx.bfloat16)
        inputs = (q, k + 3, v, old_keys + 3, old_values, dy)
        exact = both([a.astype(mx.float32) for a in inputs], "causal")[1]
        errors.append([np.abs(side[1] - exact[1]).mean() for side in both(inputs, "causal")])
    ours_off, theirs_off = np.mean(errors, axis=0)
    assert ours_off < 1.15 * theirs_off


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_masked_entries_have_weight_zero(dtype):
    bias = as_bias("causal", 3, 5, dtype)
    assert bias.dtype == dtype
    weights = mx.softmax(mx.random.normal((3, 5)).astype(dtype) + bias, axis=-1)
    np.testing.assert_array_equal(np.array(weights.astype(mx.float32)) > 0, np.array(bias == 0))
    np.testing.assert_array_equal(np.array(bias == 0), np.tri(3, 5, 2, dtype=bool))


def test_memory_has_no_gradient():
    q, k, v, old_keys, old_values, _ = arrays(0, 1, 2, 1, 7, mx.float32)
    bias = as_bias("causal", S, 7 + S, mx.float32)
    gradients = mx.grad(lambda *old: ours(q, k, v, *old, bias).sum(), argnums=(0, 1))(old_keys, old_values)
    assert not any(np.array(g).any() for g in gradients)


def test_is_fused_only_on_cuda_in_16_bits():
    cuda = mx.default_device().type == mx.DeviceType.gpu and mx.cuda.is_available()
    assert [is_fused(dtype, 128, 64) for dtype in (mx.float32, mx.bfloat16)] == [False, cuda]
    assert not is_fused(mx.bfloat16, 64, 64)
