"""Transforms equal NumPy and their definition, row by row."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmr_mlx import ModelConfig
from dsmr_mlx.convert.transforms import TRANSFORMS

V = 11
GROUPED = ModelConfig(vocab_size=V, d_model=6, n_heads=6, n_kv_heads=2, head_dim=2)
INPUTS = {
    "concatenate": [(4, 6), (2, 6)],
    "concatenate_transposed": [(6, 4), (6, 2)],
    "concatenate_untiled": [(12, 6), (4, 6), (4, 6)],
    "split_groups": [(20, 6)],
    "untile_columns": [(6, 12)],
}


MOVING = [name for name, transform in TRANSFORMS.items() if not transform.computes and name != "zero_bias"]


def bits(*arrays: mx.array) -> list[int]:
    """Return the bits of all values, sorted."""
    return sorted(value for array in arrays for value in mx.contiguous(array).reshape(-1).view(mx.uint16).tolist())


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_transforms_return_the_stated_shape_and_dtype(name, dtype):
    """The dtype of their inputs, or float32 if they compute."""
    shapes = INPUTS.get(name, [(4, 6)])
    result = TRANSFORMS[name].apply([mx.random.normal(shape).astype(dtype) for shape in shapes], GROUPED)
    assert result.shape == TRANSFORMS[name].shape(shapes)
    assert result.dtype == (mx.float32 if TRANSFORMS[name].computes else dtype)


@pytest.mark.parametrize("name", MOVING)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1 << 20), dtype=st.sampled_from([mx.bfloat16, mx.float16]))
def test_moved_values_keep_their_bits(name, seed, dtype):
    """Also those of NaN."""
    rng, shapes = np.random.default_rng(seed), INPUTS.get(name, [(4, 6)])
    stored = [mx.array(rng.integers(0, 1 << 16, shape, np.uint16)).view(dtype) for shape in shapes]
    assert bits(TRANSFORMS[name].apply(stored, GROUPED)) == bits(*stored)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1 << 20), dtype=st.sampled_from([mx.bfloat16, mx.float16]), tied=st.booleans())
def test_values_in_16_bits_are_computed_in_float32(seed, dtype, tied):
    """A gain of 1 + 2⁻⁹ is not rounded to 1."""
    config = ModelConfig(vocab_size=V, d_model=6, tie_embeddings=tied)
    stored = mx.array(np.random.default_rng(seed).normal(scale=0.01, size=50).astype(np.float32)).astype(dtype)
    x = np.array(stored.astype(mx.float32), np.float64)
    scale = 6**-0.5
    exact = {"add_one": x + 1, "scale_by_width": x * scale, "add_one_scale_if_tied": (x + 1) * (scale if tied else 1)}
    assert exact.keys() == {name for name, transform in TRANSFORMS.items() if transform.computes}
    for name, expected in exact.items():
        np.testing.assert_allclose(np.array(TRANSFORMS[name].apply([stored], config)), expected, rtol=3e-7)


@settings(max_examples=20, deadline=None)
@given(kv_heads=st.integers(1, 3), per_group=st.integers(1, 3), D=st.integers(1, 3), bias=st.booleans())
def test_heads_are_reordered_correctly(kv_heads, per_group, D, bias):
    """Every head of a joint or tiled weight is at its place in [all q, all k, all v]."""
    H, d = kv_heads * per_group, 5
    config = ModelConfig(vocab_size=V, d_model=d, n_heads=H, n_kv_heads=kv_heads, head_dim=D, rope_dims=0)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(n, D) + (() if bias else (d,))).astype(np.float32) for n in (H, kv_heads, kv_heads))
    expected = np.concatenate([q, k, v]).reshape(-1, *q.shape[2:])

    joint = [part for g in range(kv_heads) for part in (*q[g * per_group : (g + 1) * per_group], k[g], v[g])]
    split = TRANSFORMS["split_groups"].apply([mx.array(np.concatenate(joint))], config)
    np.testing.assert_array_equal(split, expected)

    # In x-transformers, query head r * H_kv + g is the r-th that uses key head g.
    tiled = np.stack([q[g * per_group + r] for r in range(per_group) for g in range(kv_heads)])
    parts = [mx.array(part.reshape(-1, *q.shape[2:])) for part in (tiled, k, v)]
    np.testing.assert_array_equal(TRANSFORMS["concatenate_untiled"].apply(parts, config), expected)
    if not bias:
        out = [mx.array(tiled.reshape(H * D, d).T)]
        np.testing.assert_array_equal(TRANSFORMS["untile_columns"].apply(out, config), q.reshape(H * D, d).T)


def test_transforms_of_values():
    """Swapped halves, added 1, scaling by the width and zeros equal NumPy."""
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    config = ModelConfig(vocab_size=V, d_model=6, tie_embeddings=True)
    untied = ModelConfig(vocab_size=V, d_model=6, tie_embeddings=False)

    def made(name, config=config):
        return np.array(TRANSFORMS[name].apply([mx.array(x)], config))

    np.testing.assert_array_equal(made("swap_halves"), x[[2, 3, 0, 1]])
    np.testing.assert_array_equal(made("transpose"), x.T)
    np.testing.assert_array_equal(made("add_one"), x + 1)
    np.testing.assert_allclose(made("scale_by_width"), x / np.sqrt(6), rtol=1e-6)
    np.testing.assert_allclose(made("add_one_scale_if_tied"), (x + 1) / np.sqrt(6), rtol=1e-6)
    np.testing.assert_array_equal(made("add_one_scale_if_tied", untied), x + 1)
    np.testing.assert_array_equal(made("zero_bias"), np.zeros(4))
