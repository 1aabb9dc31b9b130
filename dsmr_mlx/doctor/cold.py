"""How soon the first token comes in a new process, where nothing is compiled yet, and how fast the next ones come.

    python -m dsmr_mlx.doctor.cold FILE [compiled]

writes the figures of one process as JSON. MLX reads how many operations a command buffer holds when it is imported, so
that this too takes a process for each value.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from dsmr_mlx.doctor.finding import Finding, Status
from dsmr_mlx.doctor.playing import SLOWER, TIMED, played, tokens_per_second
from dsmr_mlx.generation.options import recommended
from dsmr_mlx.generation.player import Player
from dsmr_mlx.model.checkpoint import load
from dsmr_mlx.model.device import choose_device, on_gpu

OPERATIONS = "MLX_MAX_OPS_PER_BUFFER"
MANY = "1000"  # with which others measured gains on an M1 and losses on an M5
MAX_SECONDS = 300  # of a process


def measure_first_token() -> Finding:
    """The first token in a new process and again, eager and compiled; on a GPU with longer command buffers, too."""
    values = {"eager": in_a_new_process(compiled=False), "compiled": in_a_new_process(compiled=True)}
    text = "; ".join(f"{name} {v['cold']:.2f} s in a new process, then {v['warm']:.2f} s" for name, v in values.items())
    if on_gpu() and OPERATIONS not in os.environ:
        many = values[f"{OPERATIONS}={MANY}"] = in_a_new_process(compiled=True, **{OPERATIONS: MANY})
        speed, best = (v["tokens_per_second"] for v in (values["compiled"], many))
        text += f"; {speed:,.0f} tokens a second, {best:,.0f} with {OPERATIONS}={MANY}"
        if speed < SLOWER * best:
            advice = f"for playing, set {OPERATIONS}={MANY} on this machine; please report it"
            return Finding("", Status.NOTE, text, values, advice)
    return Finding("", Status.OK, text, values)


def in_a_new_process(compiled: bool, **environment: str) -> dict[str, float]:
    """Run this module. Raises `RuntimeError` with the last line of what it printed if it fails."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, "-m", __name__, str(path), *(["compiled"] if compiled else [])]
        options = {"env": os.environ | environment, "text": True, "timeout": MAX_SECONDS}
        try:
            subprocess.check_output(command, stderr=subprocess.STDOUT, **options)
        except subprocess.CalledProcessError as error:
            lines = error.output.strip().splitlines() or [f"exit code {error.returncode}"]
            raise RuntimeError(f"{__name__}: {lines[-1]}") from None
        return json.loads(path.read_text())


def measure(compiled: bool) -> dict[str, float]:
    """Seconds to load the bundled model and play a token, cold, and with another player, warm; tokens per second."""
    values = {}
    for name in ("cold", "warm"):
        started = time.perf_counter()
        model, tokenizer = load(None)
        player = Player(model, tokenizer, compile=compiled, **recommended())
        played(player, 1)
        values[name] = time.perf_counter() - started
    played(player, TIMED // 2)
    values["tokens_per_second"] = statistics.median(tokens_per_second(player, TIMED) for _ in range(3))
    return values


if __name__ == "__main__":
    choose_device()
    Path(sys.argv[1]).write_text(json.dumps(measure("compiled" in sys.argv)))
