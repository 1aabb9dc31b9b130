"""The cost of schedules is measured against the first one, with full memories."""

import json
import sys
from pathlib import Path

import pytest
from support.tiny import write_corpus
from support.workers import InProcess

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ("d_model=16", "n_layers=4", "n_heads=4", "head_dim=8", "d_ff=24", "segment_length=8", "batch_size=2")


@pytest.fixture
def cost(monkeypatch, tmp_path):
    """Run the program on a tiny corpus: the rows that it writes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import schedule_cost

    monkeypatch.setattr(schedule_cost, "Worker", InProcess)
    options = ["--data", str(write_corpus(tmp_path / "corpus").path), "--cap", "32", "--short", "4"]
    options += ["--rounds", "2", "--decoded", "4", "--json", str(tmp_path / "cost.json")]

    def run(*rows: str) -> dict:
        words = [*rows, *options, *(f"--set={setting}" for setting in TINY)]
        monkeypatch.setattr(sys, "argv", ["schedule_cost.py", *words])
        schedule_cost.run_main(schedule_cost.main)
        return json.loads((tmp_path / "cost.json").read_text())["rows"]

    return run


def test_states_are_those_of_the_horizons(cost, capsys):
    rows = cost("full", "two-scale")
    assert {name: row["budget"] for name, row in rows.items()} == {"full": 128, "two-scale": 44}
    canon = 4 * 2 * 4 * 2 * 16 * (3 + 8)  # bytes, lanes, layers, two inputs of Canon layers in each
    states = [row["training"]["state_bytes"] for row in rows.values()]
    assert states == [2 * 4 * 2 * 4 * 8 * slots + canon for slots in (128 + 32, 44 + 32)]
    assert all(row["decoding"]["tokens_per_second"]["median"] > 0 for row in rows.values())
    assert rows["full"]["training"]["ratio"]["median"] == 1
    assert "two-scale" in capsys.readouterr().out


def test_rows_without_a_full_memory_are_refused(cost, capsys):
    with pytest.raises(SystemExit):
        cost("full", "FHCR")
    assert "FHCR: expected one of full, two-scale, " in capsys.readouterr().err
