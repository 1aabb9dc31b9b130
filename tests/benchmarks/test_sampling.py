"""Rows of options are made, assessed, shown, and not made again."""

import math
from argparse import Namespace
from pathlib import Path

import pytest
from support.checkpoints import save
from support.music import random_music
from support.tiny import TOKENIZER, write_corpus

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


def test_figures_that_do_not_exist_are_null(sampling, tmp_path, monkeypatch):
    nan = {
        "overlap": math.nan,
        "oa": 0.5,
        "notes_per_second": [math.nan, 7.0],
        "told_apart": None,
        "similarity": [0, 1],
    }
    nan |= {"held": 0, "silent": 0, "looping": 0, "key_clarity": [0.5, math.nan]}
    for name, value in {"recommended_options": {}, "write_samples": 1.0, "assess": None, "figures": nan}.items():
        monkeypatch.setattr(sampling, name, lambda *args, value=value, **options: value)
    a = Namespace(model=None, data=None, samples=1, variants=[""])
    made = list(sampling.rows(a, {"seed": 0}, []))
    sampling.append_lines(tmp_path / "runs.jsonl", made)
    assert sampling.read_lines(tmp_path / "runs.jsonl") == made
    assert made[0]["notes_per_second"] == [None, 7.0]
    assert [next(iter(column.cells)) for column in sampling.table(made).columns][3:5] == ["–", "−0.500"]


def test_rows_of_other_settings_are_not_ranked(sampling, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus")
    save(tmp_path / "model", TOKENIZER)
    words = ["sampling.py", str(tmp_path / "model"), "--data", str(corpus.path), "--runs", str(tmp_path / "runs.jsonl")]
    monkeypatch.setattr("sys.argv", words)
    setting = sampling.setting_of(
        Namespace(model=tmp_path / "model", data=corpus.path, samples=100, seconds=120.0, seed=0)
    )
    runs = [setting | changed for changed in ({}, {"seconds": 60.0}, {"seed": 1}, {"samples": 9}, {"config": ""})]
    sampling.append_lines(tmp_path / "runs.jsonl", runs)
    shown = []
    monkeypatch.setattr(sampling, "rows", lambda a, setting, finished: iter(()))
    monkeypatch.setattr(sampling, "table", lambda finished: shown.append(finished) or "")
    sampling.main()
    assert shown == [[setting]]


@pytest.mark.slow
def test_a_row_is_made_once(sampling, tmp_path):
    (tmp_path / "midi").mkdir()
    for i in range(24):
        write_notes(random_music(i, seconds=10), tmp_path / "midi" / f"{i:02}.mid")
    prepare(tmp_path / "midi", tmp_path / "corpus", validation_fraction=0.5)
    save(tmp_path / "model", PerformanceTokenizer())
    a = Namespace(
        model=str(tmp_path / "model"), data=str(tmp_path / "corpus"), samples=11, seconds=3.0, seed=0,
        variants=["", "temperature=0.5 max_note_seconds=1 best_of=2", "tempo=none"],  # the last is the first
    )  # fmt: skip
    setting = sampling.setting_of(a)
    made = list(sampling.rows(a, setting, []))
    assert [run["row"] for run in made] == ["recommended", "temperature=0.5 max_note_seconds=1 best_of=2"]
    assert 0 <= made[0]["told_apart"]["right"] <= 1
    assert made[1]["held"] == 0
    assert list(sampling.rows(a, setting, made)) == []
    assert sampling.table(made).row_count == 2
