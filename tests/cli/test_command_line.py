"""The command line: its start and end, terminals and pipes."""

import re
import subprocess
import sys
from argparse import Namespace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dsmr_mlx.cli import train
from dsmr_mlx.cli.train import TrainingDisplay
from dsmr_mlx.model import checkpoint

SETTINGS = ("d_model=8", "n_layers=1", "n_heads=1", "head_dim=8", "d_ff=8", "horizons=none")
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]


def test_no_command_shows_the_help(run):
    result = run()
    assert (result.code, result.out) == (2, "")
    assert result.err == run("--help").out


def test_python_m_dsmr_mlx():
    command = [sys.executable, "-m", "dsmr_mlx", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "dsmr-mlx 0.1.0\n"


def test_token_counts_with_an_exponent(run, trained):
    planned = run("train", "--data", trained.corpus, "--out", "r", *SMALL, "--max-tokens", "1e3", "--plan")
    assert planned.code == 0


@pytest.mark.parametrize("stage", ["dsmr_mlx.cli.make_parser", "dsmr_mlx.data.prepare.prepare"])
def test_ctrl_c_is_not_an_error_at_any_time(run, trained, monkeypatch, stage):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, interrupt)
    result = run("prepare", trained.midi, "--out", "c")
    assert (result.code, result.out, result.err) == (130, "", "dsmr-mlx: interrupted\n")


HORIZONS = ["horizons", "uniform:budget=512", "--layers", "4"]


@pytest.mark.parametrize("words", [["tokenize", "{midi}/0.mid", "--json"], HORIZONS], ids=["JSON", "a table"])
def test_a_closed_pipe_is_not_an_error(trained, words):
    """Output of more and of less than a pipe holds: nothing on standard error, and the exit code of SIGPIPE."""
    command = [sys.executable, "-m", "dsmr_mlx", *(word.format(midi=trained.midi) for word in words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        program.stdout.close()
        assert program.stderr.read() == b""
    assert program.returncode == 141


def test_standard_output_may_be_closed():
    command = [sys.executable, "-m", "dsmr_mlx", *HORIZONS]
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(("columns", "shown"), [(80, False), (120, True)])
def test_the_training_bar_fits_the_terminal(monkeypatch, columns, shown):
    screen = StringIO()
    terminal = Console(file=screen, force_terminal=True, width=columns, no_color=True)
    monkeypatch.setattr(train, "err", terminal)
    step = Namespace(loss=4.1, perplexity=60.25, tokens_per_second=1411.0, peak_memory=2e9, seconds=7e4, step=1220)
    with TrainingDisplay() as display:
        display.on_step(Namespace(trainer=Namespace(done=0.5)), step)
        display.bar.refresh()
    last = [line for line in re.split(r"[\r\n]+|\x1b\[\d*[A-K]", screen.getvalue()) if "1,220" in line][-1]
    line = re.sub(r"\x1b\[[\d;?]*\w", "", last)
    assert "━" * 8 in line  # half of it
    assert "perplexity 60.25  1,411 tokens/s" in line
    assert line.rstrip().endswith("left 19:26:40")
    assert ("peak 1.86 GiB" in line) == shown


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate", "--out maestro-small-1.mid: the folder {here} is read-only, expected one that can be written to"),
        ("generate {run} -n 2 --out new/one", "--out new/one/1.mid: the folder {here} is read-only"),
        ("show {midi}/0.mid --html a.html", "--html a.html: the folder {here} is read-only"),
    ],
)
def test_a_read_only_folder_is_an_error_before_the_work(run, trained, monkeypatch, command, message):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != Path.cwd())  # root may write everywhere
    monkeypatch.setattr(checkpoint, "load", None)
    result = run(*command.format(run=trained.run, midi=trained.midi).split())
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert message.format(here=Path.cwd()) in result.err
