import json

import pytest

from dsmr_mlx import ModelConfig, UserError


def test_json_round_trip():
    config = ModelConfig(vocab_size=391, n_layers=2, horizons=[64, 8], norm="layer", norm_bias=True, rope_dims=32)
    assert ModelConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["horizons"] == [64, 8]


def test_defaults_are_resolved_when_made_so_that_the_file_says_all():
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
        ([], "expected a table"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig.from_dict(values, "config.json")
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: cannot be read"):
        ModelConfig.load(tmp_path / "gone.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: not valid JSON"):
        ModelConfig.load(tmp_path / "bad.json")
