"""Model configurations: JSON round trip, defaults, and errors for invalid values."""

import json
import math

import pytest

from dsmr_mlx import ModelConfig, UserError

LLAMA3 = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_length": 8192}


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "layer", "norm_bias": True, "rope_dims": 32},
        {"rope_scaling": LLAMA3, "parallel_residual": True},
        {"rope_scaling": {"factor": 2.5, "type": "linear"}},
        {"rope_dims": 0, "max_positions": 1024, "quantization": {"group_size": 64, "bits": 8}},
    ],
)
def test_json_round_trip(options):
    config = ModelConfig(vocab_size=393, n_layers=2, horizons=[64, 8], **options)
    assert ModelConfig.from_json(config.to_json()) == config
    assert ModelConfig.from_json(config.to_json()).to_json() == config.to_json()
    assert json.loads(config.to_json())["horizons"] == [64, 8]


def test_tables_are_copied_and_normalized():
    given = dict(LLAMA3)
    config = ModelConfig(vocab_size=10, rope_scaling=given)
    given["factor"] = 99
    assert config.rope_scaling == LLAMA3
    assert isinstance(config.rope_scaling["factor"], float)
    assert isinstance(config.rope_scaling["original_length"], int)


def test_defaults_are_resolved_and_stored():
    config = ModelConfig(vocab_size=10, n_layers=2, n_heads=3, segment_length=16)
    assert (config.n_kv_heads, config.rope_dims, config.horizons) == (3, config.head_dim, [16, 16])


def test_whole_numbers_are_accepted_as_floats():
    assert isinstance(ModelConfig(vocab_size=10, rope_theta=500_000).rope_theta, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 10, "n_head": 3}, "unknown key n_head"),
        ({}, "missing key vocab_size"),
        ({"vocab_size": "10"}, "vocab_size = '10': expected int"),
        ({"vocab_size": True}, "vocab_size = True: expected int"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"vocab_size": 10, "n_heads": 4, "n_kv_heads": 3}, "n_kv_heads = 3: expected a divisor"),
        ({"vocab_size": 10, "n_layers": 3, "horizons": [1, 2]}, "expected n_layers = 3 integers"),
        ({"vocab_size": 10, "n_layers": 2, "horizons": [1, -2]}, "no negative horizon"),
        ({"vocab_size": 10, "n_layers": 2, "horizons": [1, 2.5]}, "horizons"),
        ({"vocab_size": 10, "norm": "batch"}, "norm = 'batch': expected one of rms, layer"),
        ({"vocab_size": 10, "norm_bias": True}, "norm_bias"),
        ({"vocab_size": 10, "activation": "swish"}, "activation = 'swish'"),
        ({"vocab_size": 10, "rope_dims": 7}, "rope_dims = 7"),
        ({"vocab_size": 10, "dropout": 1.0}, "dropout = 1.0"),
        ({"vocab_size": 10, "head_bias": True}, "head_bias = True: expected false with tie_embeddings"),
        ({"vocab_size": 10, "max_positions": 0}, "max_positions = 0: expected at least 1, or none"),
        ({"vocab_size": 10, "parallel_residual": 1}, "parallel_residual = 1: expected bool"),
        ({"vocab_size": 10, "rope_scaling": "linear"}, "rope_scaling = 'linear': expected dict"),
        ({"vocab_size": 10, "rope_scaling": {}}, 'rope_scaling = {}: expected "type" to be one of linear, llama3'),
        ({"vocab_size": 10, "rope_scaling": {"type": "yarn", "factor": 2}}, '"type" to be one of linear, llama3'),
        ({"vocab_size": 10, "rope_scaling": {"type": ["linear"], "factor": 2}}, '"type" to be one of linear, llama3'),
        ({"vocab_size": 10, "rope_scaling": {"type": "linear"}}, "expected the keys type, factor$"),
        ({"vocab_size": 10, "rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "expected the keys type, fac"),
        ({"vocab_size": 10, "rope_scaling": {"type": "linear", "factor": 0}}, "factor to be a number above 0"),
        ({"vocab_size": 10, "rope_scaling": {"type": "linear", "factor": "2"}}, "factor to be a number above 0"),
        ({"vocab_size": 10, "rope_scaling": {"type": "linear", "factor": True}}, "factor to be a number above 0"),
        ({"vocab_size": 10, "rope_scaling": {"type": "linear", "factor": math.nan}}, "factor to be a number above 0"),
        ({"vocab_size": 10, "rope_scaling": {"type": "linear", "factor": math.inf}}, "factor to be a number above 0"),
        (
            {"vocab_size": 10, "rope_scaling": LLAMA3 | {"original_length": 81.5}},
            "original_length to be an integer abo",
        ),
        ({"vocab_size": 10, "rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "low_freq_factor below high_freq_factor"),
        ({"vocab_size": 10, "rope_scaling": LLAMA3, "rope_dims": 0}, "expected none with rope_dims = 0"),
        (
            {"vocab_size": 10, "quantization": {"bits": 4}},
            "quantization = {'bits': 4}: expected the keys bits, group_s",
        ),
        ({"vocab_size": 10, "quantization": {"bits": 3, "group_size": 64}}, "bits to be one of 4, 6, 8"),
        ({"vocab_size": 10, "quantization": {"bits": 4.0, "group_size": 64}}, "bits to be one of 4, 6, 8"),
        ({"vocab_size": 10, "quantization": {"bits": 4, "group_size": 16}}, "group_size to be one of 32, 64, 128"),
        (
            {"vocab_size": 10, "d_ff": 700, "quantization": {"bits": 4, "group_size": 64}},
            r"a group_size that divides 700, the row length of down\.weight",
        ),
        (
            {"vocab_size": 10, "d_model": 200, "quantization": {"bits": 4, "group_size": 32}},
            r"a group_size that divides 200, the row length of embed\.weight",
        ),
        (
            {"vocab_size": 10, "n_heads": 3, "quantization": {"bits": 4, "group_size": 128}},
            r"a group_size that divides 192, the row length of out\.weight",
        ),
        ([], "expected a table"),
    ],
)
def test_invalid_values(values, message):
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig.from_dict(values, "config.json")
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: cannot be read"):
        ModelConfig.load(tmp_path / "gone.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: not valid JSON"):
        ModelConfig.load(tmp_path / "bad.json")
