import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.tiny import tiny_config

from dsmr_mlx.training.optimizer import global_norm, learning_rate, make_optimizer


def test_learning_rate_warms_up_from_above_zero_and_ends_at_the_minimum():
    config = tiny_config(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=9)
    rates = [learning_rate(config, step, progress=0.0) for step in range(12)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:] == [1.0] * 3
    assert rates == sorted(rates)
    decay = [learning_rate(config, 100, p) for p in (0, 0.25, 0.5, 0.75, 1, 1.5)]
    assert decay[2] == pytest.approx(0.55)
    assert decay[-2:] == pytest.approx([0.1, 0.1])
    assert decay == sorted(decay, reverse=True)


def test_updates_equal_adamw_with_bias_correction():
    """Three updates equal AdamW in float64 (Loshchilov & Hutter 2019, algorithm 2); only matrices decay."""
    config = tiny_config(weight_decay=0.3, beta1=0.8, beta2=0.9, learning_rate=0.05)
    rng = np.random.default_rng(0)
    expected = {"matrix": rng.normal(size=(3, 2)), "gain": rng.normal(size=3)}
    parameters = {k: mx.array(v.astype(np.float32)) for k, v in expected.items()}
    moments = dict.fromkeys(expected, (0.0, 0.0))
    optimizer = make_optimizer(config)
    optimizer.init(parameters)
    for t in range(1, 4):
        gradients = {k: rng.normal(size=v.shape) for k, v in expected.items()}
        parameters = optimizer.apply_gradients(
            {k: mx.array(g.astype(np.float32)) for k, g in gradients.items()}, parameters
        )
        for k, g in gradients.items():
            m, v = 0.8 * moments[k][0] + 0.2 * g, 0.9 * moments[k][1] + 0.1 * g * g
            moments[k] = m, v
            step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
            decay = 0.3 if k == "matrix" else 0.0
            expected[k] = expected[k] - 0.05 * (step + decay * expected[k])
    for name, value in tree_flatten(parameters):
        np.testing.assert_allclose(np.array(value), expected[name], rtol=1e-5, atol=1e-6)


def test_global_norm_is_the_norm_of_all_gradients():
    arrays = [np.arange(6.0).reshape(2, 3), np.array([7.0, -8.0])]
    expected = np.linalg.norm(np.concatenate([a.ravel() for a in arrays]))
    assert global_norm([mx.array(a) for a in arrays]).item() == pytest.approx(expected, rel=1e-6)
