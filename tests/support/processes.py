"""Run scripts and the ranks of a distributed run as processes."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsmr_mlx.training.run_record import read_metrics


def launch(
    corpus: Path,
    out: Path,
    ranks: int,
    *settings: str,
    resume: bool = False,
    corpora: list[Path] | None = None,
    outs: list[Path] | None = None,
) -> list[subprocess.Popen]:
    """Start the processes of `mlx.launch -n RANKS --backend ring`, which itself hides their exit codes."""
    ports = []
    for _ in range(ranks):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    hosts = out.parent / f"{out.name}-hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    options = [f"--set={s}" for s in (*SETTINGS, *settings)] + ["--resume"] * resume
    processes = []
    for rank in range(ranks):
        data, run = (corpora or [corpus] * ranks)[rank], (outs or [out] * ranks)[rank]
        arguments = [sys.executable, "-m", "dsmr_mlx.train", "--data", data, "--out", run, *options]
        ring = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} if ranks > 1 else {}
        environment = os.environ | ring | {"OPENBLAS_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    return processes


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """Wait for processes that must succeed. Return their standard errors."""
    shown = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), shown
    return shown


def cpu_seconds() -> float:
    """Processor time of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@contextmanager
def kept_signal_handlers() -> Iterator[None]:
    """Restore the handlers of the signals that programs handle."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def losses(run: Path, kind: str = "train") -> list[float]:
    """Return the training losses of a run, or its validation perplexities."""
    return [line["loss" if kind == "train" else "perplexity"] for line in read_metrics(run) if line["kind"] == kind]


def python(code: str, *arguments: object) -> str:
    """Run code in another process, in a folder without modules. Return its output."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(statement: str) -> set[str]:
    """Return the names of the modules that are loaded after a statement."""
    report = "import json, sys; print(); print(json.dumps(sorted(sys.modules)))"
    return set(json.loads(python(f"{statement}\n{report}").splitlines()[-1]))


def named(modules: set[str], *packages: str) -> set[str]:
    """Return the modules of these packages."""
    return {name for name in modules if name in packages or name.startswith(tuple(f"{p}." for p in packages))}


SETTINGS = [
    *("d_model=16", "n_layers=2", "n_heads=2", "head_dim=8", "d_ff=24", "segment_length=8", "batch_size=4"),
    *("horizons=two-scale:long=1x12,short=4", "warmup_steps=3", "eval_every=10", "checkpoint_every=5"),
    "sample_seconds=0",
]
