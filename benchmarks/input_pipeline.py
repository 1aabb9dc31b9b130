"""What reading the corpus costs beside a training step: time per batch of lanes, plain and augmented.

    python benchmarks/input_pipeline.py --data CORPUS [--preset small] [--batches 1000] [--transpose 3] ...

The streams take batches in turn, one each, so that a machine that slows down slows all of them; the steps are real
ones of the preset, in the same process, before that. A batch is dear when a lane begins a piece, which is then
augmented as a whole, and the first one most, in which every lane does: it has a column of its own. "CPU" is the
dearest batch in time of the processor, which other programs on the machine do not lengthen.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from dsmr_mlx.augmentation import Augmentation, augment
from dsmr_mlx.corpus import Corpus
from dsmr_mlx.streaming import Lanes
from dsmr_mlx.train_config import TrainConfig, build_config
from dsmr_mlx.trainer import Trainer

STEP_SHARE = 0.05  # of a step, the most that input may cost


def step_seconds(config: TrainConfig, corpus: Corpus, warmup: int, rounds: int) -> list[float]:
    """The time of each of some training steps, the memories filled before."""
    trainer = Trainer(config, corpus)
    seconds = []
    for _ in range(warmup + rounds):
        started = time.perf_counter()
        while trainer.train_segment() is None:
            pass
        seconds.append(time.perf_counter() - started)
    return seconds[warmup:]


def stream(config: TrainConfig, corpus: Corpus, augmentation: Augmentation) -> Iterator[object]:
    """Lanes over the training split as the trainer has them."""
    pieces = corpus.pieces("train")

    def load(epoch: int, i: int):
        return augment(corpus.tokenizer, corpus.tokens(pieces[i]), augmentation, config.seed, epoch, i)

    return Lanes(load, len(pieces), config.batch_size, config.segment_length, seed=config.seed)


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of this thread's processor."""
    clock, processor = time.perf_counter(), time.thread_time()
    function()
    return time.perf_counter() - clock, time.thread_time() - processor


def longest_piece_seconds(corpus: Corpus, augmentation: Augmentation, rounds: int = 20) -> tuple[int, float]:
    """How many tokens the longest training piece has, and the median time to augment it."""
    ids = corpus.tokens(max(corpus.pieces("train"), key=lambda piece: piece.length))
    times = [timed(lambda e=epoch: augment(corpus.tokenizer, ids, augmentation, 0, e, 0)) for epoch in range(rounds)]
    return len(ids), statistics.median(clock for clock, _ in times)


def summary(name: str, times: list[tuple[float, float]], step: float, accumulate: int) -> dict:
    clock = [seconds for seconds, _ in times]
    later = sorted(clock[1:])
    return {
        "stream": name,
        "first_ms": 1e3 * clock[0],
        "median_ms": 1e3 * statistics.median(later),
        "p99_ms": 1e3 * later[int(0.99 * len(later))],
        "max_ms": 1e3 * later[-1],
        "max_cpu_ms": 1e3 * max(processor for _, processor in times[1:]),
        "seconds_per_1000": 1e3 * statistics.mean(clock),
        "share_of_step": statistics.mean(clock) * accumulate / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="CORPUS")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--batches", type=int, default=1000, metavar="N", help="at least 2")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="training steps to measure")
    parser.add_argument("--warmup", type=int, default=6, metavar="N", help="steps until the memories are full")
    parser.add_argument("--transpose", type=int, default=3)
    parser.add_argument("--stretch", type=float, default=0.05)
    parser.add_argument("--velocity", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    config, corpus = build_config(a.preset, settings=a.settings), Corpus.load(a.data)
    augmentation = Augmentation(transpose=a.transpose, stretch=a.stretch, velocity=a.velocity)
    step = statistics.median(step_seconds(config, corpus, a.warmup, a.steps))
    streams = {"plain": Augmentation(), "augmented": augmentation}
    lanes = [stream(config, corpus, each) for each in streams.values()]
    times: list[list[tuple[float, float]]] = [[] for _ in lanes]
    for _ in range(a.batches):
        for i, each in enumerate(lanes):
            times[i].append(timed(lambda each=each: next(each)))
    rows = [summary(name, each, step, config.accumulate) for name, each in zip(streams, times, strict=True)]
    length, longest = longest_piece_seconds(corpus, augmentation)
    result = {"step_ms": 1e3 * step, "streams": rows, "longest_piece": length, "longest_piece_ms": 1e3 * longest}
    print(json.dumps(result, indent=2)) if a.json else show(result, a, config)


def show(result: dict, a: argparse.Namespace, config: TrainConfig) -> None:
    shape = f"{config.batch_size} × {config.segment_length}"
    device = f"{mx.default_device().type.name}, {os.cpu_count()} cores"
    title = f"preset {a.preset} {' '.join(a.settings)}, batches of {shape}, {a.batches} of them, {device}"
    table = Table(box=None, title=title)
    for column in ("stream", "first", "median", "p99", "max", "CPU", "1,000 batches", "share of a step"):
        table.add_column(column, justify="left" if column == "stream" else "right")
    for row in result["streams"]:
        table.add_row(
            row["stream"],
            f"{row['first_ms']:.1f} ms",
            f"{row['median_ms']:.2f} ms",
            f"{row['p99_ms']:.1f} ms",
            f"{row['max_ms']:.1f} ms",
            f"{row['max_cpu_ms']:.1f} ms",
            f"{row['seconds_per_1000']:.2f} s",
            f"{row['share_of_step']:.2%}",
        )
    console = Console(width=130)
    console.print(table)
    worst = max(row["share_of_step"] for row in result["streams"])
    console.print(
        f"A step takes {result['step_ms']:,.0f} ms (median of {a.steps}); input takes at most {worst:.2%} of it, "
        f"{'within' if worst <= STEP_SHARE else 'above'} the target of {STEP_SHARE:.0%}."
    )
    console.print(
        f"The longest piece ({result['longest_piece']:,} tokens) is augmented in {result['longest_piece_ms']:.1f} ms."
    )


if __name__ == "__main__":
    main()
