"""Horizon schedules side by side: training tokens/s, peak memory and recurrent state in the same setting.

    python benchmarks/schedules.py --data CORPUS [--preset small] [--rounds 10] [SPEC ...]

Each schedule has a process of its own, so that its peak memory is its own; the processes take steps in turn, one
at a time, so that a machine that slows down slows all of them. Prints medians and the ratio to the first schedule,
which is taken round by round.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from multiprocessing.connection import Connection

from rich.console import Console
from rich.table import Table

from dsmr_mlx.horizons import parse
from dsmr_mlx.train_config import build_config

SPECS = ("two-scale:long=2x1024,short=128", "uniform:budget=2560", "full:1024")


def worker(pipe: Connection, data: str, preset: str, settings: list[str]) -> None:
    """Answer each request with (tokens, seconds, peak bytes) of one more step."""
    import time

    import mlx.core as mx

    from dsmr_mlx.corpus import Corpus
    from dsmr_mlx.trainer import Trainer

    trainer = Trainer(build_config(preset, settings=settings), Corpus.load(data))
    pipe.send(trainer.memory.nbytes)
    while pipe.recv():
        before, started = trainer.progress.tokens, time.perf_counter()
        while trainer.train_segment() is None:
            pass
        pipe.send((trainer.progress.tokens - before, time.perf_counter() - started, mx.get_peak_memory()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("specs", nargs="*", default=SPECS, metavar="SPEC")
    parser.add_argument("--data", required=True, metavar="CORPUS")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=10, metavar="N")
    parser.add_argument("--warmup", type=int, default=6, metavar="N", help="steps until the memories are full")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes, state_bytes = [], []
    for spec in a.specs:
        here, there = context.Pipe()
        settings = [*a.settings, f"horizons={spec}"]
        context.Process(target=worker, args=(there, a.data, a.preset, settings), daemon=True).start()
        pipes.append(here)
        state_bytes.append(here.recv())
    rates: list[list[float]] = [[] for _ in a.specs]
    peaks = [0] * len(a.specs)
    for turn in range(a.warmup + a.rounds):
        for i, pipe in enumerate(pipes):
            pipe.send(True)
            tokens, seconds, peaks[i] = pipe.recv()
            if turn >= a.warmup:
                rates[i].append(tokens / seconds)
    for pipe in pipes:
        pipe.send(False)
    rows = [
        {
            "schedule": spec,
            "budget": parse(spec, build_config(a.preset, settings=a.settings).n_layers).budget,
            "tokens_per_second": statistics.median(rate),
            "spread": [min(rate), max(rate)],
            "speed_ratio": statistics.median(x / y for x, y in zip(rate, rates[0], strict=True)),
            "peak_bytes": peak,
            "memory_ratio": peak / peaks[0],
            "state_bytes": state,
        }
        for spec, rate, peak, state in zip(a.specs, rates, peaks, state_bytes, strict=True)
    ]
    print(json.dumps(rows, indent=2)) if a.json else show(rows, a)


def show(rows: list[dict], a: argparse.Namespace) -> None:
    table = Table(
        box=None, title=f"preset {a.preset} {' '.join(a.settings)}, {a.rounds} rounds, {os.cpu_count()} cores"
    )
    for column in ("schedule", "Σ M", "tokens/s", "min – max", "ratio", "peak", "ratio", "state"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for row in rows:
        low, high = row["spread"]
        table.add_row(
            row["schedule"],
            f"{row['budget']:,}",
            f"{row['tokens_per_second']:,.0f}",
            f"{low:,.0f} – {high:,.0f}",
            f"{row['speed_ratio']:.2f}",
            f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            f"{row['memory_ratio']:.2f}",
            f"{row['state_bytes'] / 2**20:.1f} MiB",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
