"""The recipe's rows train and are not trained again."""

import math
from argparse import Namespace
from pathlib import Path

import pytest
from support.tiny import write_corpus

from dsmr_mlx.common.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["d_model=16", "n_layers=2", "n_heads=2", "n_kv_heads=none", "d_ff=24", "segment_length=8", "batch_size=3"]
TINY += ["horizons=two-scale:long=1x12,short=4", "compile=false", "dtype=float32"]


@pytest.fixture
def recipe(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import recipe

    return recipe


def options(**changes) -> Namespace:
    defaults = {"data": "", "rows": [], "seeds": [0, 1], "tokens": 300, "size": "cpu", "jobs": 1, "settings": TINY}
    return Namespace(**(defaults | changes))


def test_finished_rows_are_not_trained_again(recipe, tmp_path):
    data = str(write_corpus(tmp_path / "corpus").path)
    every = list(recipe.jobs(options(data=data), []))
    finished = [
        {"row": job.row, "seed": job.seed, "settings": list(job.settings), "corpus": job.corpus}
        for job in every
        if (job.row, job.seed) in {("Muon", 1), ("all", 0)}
    ]
    left = list(recipe.jobs(options(data=data), finished))
    assert len(left) == len(every) - 2
    assert not {(job.row, job.seed) for job in left} & {("Muon", 1), ("all", 0)}
    other = str(write_corpus(tmp_path / "other", seed=3).path)
    for changed in ({"tokens": 400}, {"size": "small"}, {"settings": [*TINY, "learning_rate=9"]}, {"data": other}):
        with pytest.raises(UserError, match=r"Muon, seed 1: the finished run differs in|all, seed 0: "):
            list(recipe.jobs(options(**({"data": data} | changed)), finished))


@pytest.mark.parametrize("row", ["AdamW", "all, 1 key/value head"])
def test_a_row_trains(recipe, tmp_path, row):
    corpus = write_corpus(tmp_path / "corpus").path
    (job,) = recipe.jobs(options(data=str(corpus), rows=[row], seeds=[0]), [])
    found = recipe.train(job)
    assert found["tokens"] >= 300
    assert found["tokens_per_second"] > 0
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    assert row in recipe.table([found]).columns[0]._cells
