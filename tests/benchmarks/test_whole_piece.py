"""The cost of whole-piece memory is measured near the start and the end of a piece."""

import json
import sys
from pathlib import Path

import numpy as np
from support.tiny import tiny_config, write_corpus
from support.workers import InProcess

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_rows_have_their_states(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import whole_piece

    monkeypatch.setattr(whole_piece, "Worker", InProcess)
    settings = ("d_model=16", "n_layers=2", "n_heads=4", "head_dim=8", "d_ff=24", "segment_length=8", "batch_size=2")
    words = [f"--set={setting}" for setting in (*settings, "canon=false")]
    options = ["--preset", "tiny", "--length", "3000", "--early", "64", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["whole_piece.py", *options, *words, "--json", str(tmp_path / "found.json")])
    whole_piece.main()
    assert "tokens/s at 3,000" in capsys.readouterr().out
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    states = {name: row["state_bytes"] for name, row in rows.items()}
    assert states["full, all heads"] == 2 * 2 * 2 * 4 * 8 * 4 * (3000 + 8)
    assert states["whole, 2 key/value heads"] == states["full, all heads"] // 2


def test_a_step_is_taken_at_the_position(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import whole_piece

    corpus = write_corpus(tmp_path / "corpus")
    seen = []
    from dsmr_mlx.model.state import RecurrentState

    window = RecurrentState.window
    monkeypatch.setattr(RecurrentState, "window", lambda s, *a: seen.append(s.position.copy()) or window(s, *a))
    step = whole_piece.training_at(tiny_config(horizons="full:4000", accumulate=1), str(corpus.path), 3001)
    step()
    step()
    np.testing.assert_array_equal(seen, np.full((2, 3), 3000))
