"""The cost of whole-piece memory: state, peak memory and time of a training step, near the start and end of a piece.

    python benchmarks/whole_piece.py [--set dtype=bfloat16] [--json FILE]

Compared are a full memory of every layer with all heads, whole-piece memory with 2 key/value heads, and two-scale. Each
has its own process and takes steps in the middle of a piece: the memories hold zeros, which take as long as music.
`--set dtype=bfloat16` computes all of them in 16 bits.
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import ours
from measuring import Worker, in_turn, spread
from outputs import add_outputs, run_main, write_outputs
from rich.console import Console
from rich.table import Table

from dsmr_mlx.common.formatting import format_bytes
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.settings import build_config

ROWS = {
    "full, all heads": "horizons=full:{length}",
    "whole, 2 key/value heads": "horizons=whole:{length} n_kv_heads=2",
    "two-scale": "horizons=two-scale:long=2x1024,short=128",
}


def training_at(config: TrainConfig, data: str, position: int) -> Callable[[], int]:
    """A turn takes a training step with every lane at `position`. It returns the bytes of the state."""
    from dsmr_mlx.training.trainer import Trainer

    trainer = Trainer(config, Corpus.load(data))

    def step() -> int:
        trainer.state.steps = position // config.segment_length * config.segment_length
        trainer.state.filled = 0
        trainer.state.starts = np.zeros_like(trainer.state.starts)
        trainer.state.rebased = np.zeros_like(trainer.state.rebased)
        trainer.lanes.seek(trainer.lanes.cursor() | {"lanes": [[lane, 0] for lane in range(config.batch_size)]})
        while trainer.train_segment() is None:
            pass
        mx.synchronize()  # the update of the weights
        return trainer.state.nbytes

    return step


def measure(config: TrainConfig, data: str, positions: list[int], rounds: int) -> dict[str, Any]:
    """State, peak memory, and the tokens per second at each position."""
    result: dict[str, Any] = {"horizons": config.horizons, "n_kv_heads": config.n_kv_heads, "dtype": config.dtype}
    for position in positions:
        with closing(Worker(training_at, config, data, position)) as side:
            result["state_bytes"] = side()
            (seconds,) = in_turn([side], rounds, warmup=0)
            rate = spread([config.tokens_per_step / each for each in seconds])
            result[f"at_{position}"] = {"tokens_per_second": rate, "peak_bytes": side.memory()["peak"]}
    return result


def show(results: dict[str, dict[str, Any]], positions: list[int]) -> None:
    """Print the table."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("", "state", *(f"peak at {p:,}" for p in positions), *(f"tokens/s at {p:,}" for p in positions)):
        table.add_column(heading, justify="right" if heading else "left")
    for name, found in results.items():
        at = [found[f"at_{position}"] for position in positions]
        peaks = [format_bytes(each["peak_bytes"]) for each in at]
        rates = [f"{each['tokens_per_second']['median']:,.0f}" for each in at]
        table.add_row(name, format_bytes(found["state_bytes"]), *peaks, *rates)
    Console(width=140).print(table)


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", help="preset of the model (default small)")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--length", type=int, default=30_000, metavar="N", help="tokens of a piece (default 30,000)")
    parser.add_argument("--early", type=int, default=1_000, metavar="N", help="the other position (default 1,000)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="steps that are timed (default 3)")
    add_outputs(parser, plot=False)
    a = parser.parse_args()
    positions, results = [a.early, a.length], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in ROWS.items():
            settings = (*a.settings, *changes.format(length=a.length).split())
            config = build_config(a.preset, settings=settings)
            data = ours.write_corpus(Path(folder) / name.split(",")[0], config.batch_size, a.length)
            results[name] = measure(config.for_corpus(Corpus.load(data)), data, positions, a.rounds)
    show(results, positions)
    write_outputs(a, {"length": a.length, "rows": results})


if __name__ == "__main__":
    run_main(main)
