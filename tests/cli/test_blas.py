"""The hint for users whose MLX has a slow BLAS, and nobody else."""

import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dsmr_mlx.cli import common, console, train
from dsmr_mlx.common import blas

HINT = "hint: MLX's own BLAS is slow"
ANSWER = """
import mlx.core
from dsmr_mlx.common.blas import MEMORY_MAP, WHEEL_BLAS, blas_is_slow
print(blas_is_slow(), WHEEL_BLAS in MEMORY_MAP.read_text())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="MLX's wheels for Linux only")
def test_the_blas_of_the_wheels_is_slow_unless_another_is_preloaded():
    def answer(preload: str) -> list[str]:
        command, environment = [sys.executable, "-c", ANSWER], {"LD_PRELOAD": preload}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.split()

    slow, has_wheel_blas = answer("")
    assert slow == has_wheel_blas
    openblas = sorted(Path("/usr/lib").glob("*/libopenblas.so.0"))
    if openblas:
        assert answer(str(openblas[0])) == ["False", has_wheel_blas]


def test_an_unknown_blas_counts_as_fast(monkeypatch, tmp_path):
    monkeypatch.setattr(blas, "MEMORY_MAP", tmp_path / "none")
    assert not blas.blas_is_slow()


@pytest.mark.parametrize(("terminal", "slow", "lines"), [(True, True, 1), (True, False, 0), (False, True, 0)])
def test_the_hint_is_shown_on_terminals_only(monkeypatch, terminal, slow, lines):
    shown = StringIO()
    monkeypatch.setattr(console, "err", Console(file=shown, force_terminal=terminal, soft_wrap=True))
    monkeypatch.setattr(console, "blas_is_slow", lambda: slow)
    console.hint_blas()
    assert shown.getvalue().count(HINT) == shown.getvalue().count("\n") == lines


@pytest.mark.parametrize("command", ["generate {run} --tokens 5", "train --data {corpus} --out r --max-steps 1"])
def test_commands_that_compute_show_the_hint(run, trained, monkeypatch, command):
    hints = []
    for module in (common, train):
        monkeypatch.setattr(module, "hint_blas", lambda: hints.append(command))
    small = "--set d_model=8 --set n_layers=1 --set n_heads=1 --set head_dim=8 --set d_ff=8 --set horizons=none"
    settings = f"{small} --set batch_size=1 --set segment_length=8 --set sample_seconds=0".split()
    places = {"run": trained.run, "corpus": trained.corpus}
    words = command.format(**places).split() + (settings if command.startswith("train") else [])
    assert run(*words).code == 0
    assert hints == [command]
