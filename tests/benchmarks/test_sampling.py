"""Rows of options are made, assessed, shown, and not made again."""

from argparse import Namespace
from pathlib import Path

import pytest
from support.checkpoints import save
from support.music import random_music

from dsmr_mlx.data.prepare import prepare
from dsmr_mlx.music.midi import write_notes
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def sampling(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sampling

    return sampling


def test_options_change_what_is_recommended(sampling):
    recommended = {"tempo": 0.15, "max_note_seconds": 5}
    assert sampling.options_of("", recommended) == recommended
    assert sampling.options_of("tempo=none temperature=0.9", recommended) == {"max_note_seconds": 5, "temperature": 0.9}
    assert sampling.options_of("velocity_range=30-90", {}) == {"velocity_range": "30-90"}


@pytest.mark.slow
def test_a_row_is_made_once(sampling, tmp_path):
    (tmp_path / "midi").mkdir()
    for i in range(24):
        write_notes(random_music(i, seconds=10), tmp_path / "midi" / f"{i:02}.mid")
    prepare(tmp_path / "midi", tmp_path / "corpus", validation_fraction=0.5)
    save(tmp_path / "model", PerformanceTokenizer())
    a = Namespace(
        model=str(tmp_path / "model"), data=str(tmp_path / "corpus"), samples=11, seconds=3.0, seed=0,
        variants=["", "temperature=0.5 max_note_seconds=1", "tempo=none"],  # the last is the first
    )  # fmt: skip
    made = list(sampling.rows(a, []))
    assert [run["row"] for run in made] == ["recommended", "temperature=0.5 max_note_seconds=1"]
    assert 0 <= made[0]["told_apart"]["right"] <= 1
    assert made[1]["held"] == 0
    assert list(sampling.rows(a, made)) == []
    assert sampling.table(made).row_count == 2
