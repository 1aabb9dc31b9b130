"""The studio's benchmark runs and measures what it names."""

import importlib
from pathlib import Path

import pytest
from support.studio_models import save_tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark, made smaller."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("studio")
    monkeypatch.setattr(module, "REPEATS", 1)
    monkeypatch.setattr(module, "LONG_SECONDS", 30.0)
    return module


@pytest.mark.slow
def test_latency_and_memory(benchmark, tmp_path):
    model = save_tiny(tmp_path)
    rows = benchmark.latency(tmp_path / "a", model)
    assert len(rows) == 10
    assert all(seconds and min(seconds) > 0 for _, seconds in rows)
    (row,) = benchmark.memory(tmp_path / "b", 1, model=model)
    assert row[0] == 1
    assert row[2] > 10
