"""Feed-forward layers are widened: the model computes the same, the new units can learn, the record, errors."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from support import checkpoints
from support.tiny import TOKENIZER

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.convert.importing import plan_conversion, write_conversion
from dsmr_mlx.convert.widening import widen_feed_forward, with_d_ff
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR


def config(**options) -> ModelConfig:
    values = {"vocab_size": 19, "d_model": 16, "n_layers": 2, "n_heads": 4, "head_dim": 4, "d_ff": 24}
    return ModelConfig(**(values | {"segment_length": 8, "horizons": [16, 8]} | options))


def widened(model: DSMR, d_ff: int) -> DSMR:
    """A model of `d_ff` units that is made from another."""
    wider = DSMR(with_d_ff(model.config, d_ff))
    wider.load_weights(
        [(name, widen_feed_forward(name, array, model.config, wider.config)) for name, array in weights(model).items()]
    )
    return wider


def weights(model: DSMR) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_wider_model_computes_the_same_and_its_new_units_learn(gated, bias):
    model = DSMR(config(gated=gated, feed_forward_bias=bias, zero_init=False))
    if bias:
        model.update({"layers": [{"feed_forward": {"down": {"bias": mx.random.normal((16,))}}}] * 2})
    wider, tokens = widened(model, 40), mx.random.randint(0, 19, (2, 21))
    np.testing.assert_allclose(np.array(wider(tokens)[0]), np.array(model(tokens)[0]), atol=1e-5)
    gradient = nn.value_and_grad(wider, lambda tokens: nn.losses.cross_entropy(wider(tokens)[0], tokens).mean())
    for layer in gradient(tokens)[1]["layers"]:
        assert (np.abs(np.array(layer["feed_forward"]["down"]["weight"][:, 24:])).max(axis=0) > 0).all()


def test_new_units_are_drawn_and_old_ones_stay_in_place():
    model = DSMR(config())
    wider, again = (weights(widened(model, 40)) for _ in range(2))
    assert all(mx.array_equal(array, again[name]) for name, array in wider.items())
    first, second = (wider[f"layers.{i}.feed_forward.gate_up.weight"].reshape(2, 40, 16) for i in range(2))
    old = weights(model)["layers.0.feed_forward.gate_up.weight"].reshape(2, 24, 16)
    assert mx.array_equal(first[:, :24], old)
    new = np.stack([first[:, 24:], second[:, 24:]])
    assert len(np.unique(new)) == new.size
    assert new.std() == pytest.approx(16**-0.5, rel=0.1)
    for name, array in weights(model).items():
        if ".feed_forward." not in name:
            assert mx.array_equal(array, wider[name]), name


def test_units_of_a_model_that_is_widened_twice_differ():
    model = DSMR(config())
    twice = weights(widened(widened(model, 40), 56))
    for name in ("layers.0.feed_forward.gate_up.weight", "layers.1.feed_forward.gate_up.weight"):
        assert len(np.unique(np.array(twice[name]), axis=0)) == 2 * 56, name


def test_a_checkpoint_is_converted_and_recorded(run, tmp_path):
    model = checkpoints.save(tmp_path / "model", TOKENIZER)
    d_ff = model.config.d_ff + 16
    ended = run("convert", tmp_path / "model", "wider", "--d-ff", d_ff)
    assert ended.code == 0, ended.err
    assert f"feed-forward layers: {d_ff} units, 16 of them new: no effect before train --init" in ended.out
    found, _ = checkpoint.load("wider")
    assert found.config == with_d_ff(model.config, d_ff)
    tokens = mx.random.randint(0, found.config.vocab_size, (1, 30))
    np.testing.assert_allclose(np.array(found(tokens)[0]), np.array(model(tokens)[0]), atol=1e-5)
    record = json.loads(Path("wider/conversion.json").read_text(encoding="utf-8"))
    assert record["d_ff"] == {"from": d_ff - 16, "to": d_ff}
    ended = run("convert", tmp_path / "model", "narrower", "--d-ff", 8)
    assert ended.code == 2
    assert f"--d-ff 8: the model has {d_ff - 16} units, expected more" in ended.err


def test_wider_layers_can_be_quantized_and_verified_before(tmp_path):
    pytest.importorskip("torch")
    from dsmr_mlx.convert.verification import verify

    checkpoints.save(tmp_path / "model", TOKENIZER, d_model=32, n_heads=4, head_dim=8, d_ff=32)
    conversion = plan_conversion(
        tmp_path / "model", kv_heads=1, d_ff=64, dtype="bfloat16", quantization={"bits": 8, "group_size": 32}
    )
    assert verify(conversion).passed
    assert conversion.compared == (
        "the weights before they are averaged to 1 key/value heads and widened to 64 feed-forward units and cast to "
        "bfloat16 and quantized to 8 bits"
    )
    write_conversion(conversion, tmp_path / "wider")
    assert checkpoint.load(tmp_path / "wider")[0].config.d_ff == 64


def test_fewer_units_are_refused():
    for d_ff in (24, 23, 0, -1):
        with pytest.raises(UserError, match=f"`d_ff` {d_ff}: the model has 24 units, expected more"):
            with_d_ff(config(), d_ff)
