"""Key/value heads are averaged: the weights, what the model computes, the record, errors."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support import checkpoints
from support.tiny import TOKENIZER

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.convert.heads import average_kv_heads, with_kv_heads
from dsmr_mlx.convert.importing import plan_conversion, write_conversion
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR


def config(**options) -> ModelConfig:
    values = {"vocab_size": 19, "d_model": 16, "n_layers": 2, "n_heads": 8, "head_dim": 4, "d_ff": 24}
    return ModelConfig(**(values | {"segment_length": 8, "horizons": [16, 8]} | options))


@settings(max_examples=20, deadline=None)
@given(before=st.sampled_from([2, 4, 8]), fewer=st.sampled_from([1, 2, 4]), bias=st.booleans(), seed=st.integers(0, 9))
def test_rows_are_the_means_of_neighbouring_heads(before, fewer, bias, seed):
    if before <= fewer:
        return
    old, new = config(n_kv_heads=before), config(n_kv_heads=fewer)
    array = np.random.default_rng(seed).normal(size=((8 + 2 * before) * 4, *(() if bias else (16,)))).astype(np.float32)
    name = f"layers.0.attention.qkv.{'bias' if bias else 'weight'}"
    found = np.array(average_kv_heads(name, mx.array(array), old, new))
    heads = array.reshape(8 + 2 * before, 4, -1)
    groups = [heads[8 + kind * before :][:before] for kind in (0, 1)]
    size = before // fewer
    expected = [*heads[:8], *(g[i : i + size].mean(axis=0) for g in groups for i in range(0, before, size))]
    np.testing.assert_allclose(found, np.concatenate(expected).reshape(found.shape), atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_means_of_values_in_16_bits_are_not_rounded(dtype):
    old, new = config(n_kv_heads=2), config(n_kv_heads=1)
    array = mx.random.normal(((8 + 4) * 4, 16)).astype(dtype)
    found = average_kv_heads("layers.0.attention.qkv.weight", array, old, new)
    expected = average_kv_heads("layers.0.attention.qkv.weight", array.astype(mx.float32), old, new)
    assert found.dtype == mx.float32
    assert mx.array_equal(found, expected)


def test_equal_heads_stay_and_the_model_computes_the_same():
    """If the heads of a group are copies, their mean is exact, whichever query head reads them."""
    fewer = DSMR(config(n_kv_heads=2, qk_norm=True, value_residual=True))
    weights = dict(tree_flatten(fewer.parameters()))
    for name, array in weights.items():
        if ".attention.qkv." in name:
            heads = array.reshape(8 + 4, 4, -1)
            copied = mx.concatenate([heads[:8], mx.repeat(heads[8:], 2, axis=0)])
            weights[name] = copied.reshape(-1, array.shape[1])
    before = config(n_kv_heads=4, qk_norm=True, value_residual=True)
    model = DSMR(before)
    model.load_weights(list(weights.items()))
    tokens = mx.array(np.random.default_rng(0).integers(0, 19, (2, 30)))
    np.testing.assert_allclose(np.array(model(tokens)[0]), np.array(fewer(tokens)[0]), atol=1e-5)
    for name, array in weights.items():
        back = average_kv_heads(name, array, before, with_kv_heads(before, 2))
        np.testing.assert_allclose(np.array(back), np.array(dict(tree_flatten(fewer.parameters()))[name]), atol=1e-7)


def test_a_checkpoint_is_converted_and_recorded(run, tmp_path):
    model = checkpoints.save(tmp_path / "model", TOKENIZER, n_heads=4, head_dim=8)
    ended = run("convert", tmp_path / "model", "fewer", "--kv-heads", 2, "--horizons", "full:64")
    assert ended.code == 0, ended.err
    assert "4 heads of 8, 2 for keys" in ended.out
    assert "a warm start: key/value heads are averaged" in ended.out
    found, _ = checkpoint.load("fewer")
    assert (found.config.n_kv_heads, found.config.horizons) == (2, [64, 64])
    old, new = (dict(tree_flatten(m.parameters())) for m in (model, found))
    for name, array in old.items():
        expected = average_kv_heads(name, array, model.config, found.config)
        np.testing.assert_allclose(np.array(new[name]), np.array(expected), atol=1e-6)
    record = json.loads(Path("fewer/conversion.json").read_text(encoding="utf-8"))
    assert record["kv_heads"] == {"from": 4, "to": 2}
    assert (record["exact_tokens"], record["warm_start"]) == (0, True)


def test_averaged_heads_can_be_quantized_and_verified_before(tmp_path):
    """What is verified are the weights before they are averaged."""
    pytest.importorskip("torch")
    from dsmr_mlx.convert.verification import verify

    checkpoints.save(tmp_path / "model", TOKENIZER, d_model=32, n_heads=4, head_dim=8, d_ff=32)
    quantization = {"bits": 8, "group_size": 32}
    conversion = plan_conversion(tmp_path / "model", kv_heads=1, quantization=quantization)
    assert verify(conversion).passed
    assert conversion.compared == ("the weights before they are averaged to 1 key/value heads and quantized to 8 bits")
    write_conversion(conversion, tmp_path / "fewer")
    assert checkpoint.load(tmp_path / "fewer")[0].config.n_kv_heads == 1


@pytest.mark.parametrize(
    ("kv_heads", "message"),
    [
        (3, "`kv_heads` 3: the model has 4 key/value heads, expected 1 or 2"),
        (4, "`kv_heads` 4: the model has 4 key/value heads, expected 1 or 2"),
        (0, "`kv_heads` 0: "),
        (-2, "`kv_heads` -2: "),
    ],
)
def test_other_numbers_of_heads_are_refused(kv_heads, message):
    with pytest.raises(UserError, match=message):
        with_kv_heads(config(n_kv_heads=4), kv_heads)
    with pytest.raises(UserError, match="the model has 1 key/value head, which cannot be reduced"):
        with_kv_heads(config(n_kv_heads=1), 1)


def test_the_command_names_its_option(run, tmp_path):
    checkpoints.save(tmp_path / "model", TOKENIZER, n_heads=4)
    ended = run("convert", tmp_path / "model", "fewer", "--kv-heads", 3)
    assert ended.code == 2
    assert "--kv-heads 3: the model has 4 key/value heads, expected 1 or 2" in ended.err
    ended = run("convert", "--to-pytorch", tmp_path / "model", "out.pt", "--kv-heads", 2)
    assert ended.code == 2
    assert "--kv-heads: not with --to-pytorch" in ended.err
