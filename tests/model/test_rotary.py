"""Rotary positions compared with float64 arithmetic, and their scalings with transformers."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dense_reference import rope, rope_frequencies

from dsmr_mlx import ModelConfig
from dsmr_mlx.model import rotary
from dsmr_mlx.model.rotary import Angles, rotate, wave_periods
from dsmr_mlx.model.state import RecurrentState, rebase_interval


def make_config(**options) -> ModelConfig:
    defaults = {"vocab_size": 10, "d_model": 8, "n_heads": 2, "head_dim": 16, "segment_length": 4}
    return ModelConfig(**(defaults | {"n_layers": 1, "horizons": [7]} | options))


@st.composite
def configs(draw):
    factor = st.floats(0.5, 40)
    scaling = draw(st.sampled_from([None, "linear", "llama3"]))
    if scaling == "linear":
        scaling = {"type": "linear", "factor": draw(factor)}
    elif scaling == "llama3":
        low = draw(st.floats(0.5, 4))
        length = draw(st.integers(8, 20_000))
        scaling = {"type": "llama3", "factor": draw(factor), "low_freq_factor": low, "original_length": length}
        scaling["high_freq_factor"] = low + draw(st.floats(0.1, 8))
    return make_config(
        rope_dims=draw(st.sampled_from([2, 6, 16])),
        rope_theta=draw(st.sampled_from([100.0, 10_000.0, 500_000.0])),
        rope_interleaved=draw(st.booleans()),
        rope_scaling=scaling,
    )


def random_keys(T: int, lanes: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(T).normal(size=(lanes, 2, T, 16)).astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(config=configs(), start=st.integers(0, 2000))
def test_rows_are_rotated_by_their_position(config, start):
    """By MLX's kernel and with shared angles. Tolerance: float32 angles at position 2,000."""
    x = random_keys(12)
    for angles in (None, Angles.of(config, mx.array([start]), 12)):
        np.testing.assert_allclose(rotate(x, config, start, angles), rope(x, config, start), atol=5e-4)


@settings(max_examples=20, deadline=None)
@given(config=configs())
def test_lanes_have_separate_positions(config):
    x = random_keys(5, lanes=3)
    expected = mx.concatenate([rope(x[i : i + 1], config, start) for i, start in enumerate((0, 31, 400))])
    offset = mx.array([0, 31, 400])
    for angles in (None, Angles.of(config, offset, 5)):
        np.testing.assert_allclose(rotate(x, config, offset, angles), expected, atol=2e-4)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_with_shared_angles_equal_those_of_the_kernel(interleaved, dtype):
    config = make_config(rope_dims=6, rope_interleaved=interleaved)
    x, offset = random_keys(5, lanes=2).astype(dtype), mx.array([3, 40])
    angles = Angles.of(config, offset, 5)
    found, expected = (
        mx.grad(lambda x, angles=angles: (rotate(x, config, offset, angles) * mx.sin(x)).sum())(x)
        for angles in (angles, None)
    )
    assert found.dtype == dtype
    close = {"atol": 1e-5 if dtype == mx.float32 else 5e-2}
    np.testing.assert_allclose(found.astype(mx.float32), expected.astype(mx.float32), **close)


def test_a_gpu_computes_its_own_angles(monkeypatch):
    monkeypatch.setattr(rotary, "on_gpu", lambda: True)
    assert Angles.of(make_config(), mx.array([0]), 5) is None


@settings(max_examples=30, deadline=None)
@given(config=configs())
def test_rebased_key_equals_key_at_the_new_position(config):
    """Tolerance: float32 angles at the interval, 8,192; without scaling the same offset would be wrong by about 1."""
    interval = rebase_interval(config)
    slots = config.horizons[0] + config.segment_length
    x = random_keys(slots)
    state = RecurrentState.empty(config, 1)
    state.layers = [{"keys": rotate(x, config, interval + 20), "values": x}]
    keys, values = state._rebased().layers[0].values()
    np.testing.assert_allclose(keys, rope(x, config, 20), atol=4e-3)
    assert mx.array_equal(values, x)
    assert mx.array_equal(keys[..., config.rope_dims :], x[..., config.rope_dims :])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [1024, 8192])
def test_llama3_periods_equal_transformers(head_dim, length):
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    bands = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters = bands | {"rope_type": "llama3", "rope_theta": 500_000.0, "original_max_position_embeddings": length}
    llama = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=parameters
    )
    frequencies, attention_factor = utils.ROPE_INIT_FUNCTIONS["llama3"](llama, "cpu")
    periods = wave_periods(head_dim, 500_000.0, bands | {"type": "llama3", "original_length": length})
    np.testing.assert_allclose(1 / periods, frequencies.numpy(), rtol=2e-6)
    assert attention_factor == 1.0


def test_three_bands_of_llama3():
    """Short waves are unscaled, long ones eight times as long, one is interpolated; in the reference as well."""
    scaling = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 100}
    plain = make_config(head_dim=8)
    config = make_config(head_dim=8, rope_scaling=scaling)
    stretched = rope_frequencies(plain) / rope_frequencies(config)
    assert stretched[[0, 2, 3]].tolist() == pytest.approx([1, 8, 8])
    assert 1 < stretched[1] < 8
    np.testing.assert_allclose(wave_periods(8, 10_000.0, scaling), 1 / rope_frequencies(config), rtol=1e-6)
