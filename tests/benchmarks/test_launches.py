"""Kernel launches per decoded token are counted, and do not rise unnoticed."""

import importlib
import json
import sys
from pathlib import Path

import mlx.core as mx
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PLAIN = "small, none of these"  # without the parts of the recipe that add kernels
BOUNDS = {
    PLAIN: (90, 115, 150),
    "bundled": (135, 160, 195),
}  # network; with the choice; with that of recommended options


@pytest.fixture
def launches(monkeypatch):
    """The module, which finds others in its folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("launches")


def test_views_launch_nothing_and_what_is_fused_launches_once(launches):
    x = mx.ones((3, 4))
    mx.eval(x)
    with launches.tracing():
        fused = mx.compile(lambda x: (mx.exp(x * 2) + 1).T.reshape(2, 6)[None])(x)
        parts = mx.compile(lambda x: mx.concatenate([x, x + 1, x * 2]).sum(axis=0))(x)
        placed = mx.compile(lambda x, i: mx.slice_update(x, x[:1], i, axes=(0,)))(x, mx.array([1]))
        norm = mx.compile(lambda x: mx.fast.rms_norm(x, mx.ones(4), 1e-5))(x)
    assert sum(launches.launches(fused).values()) == 1
    assert launches.launches(parts)["Concatenate"] == 3
    assert launches.launches(parts)["Sum"] == 1
    assert launches.launches(placed) == {"DynamicSliceUpdate": 2}
    assert launches.launches(norm)["CumSum"] == 1  # stands for the kernel that Metal has


@pytest.mark.parametrize("model", BOUNDS)
def test_a_decoded_token_takes_at_most_so_many_kernels(launches, model):
    row = launches.count(model, peers=False)
    network, chosen, steered = BOUNDS[model]
    assert row["network"] <= network
    assert row["network"] + row["choice"] <= chosen
    assert row["network"] + row["steered"] <= steered
    assert {part: sum(kernels.values()) for part, kernels in row["kernels"].items()} == {
        part: row[part] for part in ("network", "choice", "steered")
    }


def test_parts_of_the_recipe_are_shown_apart(launches, monkeypatch, tmp_path, capsys):
    names = ["small", "small, only canon", "small, none of these"]
    words = ["launches.py", "--models", ";".join(names), "--json", str(tmp_path / "launches.json")]
    monkeypatch.setattr(sys, "argv", words)
    launches.main()
    rows = json.loads((tmp_path / "launches.json").read_text())["rows"]
    assert [row["model"] for row in rows] == names
    small, canon, plain = (row["network"] for row in rows)
    assert small > canon > plain
    assert "small, only canon" in capsys.readouterr().out


def test_unknown_models_are_refused(launches, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launches.py", "--models", "huge"])
    with pytest.raises(SystemExit):
        launches.main()
    assert "huge: expected bundled; small" in capsys.readouterr().err


@pytest.mark.slow
def test_the_network_takes_fewer_kernels_than_mlx_lms(launches):
    pytest.importorskip("mlx_lm")
    row = launches.count(PLAIN, peers=True)
    assert row["network"] < row["llama"]
