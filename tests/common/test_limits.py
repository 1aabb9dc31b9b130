"""One limit of sizes for configurations, options and converters: one line, at once."""

import time

import pytest

from dsmr_mlx import ModelConfig, UserError
from dsmr_mlx.cli import main
from dsmr_mlx.common.limits import MAX_SIZES, MAX_TOKENS
from dsmr_mlx.model.horizons import parse
from dsmr_mlx.training.settings import build_config

HUGE = (2**31, 10**12, 10**30, 10**400)


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize(
    "name", ["d_model", "n_layers", "n_heads", "head_dim", "d_ff", "segment_length", "vocab_size", "max_positions"]
)
def test_a_model_of_impossible_size(name, value):
    with pytest.raises(UserError, match=rf"^{name} = {str(value)[:30]}.*: expected at most"):
        ModelConfig(**{"vocab_size": 9, name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"horizons": [10**9, 4], "n_layers": 2},
        {"horizons": [MAX_TOKENS] * 1024, "n_layers": 1024},
        {"d_model": 1 << 17, "d_ff": 1 << 20, "n_layers": 1024, "vocab_size": 1 << 22},
        {"rope_theta": 10**400},
        {"rope_scaling": {"type": "linear", "factor": 10**400}},
        {"fill": float("nan")},
    ],
)
def test_sizes_that_are_impossible_together(settings):
    started = time.perf_counter()
    with pytest.raises(UserError, match="expected"):
        ModelConfig(**{"vocab_size": 9} | settings)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "spec", ["uniform:1000000000", "two-scale:long=9999999999x4,short=2", "full:99999999999", f"custom:{'9' * 5000}"]
)
def test_horizons_of_impossible_size(spec):
    with pytest.raises(UserError, match=r"^horizons '"):
        parse(spec, 4)
    with pytest.raises(UserError):
        build_config(horizons=spec)


@pytest.mark.parametrize(
    "words",
    [
        ["horizons", "uniform:4", "--layers", "{}"],
        ["horizons", "uniform:4", "--layers", "2", "--segment", "{}"],
        ["generate", "-n", "{}"],
        ["generate", "--best-of", "{}"],
        ["prepare", "a", "--out", "b", "--workers", "{}"],
        ["evaluate", "a", "--data", "b", "--batch-size", "{}"],
        ["assess", "a", "--excerpts", "{}"],
        ["convert", "a", "b", "--segment", "{}"],
    ],
)
@pytest.mark.parametrize("value", ["100000000", "1e12", "9" * 400, "9" * 5000, "1e400"])
def test_options_of_impossible_size(words, value, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    with pytest.raises(SystemExit, match="2"):
        main([word.format(value) for word in words])
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "expected at most" in message or "expected a whole number" in message
    assert time.perf_counter() - started < 5
    assert list(tmp_path.iterdir()) == []


def test_limits_are_above_all_presets():
    for preset in ("tiny", "small", "base"):
        config = build_config(preset)
        for name in MAX_SIZES.keys() & vars(config).keys():
            assert (getattr(config, name) or 0) * 16 <= MAX_SIZES[name]
