"""Finished runs survive a program that was killed while it wrote the next one."""

from pathlib import Path

import pytest


@pytest.fixture
def finished(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import finished

    return finished


def test_lines_follow_an_incomplete_one(finished, tmp_path):
    path = tmp_path / "results" / "runs.jsonl"
    assert finished.read_lines(path) == []
    finished.append_lines(path, [{"row": "a"}, {"row": "b"}])
    text = path.read_text()
    path.write_text(text[:-5])
    finished.append_lines(path, [{"row": "c"}])
    assert finished.read_lines(path) == [{"row": "a"}, {"row": "c"}]


def test_other_lines_are_left_out(finished, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('notes\n[1]\n{"row": "a"}\n')
    assert finished.read_lines(path) == [{"row": "a"}]
