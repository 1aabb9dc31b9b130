"""The studio's benchmark runs and measures what it names."""

import importlib
import json
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


class Reading:
    """A studio that reads ahead: it is idle before and after, and says so only when that changes."""

    def __init__(self, *activities: str | None):
        self.activities, self.messages = list(activities), []

    def send(self, text: str) -> None:
        activity = self.activities.pop(0) if self.activities else None
        self.messages += [{"type": "status", "activity": activity}] if activity else []
        self.messages.append({"type": "pong", "request": json.loads(text)["request"]})

    def recv(self, seconds: float) -> str:
        return json.dumps(self.messages.pop(0))


def test_reading_ahead_is_waited_for(benchmark, monkeypatch):
    """Also if it begins a moment after the last request, and if nothing is published for a while."""
    monkeypatch.setattr(benchmark.time, "sleep", lambda seconds: None)
    studio = object.__new__(benchmark.Studio)
    studio.requests, studio.activity = 0, "idle"
    studio.socket = Reading(None, "reading", None, None, "reading", None, None, None, None, "idle")
    studio.idle()
    assert not studio.socket.activities


@pytest.mark.slow
def test_latency_and_memory(benchmark, tmp_path):
    model = save_tiny(tmp_path)
    rows = benchmark.latency(tmp_path / "a", model)
    assert len(rows) == 10
    assert all(seconds and min(seconds) > 0 for _, seconds in rows)
    (row,) = benchmark.memory(tmp_path / "b", 1, model=model)
    assert row[0] == 1
    assert row[2] > 10
