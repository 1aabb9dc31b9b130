"""Fixtures that several test files share."""

import contextlib
import gc
import importlib
import math
import os
import signal
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # GPUs of 2025 and later: 10 bits would not agree with references

import mlx.core as mx
import pytest
from support.compiler import write_compiler
from support.midi_files import tune, write_midi_files
from support.processes import kept_signal_handlers
from support.tiny import tiny_config

from dsmr_mlx.cli import console, main
from dsmr_mlx.data.prepare import prepare
from dsmr_mlx.model import memory_blocks
from dsmr_mlx.model.device import choose_device
from dsmr_mlx.model.horizon_families import FAMILIES
from dsmr_mlx.training.run import train

if hasattr(os, "SCHED_BATCH"):
    # MLX's thread wakes for every operation of an eager step. On Linux it would preempt Python's thread each time,
    # which costs a quarter of the CPU time of the tests. Threads and processes started later inherit the policy.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

# A shell that starts the tests in the background lets them, and all that they start, ignore these signals.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGQUIT", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)
    if number is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# PyTorch, imported later, shares the cores with other workers: its threads would wait for each other in busy loops.
os.environ.setdefault("OMP_NUM_THREADS", "1")

EXAMPLES = Path(__file__).parents[1] / "examples"

choose_device()

# On a slow machine a command would write a line of progress that a test does not expect.
console.SECONDS_BETWEEN_LINES = math.inf

# No test cuts the power, and flushing to the disk takes milliseconds each time.
os.fsync = lambda descriptor: None


def pytest_collection_finish() -> None:
    """Leave modules and collected tests out of garbage collections, which took a tenth of the time of the tests."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Trained:
    """Folders written by the commands. Tests must not change them."""

    midi: Path
    corpus: Path
    run: Path

    @property
    def checkpoint(self) -> Path:
        """Folder of the best checkpoint."""
        return (self.run / "best").resolve()


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    """Small MIDI files, their corpus, and a run of a few steps on it."""
    folder = tmp_path_factory.mktemp("trained")
    midi = write_midi_files(folder / "midi", {f"{i}.mid": tune(i, 30) for i in range(6)})
    prepare(midi, folder / "corpus", validation_fraction=0.3)
    train(tiny_config(max_steps=4, eval_every=4), folder / "corpus", folder / "run")
    return Trained(midi, folder / "corpus", folder / "run")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder; returns exit code, standard output and standard error."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("COLUMNS", "60")

    def run(*arguments: object) -> Namespace:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse
            code = exit.code
        found = capsys.readouterr()
        return Namespace(code=code, out=found.out, err=found.err)

    return run


@pytest.fixture
def example(monkeypatch, tmp_path, capsys):
    """Run the `main` of an example in an empty folder: what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, *arguments: object) -> str:
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    with kept_signal_handlers(), mock.patch.dict(FAMILIES):
        yield run
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def generate(run, trained):
    """Run the generate command on the trained model, see `run`."""
    return lambda *arguments: run("generate", trained.run, *arguments)


@pytest.fixture
def long_from(monkeypatch):
    """Make memories long from so many slots on, with blocks of `block` slots."""

    def change(at_once: int, block: int = 3) -> None:
        monkeypatch.setattr(memory_blocks, "AT_ONCE", at_once)
        monkeypatch.setattr(memory_blocks, "BLOCK", block)

    return change


@pytest.fixture(scope="session")
def compiler(tmp_path_factory) -> Path | None:
    """The folder of a fast compiler for MLX, see `write_compiler`."""
    return write_compiler(tmp_path_factory.mktemp("compiler"))


@pytest.fixture
def compilation(compiler, monkeypatch):
    """Enable compilation for one test, also if MLX_DISABLE_COMPILE disables it for the others."""
    if compiler:
        monkeypatch.setenv("PATH", f"{compiler}{os.pathsep}{os.environ['PATH']}")
    mx.enable_compile()
    yield
    if os.environ.get("MLX_DISABLE_COMPILE"):
        mx.disable_compile()


@pytest.fixture(scope="session")
def asap_dir() -> Path:
    """The ASAP data set in DSMR_ASAP, see `data_set`."""
    return data_set("DSMR_ASAP", "asap", "metadata.csv")


@pytest.fixture(scope="session")
def maestro_dir() -> Path:
    """MAESTRO v3.0.0, or a part of it, in DSMR_MAESTRO, see `data_set`."""
    return data_set("DSMR_MAESTRO", "maestro-v3.0.0", "maestro-v3.0.0.csv")


def data_set(variable: str, default: str, table: str) -> Path:
    """Return the folder of a data set. Without it the test is skipped; on CI it fails."""
    folder = Path(os.environ.get(variable, default))
    if (folder / table).is_file():
        return folder
    reason = f"no {table} in {folder} (set {variable})"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
