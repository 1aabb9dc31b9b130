"""Quantized models equal the network on dequantized weights, and are saved, loaded and used like any other."""

import json
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support.dense_reference import dense_logits
from support.recipe import RECIPE, randomized
from support.tiny import TOKENIZER, write_corpus

from dsmr_mlx import DSMR, ModelConfig, UserError, generate
from dsmr_mlx.evaluation import evaluate
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.quantization import is_quantized, quantize_arrays
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.settings import build_config

SCHEMES = st.fixed_dictionaries({"bits": st.sampled_from([4, 6, 8]), "group_size": st.sampled_from([32, 64])})


def make_model(quantization: dict | None, seed: int = 0, **options) -> DSMR:
    """A model whose weights depend only on the seed; biases and gains differ from their initial values."""
    defaults = {"vocab_size": 393, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16}
    defaults |= {"d_ff": 128, "segment_length": 8, "horizons": [19, 3]}
    mx.random.seed(seed)
    model = randomized(DSMR(ModelConfig(**(defaults | options))))
    weights = {
        name: array if array.ndim > 1 else mx.random.normal(array.shape, scale=0.3) + (name.endswith("weight"))
        for name, array in tree_flatten(model.parameters())
    }
    weights["embed.weight"] = mx.random.normal(weights["embed.weight"].shape)
    model.load_weights(list(weights.items()))
    if quantization is None:
        return model.eval()
    quantized = DSMR(ModelConfig(**(defaults | options | {"quantization": quantization})))
    parts = {}
    for name, array in weights.items():
        parts |= quantize_arrays(name, array, quantization) if is_quantized(name) else {name: array}
    return quantized.load_weights(list(parts.items()), strict=True).eval()


@st.composite
def architectures(draw):
    norm, tied = draw(st.sampled_from(["rms", "layer"])), draw(st.booleans())
    return {
        "norm": norm,
        "norm_bias": norm == "layer",
        "gated": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "feed_forward_bias": draw(st.booleans()),
        "tie_embeddings": tied,
        "head_bias": not tied and draw(st.booleans()),
        "max_positions": draw(st.sampled_from([None, 64])),
        "parallel_residual": draw(st.booleans()),
    } | draw(st.sampled_from([{}, RECIPE]))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(options=architectures(), quantization=SCHEMES)
def test_quantize_arrays_equals_quantize_model(options, quantization):
    """Names and bits are those of `mlx.nn.quantize`, so that a converter can work weight by weight."""
    expected = make_model(None, **options)
    learned = "positions" in expected and expected.pop("positions")
    nn.quantize(expected, quantization["group_size"], quantization["bits"])
    arrays = dict(tree_flatten(expected.parameters()))
    if learned:
        arrays["positions.weight"] = learned.weight
    model = make_model(quantization, **options)
    found = dict(tree_flatten(model.parameters()))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype, name
        assert mx.array_equal(found[name], array), name
    assert {name for name, _ in model.named_modules() if f"{name}.scales" in found} == {
        name.removesuffix(".weight") for name in found if is_quantized(name)
    }


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(options=architectures(), quantization=SCHEMES, T=st.integers(1, 40))
def test_quantized_model_equals_reference_on_dequantized_weights(options, quantization, T):
    model = make_model(quantization, **options)
    tokens = np.random.default_rng(T).integers(0, TOKENIZER.vocab_size, (2, T))
    half, state = model(mx.array(tokens[:, : T // 2]))
    rest, _ = model(mx.array(tokens[:, T // 2 :]), state)
    expected = dense_logits(model, tokens)
    np.testing.assert_allclose(mx.concatenate([half, rest], axis=1), expected, atol=2e-4, rtol=2e-4)


def test_more_bits_are_more_exact():
    tokens = mx.array(np.random.default_rng(0).integers(0, TOKENIZER.vocab_size, (2, 30)))
    exact, _ = make_model(None)(tokens)
    four, six, eight = (
        mx.abs(make_model({"bits": bits, "group_size": 32})(tokens)[0] - exact).mean().item() for bits in (4, 6, 8)
    )
    assert 3 * eight < six
    assert 2 * six < four < 0.2 * mx.abs(exact).mean().item()


@settings(max_examples=20, deadline=None)
@given(options=architectures(), quantization=SCHEMES)
def test_quantization_does_not_change_the_number_of_parameters(options, quantization):
    assert make_model(quantization, **options).n_parameters == make_model(None, **options).n_parameters


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embed.weight", True),
        ("head.weight", True),
        ("head.bias", False),
        ("positions.weight", False),
        ("norm.weight", False),
        ("layers.11.attention_norm.weight", False),
        ("layers.11.attention.qkv.weight", True),
        ("layers.11.attention.qkv.bias", False),
        ("layers.0.attention.out.weight", True),
        ("layers.0.feed_forward_norm.bias", False),
        ("layers.0.feed_forward.gate_up.weight", True),
        ("layers.0.feed_forward.up.weight", True),
        ("layers.0.feed_forward.down.weight", True),
        ("weight", False),
        ("embed.scales", False),
    ],
)
def test_is_quantized(name, expected):
    assert is_quantized(name) is expected


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_checkpoint_in_evaluation_and_generation(tmp_path, bits, dtype):
    quantization = {"bits": bits, "group_size": 32}
    model = make_model(quantization)
    model.set_dtype(dtype)
    checkpoint.save_model(tmp_path / "c", model.config, model.parameters(), TOKENIZER)
    loaded, tokenizer = checkpoint.load(tmp_path / "c", as_stored=True)
    assert loaded.config == model.config
    assert loaded.config.quantization == quantization
    for (name, a), (_, b) in zip(tree_flatten(model.parameters()), tree_flatten(loaded.parameters()), strict=True):
        assert a.dtype == b.dtype, name
        assert mx.array_equal(a, b), name
    assert loaded.new_state(1).dtype == dtype
    corpus = write_corpus(tmp_path / "corpus", train=1, validation=1, notes=4)
    assert evaluate(loaded, corpus).perplexity == evaluate(model, corpus).perplexity
    ids = list(generate(loaded, tokenizer, tokens=12))
    assert ids == list(generate(model, tokenizer, tokens=12))
    assert len(ids) >= 12


def test_quantized_checkpoint_is_small(tmp_path):
    sizes = {}
    for quantization in (None, {"bits": 4, "group_size": 64}, {"bits": 8, "group_size": 64}):
        model = make_model(quantization)
        folder = tmp_path / str(quantization)
        checkpoint.save_model(folder, model.config, model.parameters(), TOKENIZER)
        sizes[quantization and quantization["bits"]] = checkpoint.weight_bytes(folder)
    assert sizes[4] < 0.2 * sizes[None]
    assert sizes[8] < 0.35 * sizes[None]


@pytest.mark.parametrize("other", [None, {"bits": 8, "group_size": 32}, {"bits": 4, "group_size": 64}])
def test_weights_of_another_quantization(tmp_path, other):
    model = make_model({"bits": 4, "group_size": 32})
    checkpoint.save_model(tmp_path, model.config, model.parameters(), TOKENIZER)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization": other}))
    with pytest.raises(UserError, match=r"model\.safetensors: embed\..*, expected .* config\.json$"):
        checkpoint.load(tmp_path)


def test_training_config_has_no_quantization():
    with pytest.raises(UserError, match="unknown key quantization"):
        build_config(settings=["quantization={bits = 4, group_size = 64}"])
    assert TrainConfig().model_config(TOKENIZER).quantization is None


def test_group_size_must_divide_the_rows():
    message = (
        "quantization = {'bits': 4, 'group_size': 64}: expected a group_size that divides 96, the row length of down"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        make_model({"bits": 4, "group_size": 64}, d_ff=96)
