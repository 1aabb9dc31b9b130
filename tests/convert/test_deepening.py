"""Layers are followed by copies: the model computes the same, the copies can learn, the record, errors."""

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from support import checkpoints
from support.tiny import TOKENIZER

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.convert.deepening import with_copies, with_copy
from dsmr_mlx.convert.importing import plan_conversion, write_conversion
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR


def config(**options) -> ModelConfig:
    values = {"vocab_size": 19, "d_model": 16, "n_layers": 3, "n_heads": 4, "head_dim": 4, "d_ff": 24}
    values |= {"segment_length": 8, "horizons": [16, 8, 24], "zero_init": False}
    return ModelConfig(**(values | options))


def deepened(model: DSMR, layers: list[int]) -> DSMR:
    """A model with copies of these layers of another; all its parameters must be given."""
    deeper = DSMR(with_copies(model.config, layers))
    parameters = tree_flatten(model.parameters())
    deeper.load_weights([part for name, array in parameters for part in with_copy(name, array, layers)])
    return deeper


@settings(deadline=None, max_examples=20)
@given(
    layers=st.lists(st.integers(1, 2), unique=True),
    recipe=st.booleans(),
    biases=st.booleans(),
    parallel=st.booleans(),
)
def test_the_deeper_model_computes_the_same(layers, recipe, biases, parallel):
    model = DSMR(
        config(
            **dict.fromkeys(("value_residual", "embedding_skip", "canon", "qk_norm"), recipe),
            **dict.fromkeys(("attention_bias", "output_bias", "feed_forward_bias"), biases),
            parallel_residual=parallel,
        )
    )
    model.update(tree_map(lambda array: array + 0.3 * mx.random.normal(array.shape), model.parameters()))
    tokens = mx.random.randint(0, 19, (2, 21))
    np.testing.assert_array_equal(np.array(deepened(model, layers)(tokens)[0]), np.array(model(tokens)[0]))


def test_copies_stand_after_their_layers_and_learn():
    model = DSMR(config(value_residual=True, embedding_skip=True, canon=True))
    deeper, tokens = deepened(model, [2, 1]), mx.random.randint(0, 19, (2, 21))
    assert deeper.config.horizons == [16, 8, 8, 24, 24]
    before, after = (dict(tree_flatten(m.parameters())) for m in (model, deeper))
    for layer, place in enumerate((0, 1, 3)):
        for name in (name for name in before if name.startswith(f"layers.{layer}.")):
            assert mx.array_equal(after[name.replace(f".{layer}.", f".{place}.", 1)], before[name]), name
    gradient = nn.value_and_grad(deeper, lambda tokens: nn.losses.cross_entropy(deeper(tokens)[0], tokens).mean())
    for place in (2, 4):
        layer = gradient(tokens)[1]["layers"][place]
        for part in (layer["attention"]["out"], layer["feed_forward"]["down"]):
            assert (np.abs(np.array(part["weight"])).max(axis=0) > 0).all()
        assert deeper.layers[place].skip.tolist() == [1, 0]


def test_a_checkpoint_is_converted_and_recorded(run, tmp_path):
    model = checkpoints.save(tmp_path / "model", TOKENIZER, n_layers=3, horizons="custom:32,16,16")
    ended = run("convert", tmp_path / "model", "deeper", "--copy-layers", "1,2", "--horizons", "custom:16,32,16")
    assert ended.code == 0, ended.err
    assert "model: 5 layers" in ended.out
    assert "copies after 1, 2, counted from 0: no effect before train --init" in ended.out
    found, _ = checkpoint.load("deeper")
    assert found.config.horizons == [16, 32, 32, 16, 16]
    tokens = mx.random.randint(0, found.config.vocab_size, (1, 16))
    np.testing.assert_allclose(np.array(found(tokens)[0]), np.array(model(tokens)[0]), atol=1e-5)
    assert json.loads(Path("deeper/conversion.json").read_text(encoding="utf-8"))["copy_layers"] == [1, 2]
    for layers, message in (
        ("3", "--copy-layers 3: expected different numbers from 0 to 2"),
        ("1,1", "--copy-layers 1,1: expected different numbers from 0 to 2"),
        ("one", "'one': expected numbers of layers such as 2,4"),
    ):
        ended = run("convert", tmp_path / "model", "refused", "--copy-layers", layers)
        assert ended.code == 2
        assert message in ended.err


def test_copies_can_be_quantized_and_verified_before(tmp_path):
    pytest.importorskip("torch")
    from dsmr_mlx.convert.verification import verify

    model = checkpoints.save(tmp_path / "model", TOKENIZER, d_model=32, n_heads=4, head_dim=8, d_ff=32)
    last = model.config.n_layers - 1
    conversion = plan_conversion(
        tmp_path / "model", copy_layers=[last], dtype="bfloat16", quantization={"bits": 8, "group_size": 32}
    )
    assert verify(conversion).passed
    assert conversion.compared == (
        f"the weights before they are deepened to {last + 2} layers and cast to bfloat16 and quantized to 8 bits"
    )
    write_conversion(conversion, tmp_path / "deeper")
    found, _ = checkpoint.load(tmp_path / "deeper")
    assert np.isfinite(np.array(found(mx.array([[1, 2, 3]]))[0])).all()


def test_the_first_layer_is_copied_unless_others_mix_in_its_values():
    assert with_copies(config(), [0]).horizons == [16, 16, 8, 24]
    for options, layers, expected in (
        ({"value_residual": True}, [0], "`copy_layers` 0: expected different numbers from 1 to 2"),
        ({}, [-1], "`copy_layers` -1: expected different numbers from 0 to 2"),
        ({"value_residual": True, "n_layers": 1, "horizons": [8]}, [0], "expected none for this model"),
    ):
        with pytest.raises(UserError, match=re.escape(expected)):
            with_copies(config(**options), layers)
