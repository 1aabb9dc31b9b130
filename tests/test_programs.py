"""The examples and benchmarks run, on as little as they can."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_corpus

ROOT = Path(__file__).parents[1]
TINY = ("d_model=16", "n_layers=2", "n_heads=2", "head_dim=8", "d_ff=24", "segment_length=8", "batch_size=2")


def run(program: str, *arguments: object) -> str:
    words = [sys.executable, ROOT / program, *map(str, arguments)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["schedule.svg", "schedule.png"])
def test_draw_schedule(tmp_path, name):
    run("examples/draw_schedule.py", "linear:budget=960", "--layers", 4, "--segment", 64, "--out", tmp_path / name)
    assert (tmp_path / name).stat().st_size > 1000


def test_the_picture_of_the_readme_is_what_the_example_draws(tmp_path):
    """Up to the identifiers and versions that matplotlib writes: the same bars and the same words."""
    spec = "two-scale:long=2x1024,short=128"
    run("examples/draw_schedule.py", spec, "--layers", 6, "--segment", 128, "--out", tmp_path / "new.svg")
    old, new = ((p).read_text().count("<path") for p in (ROOT / "examples/schedule.svg", tmp_path / "new.svg"))
    assert old == new


def test_schedules_benchmark(tmp_path):
    corpus = write_corpus(tmp_path / "corpus").path
    settings = [f"--set={setting}" for setting in TINY]
    options = ["--data", corpus, "--preset", "tiny", "--rounds", 2, "--warmup", 1, *settings, "--json"]
    rows = json.loads(run("benchmarks/schedules.py", *options, "uniform:8", "full:64"))
    assert [row["budget"] for row in rows] == [16, 128]
    assert rows[1]["state_bytes"] > rows[0]["state_bytes"]
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_input_pipeline_benchmark(tmp_path):
    corpus = write_corpus(tmp_path / "corpus").path
    settings = [word for setting in (*TINY, "horizons=uniform:8") for word in ("--set", setting)]
    shown = run("benchmarks/input_pipeline.py", "--data", corpus, "--preset", "tiny", *settings, "--batches", 20)
    assert "augment" in shown


def test_training_in_pytorch_goes_on_where_it_stopped_and_converts(tmp_path):
    """Stopped after 3 steps of 6: the weights of 6 steps at once, and the perplexity that this program measures."""
    torch = pytest.importorskip("torch")
    from dsmr_mlx.checkpoint import load
    from dsmr_mlx.convert.importing import plan_conversion, write_conversion
    from dsmr_mlx.evaluation import evaluate

    corpus = write_corpus(tmp_path / "corpus")
    settings = (*TINY, "horizons=uniform:8", "learning_rate=0.01", "min_learning_rate=0.01", "warmup_steps=0")
    options = [
        "--data",
        corpus.path,
        "--device",
        "cpu",
        *(f"--set={setting}" for setting in (*settings, "eval_every=6")),
    ]
    shown = run("examples/train_pytorch.py", *options, "--out", tmp_path / "once.pt", "--set=max_steps=6")
    run("examples/train_pytorch.py", *options, "--out", tmp_path / "twice.pt", "--set=max_steps=3")
    run("examples/train_pytorch.py", *options, "--out", tmp_path / "twice.pt", "--set=max_steps=6", "--resume")
    once, twice = (torch.load(tmp_path / f"{name}.pt.last", weights_only=True) for name in ("once", "twice"))
    assert once["progress"]["step"] == twice["progress"]["step"] == 6
    assert all(torch.equal(weight, twice["state_dict"][name]) for name, weight in once["state_dict"].items())
    model, _ = load(write_conversion(plan_conversion(tmp_path / "once.pt"), tmp_path / "model"))
    (line,) = [line for line in shown.splitlines() if line.startswith("validation")]
    assert evaluate(model, corpus).perplexity == pytest.approx(float(line.split()[-1]), rel=1e-5)
