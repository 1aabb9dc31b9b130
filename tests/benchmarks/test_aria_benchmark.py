"""Aria's rebuilt loops have the logits of the converted weights, and both sides are measured."""

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from support.midi_files import tune, write_midi_files
from support.workers import InProcess

from dsmr_mlx.cli import main as cli

pytest.importorskip("torch")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ("--layers", "1", "--d-model", "64", "--rows", "2675", "--checked", "30", "--tokens", "1", "--rounds", "1")


@pytest.fixture
def aria(monkeypatch):
    """The benchmark, with workers in this process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("aria")
    monkeypatch.setattr(module, "Worker", InProcess)
    return module


@pytest.mark.slow
def test_rows(aria, monkeypatch, tmp_path, capsys):
    outputs = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    monkeypatch.setattr(sys, "argv", ["aria.py", *TINY, "--positions", "9000", "--lanes", "2", *outputs])
    monkeypatch.setattr(aria.aria_loops, "CONTEXT", 64)
    aria.main()
    assert "Aria in MLX" in capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    assert max(found["agreement"].values()) < 1e-5
    assert [row["sides"] for row in found["rows"]] == [
        [mine, theirs] for mine in ("DSMR, exact", "DSMR, uniform:2048") for theirs in aria.LOOPS
    ]
    assert {row["position"] for row in found["rows"]} == {62}
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_other_logits_are_refused_and_buffers_end(aria, monkeypatch, tmp_path):
    loops = aria.aria_loops
    weights = loops.write_random(tmp_path / "model.safetensors", 2675, 64, 1)
    files = {"weights": weights, aria.EXACT: aria.convert(weights, tmp_path / "exact", "float32")}
    monkeypatch.setattr(loops, "CONTEXT", 32)
    options = Namespace(checked=20, rows=2675, dtype="float32")
    assert max(aria.agreement(files, options).values()) < 1e-5
    loop = loops.MlxLoop(weights, 1)
    with pytest.raises(ValueError, match="33 tokens: Aria's buffers have 32 positions"):
        loop.step(np.array([7]), 32)
    monkeypatch.setattr(loops, "THETA", 10_000.0)
    with pytest.raises(SystemExit, match="Aria in MLX: its logits differ from DSMR's"):
        aria.agreement(files, options)


def test_min_p_removes_the_unlikely(aria):
    logits = np.log(np.array([[0.9, 0.08, 0.02]], np.float32))
    drawn = [int(aria.aria_loops.draw(logits)[0]) for _ in range(300)]
    assert set(drawn) == {0, 1}


@pytest.mark.slow
def test_lengths_at_a_take_over(aria, monkeypatch, tmp_path, capsys):
    take_over = importlib.import_module("take_over")
    midi = write_midi_files(tmp_path / "midi", {f"{i}.mid": tune(i, 120) for i in range(3)})
    assert cli(["prepare", str(midi), "--tokenizer", "aria:2675", "--out", str(tmp_path / "corpus")]) == 0
    weights = aria.aria_loops.write_random(tmp_path / "model.safetensors", 2675, 64, 1)
    model = aria.convert(weights, tmp_path / "model", "float32")
    words = ["take_over.py", str(model), "--data", str(tmp_path / "corpus"), "--samples", "2"]
    monkeypatch.setattr(sys, "argv", [*words, "--json", str(tmp_path / "a.json")])
    take_over.main()
    assert "likeliest" in capsys.readouterr().out
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert list(rows) == list(take_over.WAYS)
    assert rows["cut, pedal up"]["pitch, 20"]["difference"] == 0
    assert rows["true"]["pitch, 20"]["nats"] > 0
