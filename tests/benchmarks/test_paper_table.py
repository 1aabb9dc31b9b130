"""The paper's table: rows have equal budgets, are trained once, and go on where they were stopped."""

import json
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.processes import kept_signal_handlers
from support.tiny import write_corpus

from dsmr_mlx.evaluation import losses, reset
from dsmr_mlx.model.horizons import parse
from dsmr_mlx.training.settings import build_config
from dsmr_mlx.training.trainer import Trainer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ("d_model=16", "n_layers=4", "n_heads=4", "head_dim=8", "d_ff=24", "segment_length=8", "batch_size=2")
SHAPE = ("--cap", 48, "--long", 1, "--short", 8, "--tokens", 96, "--reset-at", 16, "--eval-tokens", 200)


@pytest.fixture
def paper_table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper_table

    return paper_table


@pytest.fixture
def run(paper_table, monkeypatch, tmp_path, capsys):
    """Run the program on a tiny corpus: what it prints."""
    corpus = write_corpus(tmp_path / "corpus")
    settings = [word for setting in (*TINY, "compile=false") for word in ("--set", setting)]

    def run(*arguments: object, shape: tuple = SHAPE) -> str:
        words = [*arguments, "--data", corpus.path, "--out", tmp_path / "table", *shape, *settings]
        monkeypatch.setattr(sys, "argv", ["paper_table.py", *map(str, words)])
        capsys.readouterr()
        paper_table.run_main(paper_table.main)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("size", ["cpu", "paper"])
def test_all_rows_but_full_and_whole_have_one_budget(paper_table, size):
    """Less than half of that of full memory."""
    c = paper_table.SIZES[size]
    layers = build_config(c.preset, settings=paper_table.as_list(c.settings)).n_layers
    rows = {name: row["horizons"] for name, row in c.rows(layers).items()}
    assert rows.pop("FHCR") == "whole"
    budgets = {name: parse(spec, layers).budget for name, spec in rows.items()}
    full = budgets.pop("full")
    assert 0.25 * full < budgets["two-scale"] < 0.41 * full
    assert set(budgets.values()) == {budgets["two-scale"]}
    assert c.rows(layers)["FHCR"]["n_kv_heads"] == "2"


def test_rows_of_a_seed_share_first_weights_and_batches(paper_table, tmp_path):
    """Bit by bit; another seed has other weights and another order."""
    corpus = write_corpus(tmp_path / "corpus")

    def beginning(horizons: str, seed: int):
        settings = [*TINY, f"horizons={horizons}", f"seed={seed}"]
        trainer = Trainer(build_config("tiny", settings=settings).for_corpus(corpus), corpus)
        batches = [next(trainer.lanes) for _ in range(12)]
        arrays = [a for b in batches for a in (b.inputs, b.targets, b.counts, b.fresh)]
        return dict(tree_flatten(trainer.parameters)), arrays

    size = paper_table.Size.named("cpu", cap=48, long=1, short=8)
    rows = [row["horizons"] for name, row in size.rows(4).items() if name != "FHCR"]
    weights, arrays = beginning(rows[0], 0)
    for horizons in rows[1:]:
        others, read = beginning(horizons, 0)
        assert others.keys() == weights.keys()
        assert all(mx.array_equal(weights[name], others[name]) for name in weights)
        assert all(np.array_equal(a, b) for a, b in zip(arrays, read, strict=True))
    others, read = beginning(rows[0], 1)
    assert not mx.array_equal(weights["embed.weight"], others["embed.weight"])
    assert not all(np.array_equal(a, b) for a, b in zip(arrays, read, strict=True))


def test_only_the_counted_tokens_after_the_reset_are_read_again(paper_table, monkeypatch, tmp_path):
    """And the figures are those of whole pieces."""
    corpus, read = write_corpus(tmp_path / "corpus"), []
    config = build_config("tiny", settings=[*TINY, "horizons=uniform:16"]).model_config(corpus.tokenizer)

    def some_losses(model, ids, *_, **options):
        read.append(ids)
        return [piece[1:] % 7 + (np.arange(len(piece) - 1) if options else 0.0) for piece in ids]

    monkeypatch.setattr(reset, "WINDOW", 16)
    monkeypatch.setattr(reset, "piece_losses", some_losses)
    monkeypatch.setattr(losses, "piece_losses", some_losses)
    monkeypatch.setattr("dsmr_mlx.model.checkpoint.load", lambda path: (Namespace(config=config), corpus.tokenizer))
    found = paper_table.measure(tmp_path, corpus, 16, None)
    assert [len(piece) for piece in read[1]] == [17, 17]
    whole = reset.measure_reset(Namespace(config=config), read[0], some_losses(None, read[0]), 16, [0, 1])
    assert min(len(piece) for piece in read[3]) > 100
    assert found["krcu"] == whole.gain.nats == 7.5
    assert found["krcu_error"] == whole.gain.error
    assert [start for start, _ in found["krcu_by_distance"]] == [0]


@pytest.mark.slow
def test_pytorch_trains_a_row(run, tmp_path, monkeypatch, paper_table):
    """In this process: another one would import PyTorch once more."""
    pytest.importorskip("torch")

    def run_here(command: list[str], **_) -> Namespace:
        monkeypatch.setattr(sys, "argv", command[1:])
        monkeypatch.syspath_prepend(str(Path(command[1]).parent))
        with kept_signal_handlers():
            runpy.run_path(command[1], run_name="__main__")
        return Namespace(returncode=0)

    monkeypatch.setattr(paper_table.subprocess, "run", run_here)
    run("FHCR", "--framework", "torch", "--dtype", "float32")
    (row,) = json.loads((tmp_path / "table/table.json").read_text())["rows"]
    assert row["perplexity"] > 1
    assert (row["n_kv_heads"], row["horizons"]) == (2, f"whole:longest={row['budget'] // 4}")


@pytest.mark.slow
def test_a_table_is_made_row_by_row(run, tmp_path, monkeypatch, paper_table):
    options = ("--framework", "mlx", "--dtype", "float32")
    run("two-scale", *options)
    trained, train = [], paper_table.train
    monkeypatch.setattr(paper_table, "train", lambda row, *rest: trained.append(row.name) or train(row, *rest))
    shown = run("two-scale", "FHCR", *options)
    assert trained == ["FHCR"]
    assert shown == (tmp_path / "table/table.md").read_text()
    assert [line.split("|")[1].strip() for line in shown.splitlines()[2:]] == ["two-scale", "FHCR"]
    rows = json.loads((tmp_path / "table/table.json").read_text())["rows"]
    assert [(row["budget"], row["n_kv_heads"]) for row in rows] == [(72, 4), (rows[1]["budget"], 2)]
    assert rows[1]["horizons"] == f"whole:longest={rows[1]['budget'] // 4}"
    assert all(row["perplexity"] > 1 and row["krcu_by_distance"] and row["reset_pieces"] for row in rows)
    with pytest.raises(SystemExit, match=r"two-scale-0: has other settings.*max_tokens = 96, not 128"):
        run("two-scale", *options, shape=(*SHAPE, "--tokens", 128))


def test_a_reset_after_the_end_of_all_pieces_is_refused_before_training(run, tmp_path):
    with pytest.raises(SystemExit, match=r"reset_at.* expected less, the longest of 1 pieces has"):
        run("full", "--dtype", "float32", shape=(*SHAPE, "--reset-at", 4096, "--eval-tokens", 1))
    assert not (tmp_path / "table").exists()


def test_an_unknown_row_is_named(run):
    with pytest.raises(SystemExit, match="row triangle: expected one of full, two-scale, "):
        run("triangle", "--dtype", "float32")
