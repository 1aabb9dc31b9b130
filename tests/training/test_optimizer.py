import importlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from support.tiny import tiny_config

from dsmr_mlx.tokenizers.ids import IdTokenizer
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.optimizer import ScaledOptimizer, global_norm, in_cooldown, make_optimizer, rate_factor

EXAMPLES = Path(__file__).parents[2] / "examples"
# Every kind of weight that a model can have.
EVERYTHING = {
    "d_ff": 40, "n_kv_heads": 1, "norm": "layer", "norm_bias": True, "attention_bias": True, "output_bias": True,
    "feed_forward_bias": True, "head_bias": True, "tie_embeddings": False, "max_positions": 30, "qk_norm": True,
    "value_residual": True, "embedding_skip": True, "canon": True,
}  # fmt: skip
RATES = {"learning_rate": 4e-3, "adamw_learning_rate": 3e-3, "min_learning_rate": 1e-4, "weight_decay": 0.5}


@pytest.fixture
def torch_model(monkeypatch):
    """Return a function that makes a model in PyTorch and the optimizer of `examples/pytorch_muon.py` for it."""
    pytest.importorskip("torch")
    from dsmr_mlx.convert.reference import DSMR

    monkeypatch.syspath_prepend(str(EXAMPLES))
    optimizer = importlib.import_module("pytorch_muon").Optimizer

    def make(config: TrainConfig):
        model = DSMR(config.model_config(IdTokenizer(30, "other")))
        return model, optimizer(model, config)

    return make


def random_gradients(rng: np.random.Generator, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: rng.normal(size=weight.shape).astype(np.float32) for name, weight in weights.items()}


def updated(optimizer: ScaledOptimizer, weights: dict, gradients: dict, factor: float = 1.0) -> dict[str, np.ndarray]:
    """Return weights after one update, in the same order: that of MLX's `MultiOptimizer` is by chance."""
    parameters, tree = (
        tree_unflatten([(name, mx.array(a)) for name, a in arrays.items()]) for arrays in (weights, gradients)
    )
    optimizer.scale_rates(mx.array(factor))
    new = dict(tree_flatten(optimizer.apply_gradients(tree, parameters)))
    return {name: np.array(new[name]) for name in weights}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("gated", [True, False])
def test_updates_equal_those_in_pytorch(torch_model, optimizer, gated):
    """10 steps on random gradients of all kinds of weights, with a rate that changes."""
    import torch

    torch.manual_seed(0)
    config = tiny_config(**EVERYTHING, **RATES, gated=gated, optimizer=optimizer)
    model, theirs = torch_model(config)
    mine, rng = make_optimizer(config), np.random.default_rng(0)
    start = weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    for step in range(10):
        gradients, factor = random_gradients(rng, weights), rate_factor(config, step, done=step / 10)
        for name, p in model.named_parameters():
            p.grad = torch.tensor(gradients[name])
        theirs.step(factor)
        weights = updated(mine, weights, gradients, factor)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(weights[name], p.detach().numpy(), rtol=0, atol=1e-5, err_msg=name)
        assert np.abs(weights[name] - start[name]).max() > 1e-3, name


def test_adamw_equals_its_definition():
    """Three updates equal AdamW in float64 (Loshchilov & Hutter 2019, algorithm 2); only matrices decay."""
    config = tiny_config(weight_decay=0.3, beta1=0.8, beta2=0.9, learning_rate=0.05)
    rng = np.random.default_rng(0)
    expected = {"matrix": rng.normal(size=(3, 2)), "a_canon": rng.normal(size=(2, 4)), "gain": rng.normal(size=3)}
    weights = {k: v.astype(np.float32) for k, v in expected.items()}
    moments = dict.fromkeys(expected, (0.0, 0.0))
    optimizer = make_optimizer(config)
    for t in range(1, 4):
        gradients = random_gradients(rng, expected)
        weights = updated(optimizer, weights, gradients)
        for k, g in gradients.items():
            m, v = 0.8 * moments[k][0] + 0.2 * g, 0.9 * moments[k][1] + 0.1 * g.astype(np.float64) ** 2
            moments[k] = m, v
            step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
            decay = 0.3 if k == "matrix" else 0.0
            expected[k] = expected[k] - 0.05 * (step + decay * expected[k])
    for name, value in weights.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


BLOCK = {
    "attention.qkv": (32, 16),
    "attention.out": (16, 16),
    "feed_forward.gate_up": (48, 16),
    "feed_forward.down": (16, 24),
}
STARTS = {"qkv": [16, 24], "out": [], "gate_up": [24], "down": []}  # rows at which another matrix begins


def test_muon_equals_its_definition():
    """Two updates of a block in float64, each matrix by itself; momentum and decay as in the docstring of `Muon`."""
    config = tiny_config(optimizer="muon", n_kv_heads=1, weight_decay=0.3, learning_rate=0.05)
    rng = np.random.default_rng(0)
    weights = {f"layers.0.{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in BLOCK.items()}
    expected = {name: weight.astype(np.float64) for name, weight in weights.items()}
    momenta, optimizer = dict.fromkeys(weights, 0.0), make_optimizer(config)
    for _ in range(2):
        gradients = random_gradients(rng, weights)
        weights = updated(optimizer, weights, gradients)
        for name, gradient in gradients.items():
            momenta[name] = 0.95 * momenta[name] + 0.05 * gradient.astype(np.float64)
            nesterov = 0.95 * momenta[name] + 0.05 * gradient
            starts = STARTS[name.split(".")[-2]]
            for u, w in zip(np.split(nesterov, starts), np.split(expected[name], starts), strict=True):
                w *= 1 - 0.05 * 0.3
                w -= 0.05 * 0.2 * max(u.shape) ** 0.5 * newton_schulz(u)
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, expected[name], rtol=0, atol=1e-5, err_msg=name)


def newton_schulz(u: np.ndarray) -> np.ndarray:
    """Apply the quintic to the singular values, which is what its matrix form does."""
    left, values, right = np.linalg.svd(u / np.linalg.norm(u), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_of_muon_are_about_as_large_as_those_of_adamw(dtype):
    """0.2 of the rate (root mean square), whatever the gradient's size; without a gradient there is only the decay."""
    config = tiny_config(optimizer="muon", weight_decay=0.0, learning_rate=0.01, dtype=dtype)
    weights = {"layers.0.attention.out.weight": np.ones((16, 16), np.float32)}
    for size in (1e-3, 1e3):
        gradients = {name: size * g for name, g in random_gradients(np.random.default_rng(0), weights).items()}
        (new,) = updated(make_optimizer(config), weights, gradients).values()
        assert np.sqrt(np.mean((new - 1) ** 2)) == pytest.approx(0.002, rel=0.2)
    config = tiny_config(optimizer="muon", weight_decay=0.5, learning_rate=0.01, dtype=dtype)
    (new,) = updated(make_optimizer(config), weights, {name: 0 * w for name, w in weights.items()}).values()
    np.testing.assert_allclose(new, 1 - 0.005, rtol=1e-6)


def test_muon_has_one_moment_for_matrices_of_the_blocks_and_two_for_other_weights(torch_model):
    config = tiny_config(**EVERYTHING, optimizer="muon")
    model, _ = torch_model(config)
    weights = [(name, mx.zeros(p.shape)) for name, p in model.named_parameters()]
    optimizer = make_optimizer(config)
    optimizer.init(tree_unflatten(weights))
    muon, adamw = ({n.rpartition(".")[0] for n, a in tree_flatten(s) if a.ndim} for s in optimizer.state["states"])
    kinds = ("attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down")
    assert muon == {f"layers.{i}.{kind}.weight" for i in range(config.n_layers) for kind in kinds}
    assert adamw == {name for name, _ in weights} - muon
    moments = sum(a.size for _, a in tree_flatten(optimizer.state) if a.ndim)
    assert moments == sum(w.size * (1 if name in muon else 2) for name, w in weights)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_rate_warms_up_from_above_zero_and_ends_at_the_minimum(schedule):
    config = tiny_config(learning_rate=2.0, min_learning_rate=0.2, warmup_steps=9, lr_schedule=schedule, cooldown=0.5)
    factors = [rate_factor(config, step, done=0.0) for step in range(12)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:] == [1.0] * 3
    assert factors == sorted(factors)
    falling = [rate_factor(config, 100, done) for done in (0, 0.25, 0.5, 0.75, 1, 1.5)]
    assert falling[3 if schedule == "wsd" else 2] == pytest.approx(0.55)
    assert falling[-2:] == pytest.approx([0.1, 0.1])
    assert falling == sorted(falling, reverse=True)


def test_wsd_is_constant_until_the_cooldown():
    config = tiny_config(lr_schedule="wsd", cooldown=0.3, warmup_steps=0, min_learning_rate=0.0)
    for done in np.linspace(0, 1, 101):
        assert (rate_factor(config, 100, done) < 1) <= in_cooldown(config, done)
        assert in_cooldown(config, done) == (done >= 0.7)
    assert rate_factor(config, 100, 0.85) == pytest.approx(0.5)
    for never in (tiny_config(lr_schedule="wsd", cooldown=0.0), tiny_config(lr_schedule="cosine")):
        assert not any(in_cooldown(never, done) for done in (0.0, 0.5, 1.0, 1.5))
    assert rate_factor(tiny_config(lr_schedule="wsd", cooldown=0.0), 100, 0.99) == 1.0
    assert in_cooldown(tiny_config(lr_schedule="wsd", cooldown=1.0), 0.0)


def test_global_norm_is_the_norm_of_all_gradients():
    arrays = [np.arange(6.0).reshape(2, 3), np.array([7.0, -8.0])]
    expected = np.linalg.norm(np.concatenate([a.ravel() for a in arrays]))
    assert global_norm([mx.array(a) for a in arrays]).item() == pytest.approx(expected, rel=1e-6)
