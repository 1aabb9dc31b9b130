"""Checks at small sizes."""

import pytest

from dsmr_mlx.doctor import numbers, playing, training
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Checks at the smallest sizes at which they can fail."""
    made = numbers.new_model
    short = {"segment_length": 16, "horizons": "uniform:32", "d_model": 64, "n_layers": 2}
    monkeypatch.setattr(numbers, "new_model", lambda *_, **own: made("tiny", **own))
    monkeypatch.setattr(playing, "new_model", lambda *_: made("tiny", **short))
    monkeypatch.setattr(playing, "load", lambda _: (made("tiny", **short), PerformanceTokenizer()))
    monkeypatch.setattr(playing, "BEFORE", 40)
    monkeypatch.setattr(playing, "REWOUND", 12)
    monkeypatch.setattr(playing, "READ_LENGTH", 64)
    monkeypatch.setattr(playing, "TIMED", 10)
    monkeypatch.setattr(numbers, "LENGTH", 140)
    monkeypatch.setattr(numbers, "CHUNKS", (33, 128))
    original = training.config_of
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 2, "head_dim": 16, "d_ff": 64, "segment_length": 32}
    settings = shape | {"horizons": "uniform:32", "learning_rate": 0.01}
    monkeypatch.setattr(training, "config_of", lambda preset, **own: original("tiny", **settings | own))
