"""Run the ranks of a distributed run, as `mlx.launch -n RANKS --backend ring` does, which hides their exit codes.

The ranks are forked from a process that has imported the program, which would take most of a rank's time.
"""

import json
import multiprocessing
import os
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from dsmr_mlx.cli import main
from dsmr_mlx.training.run_record import read_metrics

FORKS = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "forkserver")  # Metal does not fork
FORKS.set_forkserver_preload(["dsmr_mlx.cli.train", "dsmr_mlx.training.plan", "dsmr_mlx.training.run", __name__])
SETTINGS = [
    *("d_model=16", "n_layers=2", "n_heads=2", "head_dim=8", "d_ff=24", "segment_length=8", "batch_size=4"),
    *("horizons=two-scale:long=1x12,short=4", "warmup_steps=3", "eval_every=10", "checkpoint_every=5"),
    "sample_seconds=0",
]


class Rank:
    """A rank of a run, started with the arguments of the command line."""

    def __init__(self, number: int, hosts: Path, arguments: list[str]) -> None:
        self.log = hosts.with_suffix(f".{number}.log")
        ring = {"MLX_RANK": str(number), "MLX_HOSTFILE": str(hosts)}
        self.process: BaseProcess = FORKS.Process(target=run_rank, args=(ring, self.log, arguments))
        self.process.start()

    def wait(self) -> tuple[int, str]:
        """Wait for the end. Return the exit code and the standard error."""
        self.process.join(timeout=120)
        assert self.process.exitcode is not None, self.log.read_text()
        return self.process.exitcode, self.log.read_text()


def run_rank(ring: dict[str, str], log: Path, arguments: list[str]) -> None:
    """Run the command line in a forked process."""
    os.environ |= ring
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.exit(main(arguments))


def command(corpus: Path, out: Path, *settings: str, resume: bool = False) -> list[str]:
    """Return the arguments of the command that trains a tiny model."""
    options = [f"--set={s}" for s in (*SETTINGS, *settings)] + ["--resume"] * resume
    return ["train", "--data", str(corpus), "--out", str(out), *options]


def launch(
    corpus: Path,
    out: Path,
    *settings: str,
    resume: bool = False,
    corpora: list[Path] | None = None,
    outs: list[Path] | None = None,
) -> list[Rank]:
    """Start a run of two ranks."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    hosts = out.parent / f"{out.name}-hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    folders = zip(corpora or [corpus] * 2, outs or [out] * 2, strict=True)
    return [Rank(i, hosts, command(*folder, *settings, resume=resume)) for i, folder in enumerate(folders)]


def finish(ranks: list[Rank]) -> list[str]:
    """Wait for ranks that must succeed. Return their standard errors."""
    codes, shown = zip(*(rank.wait() for rank in ranks), strict=True)
    assert codes == (0,) * len(ranks), shown
    return list(shown)


def train_alone(corpus: Path, out: Path, *settings: str, resume: bool = False) -> None:
    """Train with the same settings in this process."""
    assert main(command(corpus, out, *settings, resume=resume)) == 0


def losses(run: Path, kind: str = "train") -> list[float]:
    """Return the training losses of a run, or its validation perplexities."""
    return [line["loss" if kind == "train" else "perplexity"] for line in read_metrics(run) if line["kind"] == kind]
