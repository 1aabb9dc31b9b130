"""Check that a run killed with SIGKILL at random moments and resumed each time is bitwise the uninterrupted run.

    python tests/support/kill_and_resume.py --data CORPUS --out FOLDER --kills 5 -- --preset tiny --max-steps 150

The options after `--` are those of `dsmr-mlx train`. Prints the steps of the kills and what was compared; the exit code
is 1 if anything differs. The tests use it on a tiny model.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from dsmr_mlx.model.checkpoint import load_arrays
from dsmr_mlx.model.checkpoint_folder import CheckpointStore
from dsmr_mlx.training.run_record import METRICS_FILE, read_metrics

VOLATILE = {"tokens_per_second", "peak_memory", "seconds"}  # measured, so that no two runs share them


def figures(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run without the measured ones."""
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in read_metrics(run)]


def differences(a: Path, b: Path) -> list[str]:
    """Return the bitwise differences of two runs in metrics, checkpoints, and which are last and best."""
    found = [] if figures(a) == figures(b) else [METRICS_FILE]
    found += [link for link in ("last", "best") if (a / link).resolve().name != (b / link).resolve().name]
    found += [] if training_values(a) == training_values(b) else ["training.json"]
    for name in ("model.safetensors", "training.safetensors", "memory.safetensors"):
        left, right = load_arrays(a / "last" / name), load_arrays(b / "last" / name)
        found += [f"{name}: {key}" for key in left.keys() ^ right.keys()]
        common = left.keys() & right.keys()
        found += [f"{name}: {key}" for key in common if content(left[key]) != content(right[key])]
    return found


def content(array: mx.array) -> bytes:
    """Return the bytes of an array; NumPy has no bfloat16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).tobytes()


def training_values(run: Path) -> dict[str, Any]:
    """Return the training.json of a run's last checkpoint without its times."""
    values = json.loads((run / "last" / "training.json").read_text())
    values["progress"] = {k: v for k, v in values["progress"].items() if not k.endswith("seconds")}
    return values


def checkpoint_step(folder: Path) -> int:
    """Return the step of a checkpoint or of the target of a link."""
    return int(re.match(r"step-(\d+)", folder.resolve().name)[1])


def train_process(data: Path, out: Path, options: Sequence[str]) -> subprocess.Popen:
    """Start `dsmr-mlx train --resume` as a process."""
    command = [sys.executable, "-m", "dsmr_mlx.train", "--data", str(data), "--out", str(out), "--resume", *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for_steps(run: Path, process: subprocess.Popen, more: int) -> None:
    """Wait until the process has trained `more` steps since it resumed, or has ended."""
    path, started = run / METRICS_FILE, time.time()
    latest = CheckpointStore(run, 1).latest()
    before = checkpoint_step(latest) if latest else 0
    while process.poll() is None:
        if path.exists() and path.stat().st_mtime > started:
            steps = [line["step"] for line in read_metrics(run) if line["kind"] == "train"]
            if steps and steps[-1] >= before + more:
                return
        time.sleep(0.02)


def killed_run(
    data: Path, out: Path, options: Sequence[str], waits: Sequence[int], say: Callable[[str], None] = lambda _: None
) -> int:
    """Train to the end in `out`, with a kill after each number of steps in `waits`. Return the number of kills."""
    kills = 0
    for wait in waits:
        process = train_process(data, out, options)
        wait_for_steps(out, process, wait)
        process.kill()
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            kills += 1
            say(f"killed at step {read_metrics(out)[-1]['step']}")
    process = train_process(data, out, options)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors)
    return kills


def main() -> int:
    """Compare an uninterrupted run with a killed one. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="CORPUS")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the runs straight and killed")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--longest", type=int, default=40, metavar="STEPS", help="between two kills (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", metavar="OPTION", help="of dsmr-mlx train, after --")
    a = parser.parse_args()
    straight, killed = a.out / "straight", a.out / "killed"
    killed_run(a.data, straight, a.options, [])
    waits = np.random.default_rng(a.seed).integers(1, a.longest, a.kills).tolist()
    kills = killed_run(a.data, killed, a.options, waits, print)
    found = differences(straight, killed)
    lines = figures(straight)
    last = [line for line in lines if line["kind"] == "validation"][-1]
    print(f"{kills} kills; {len(lines)} lines of metrics, last validation perplexity {last['perplexity']!r}")
    print(
        "different: " + ", ".join(found)
        if found
        else "bitwise equal: metrics, weights, optimizer, lanes, memories, best and last"
    )
    return 1 if found or kills < a.kills else 0


if __name__ == "__main__":
    sys.exit(main())
