"""A user whose MLX is slow for want of a library hears of it, and nobody else does."""

import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dsmr_mlx.cli import common, console, train

HINT = "hint: MLX's own BLAS is slow"
ANSWER = """
import mlx.core
from dsmr_mlx.cli.console import BROUGHT, MAPS, is_slow
print(is_slow(), BROUGHT in MAPS.read_text())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about MLX's wheels for Linux")
def test_the_blas_of_the_wheels_is_slow_unless_another_comes_first():
    def answer(preload: str) -> list[str]:
        command, environment = [sys.executable, "-c", ANSWER], {"LD_PRELOAD": preload}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.split()

    slow, brought = answer("")
    assert slow == brought
    openblas = sorted(Path("/usr/lib").glob("*/libopenblas.so.0"))
    if openblas:
        assert answer(str(openblas[0])) == ["False", brought]


def test_nothing_is_said_where_it_is_not_known(monkeypatch, tmp_path):
    monkeypatch.setattr(console, "MAPS", tmp_path / "none")
    assert not console.is_slow()


@pytest.mark.parametrize(("terminal", "slow", "lines"), [(True, True, 1), (True, False, 0), (False, True, 0)])
def test_the_hint_is_for_who_sits_before_a_terminal(monkeypatch, terminal, slow, lines):
    shown = StringIO()
    monkeypatch.setattr(console, "err", Console(file=shown, force_terminal=terminal, soft_wrap=True))
    monkeypatch.setattr(console, "is_slow", lambda: slow)
    console.hint_blas()
    assert shown.getvalue().count(HINT) == shown.getvalue().count("\n") == lines


@pytest.mark.parametrize("command", ["generate {run} --tokens 5", "train --data {corpus} --out r --max-steps 1"])
def test_commands_that_compute_give_the_hint(run, trained, monkeypatch, command):
    hints = []
    for module in (common, train):
        monkeypatch.setattr(module, "hint_blas", lambda: hints.append(command))
    small = "--set d_model=8 --set n_layers=1 --set n_heads=1 --set head_dim=8 --set d_ff=8 --set horizons=none"
    settings = f"{small} --set batch_size=1 --set segment_length=8 --set sample_seconds=0".split()
    places = {"run": trained.run, "corpus": trained.corpus}
    words = command.format(**places).split() + (settings if command.startswith("train") else [])
    assert run(*words).code == 0
    assert hints == [command]
