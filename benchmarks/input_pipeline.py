"""The cost of input: MIDI files to tokens against symusic and MidiTok, and batches of tokens against a training step.

    python benchmarks/input_pipeline.py [--midi FOLDER] [--data CORPUS] [--preset small] [--json FILE] [--plot FILE]

`--midi`: prepare a sample of the files, see `input_preparing`. `--data`: time per batch of lanes, plain and augmented.
The streams take turns, one batch each; the training steps of the preset run before that, in the same process. A batch
is slow if a lane starts a piece, which is then augmented as a whole. The first batch, in which every lane does, has its
own column. "CPU" is the slowest batch in processor time, which other programs do not affect.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from input_preparing import AGAINST, chosen_files, measure
from measuring import in_turn, spread
from outputs import add_outputs, run_main, write_outputs
from pictures import Group, Pair, draw_pairs
from rich.console import Console
from rich.table import Table

from dsmr_mlx.data.augmentation import Augmentation, augment
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.lanes import Lanes
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.settings import build_config
from dsmr_mlx.training.trainer import Trainer

MAX_SHARE = 0.05  # of a step, for input
WIDTH = 130  # columns of the tables


def step_seconds(config: TrainConfig, corpus: Corpus, warmup: int, rounds: int) -> list[float]:
    """The times of training steps with full memories."""
    trainer = Trainer(config, corpus)

    def step() -> None:
        while trainer.train_segment() is None:
            pass
        mx.synchronize()  # the update of the weights

    (times,) = in_turn([step], rounds, warmup)
    return times


def stream(config: TrainConfig, corpus: Corpus, augmentation: Augmentation) -> Iterator[object]:
    """Lanes over the training split, as in the trainer."""
    pieces = corpus.pieces("train")

    def load(epoch: int, i: int):
        return augment(corpus.tokenizer, corpus.tokens(pieces[i]), augmentation, config.seed, epoch, i)

    return Lanes(load, len(pieces), config.batch_size, config.segment_length, seed=config.seed)


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Wall time and processor time of this thread, in seconds."""
    clock, processor = time.perf_counter(), time.thread_time()
    function()
    return time.perf_counter() - clock, time.thread_time() - processor


def longest_piece_seconds(corpus: Corpus, augmentation: Augmentation, rounds: int = 20) -> tuple[int, float]:
    """Tokens of the longest training piece, and the median time to augment it."""
    ids = corpus.tokens(max(corpus.pieces("train"), key=lambda piece: piece.length))
    times = [timed(lambda e=epoch: augment(corpus.tokenizer, ids, augmentation, 0, e, 0)) for epoch in range(rounds)]
    return len(ids), statistics.median(clock for clock, _ in times)


def summary(name: str, times: list[tuple[float, float]], step: float, accumulate: int) -> dict[str, Any]:
    """Statistics of the batches of a stream; the first one only counts in the mean."""
    clock = [seconds for seconds, _ in times]
    later = sorted(clock[1:])
    return {
        "stream": name,
        "first_ms": 1e3 * clock[0],
        "ms": spread([1e3 * seconds for seconds in later]),
        "p99_ms": 1e3 * later[int(0.99 * len(later))],
        "max_ms": 1e3 * later[-1],
        "max_cpu_ms": 1e3 * max(processor for _, processor in times[1:]),
        "seconds_per_1000": 1e3 * statistics.mean(clock),
        "share_of_step": statistics.mean(clock) * accumulate / step,
    }


def measure_streams(config: TrainConfig, corpus: Corpus, a: argparse.Namespace) -> dict[str, Any]:
    """Both streams in turn, the training step they feed, and the longest piece."""
    augmentation = Augmentation(transpose=a.transpose, stretch=a.stretch, velocity=a.velocity)
    steps = step_seconds(config, corpus, a.warmup, a.steps)
    streams = {"plain": Augmentation(), "augmented": augmentation}
    lanes = [stream(config, corpus, each) for each in streams.values()]
    times: list[list[tuple[float, float]]] = [[] for _ in lanes]
    for _ in range(a.batches):
        for i, each in enumerate(lanes):
            times[i].append(timed(lambda each=each: next(each)))
    step = statistics.median(steps)
    rows = [summary(name, each, step, config.accumulate) for name, each in zip(streams, times, strict=True)]
    length, longest = longest_piece_seconds(corpus, augmentation)
    return {
        "batch": [config.batch_size, config.segment_length],
        "accumulate": config.accumulate,
        "step_ms": spread([1e3 * seconds for seconds in steps]),
        "streams": rows,
        "longest_piece": length,
        "longest_piece_ms": 1e3 * longest,
    }


def show_preparing(found: dict[str, Any], console: Console) -> None:
    """Print one row per side and the ratios of comparable sides."""
    sides = found["sides"]
    title = f"{found['files']} files, {found['megabytes']:.1f} MB, one process each"
    table = Table(box=None, title=title, title_justify="left", pad_edge=False)
    for column in ("", "files/s", "middle half", "MB/s", "tokens", "skipped", "time to the next row", "middle half"):
        table.add_column(column, justify="right" if column else "left")
    for side in sides.values():
        rate, ratio = side["files_per_second"], side.get("time_ratio")
        table.add_row(
            side["title"],
            f"{rate['median']:,.1f}",
            f"{rate['low']:,.1f} – {rate['high']:,.1f}",
            f"{side['megabytes_per_second']['median']:.2f}",
            f"{side['tokens']:,}" if side["tokens"] else "–",
            f"{side['left_out']}",
            *((f"{ratio['median']:.2f}", f"{ratio['low']:.2f} – {ratio['high']:.2f}") if ratio else ("", "")),
        )
    console.print(table)


def show_streams(found: dict[str, Any], title: str, console: Console) -> None:
    """Print one row per stream, and whether the slower one meets its target."""
    table = Table(box=None, title=title, title_justify="left", pad_edge=False)
    for column in ("stream", "first", "median", "p99", "max", "CPU", "1,000 batches", "share of a step"):
        table.add_column(column, justify="left" if column == "stream" else "right")
    for row in found["streams"]:
        table.add_row(
            row["stream"],
            f"{row['first_ms']:.1f} ms",
            f"{row['ms']['median']:.2f} ms",
            f"{row['p99_ms']:.1f} ms",
            f"{row['max_ms']:.1f} ms",
            f"{row['max_cpu_ms']:.1f} ms",
            f"{row['seconds_per_1000']:.2f} s",
            f"{row['share_of_step']:.2%}",
        )
    console.print(table)
    worst = max(row["share_of_step"] for row in found["streams"])
    console.print(
        f"A step takes {found['step_ms']['median']:,.0f} ms (median); input takes at most {worst:.2%} of it, "
        f"target at most {MAX_SHARE:.0%}: {'met' if worst <= MAX_SHARE else 'missed'}."
    )
    console.print(
        f"The longest piece ({found['longest_piece']:,} tokens) is augmented in {found['longest_piece_ms']:.1f} ms."
    )


def draw(path: Path, result: dict[str, Any]) -> None:
    """Draw files per second of comparable sides, and batches against a step."""
    groups = []
    if preparing := result.get("preparing"):
        pairs = []
        for own, other in AGAINST.items():
            sides = [preparing["sides"][name] for name in (own, other)]
            rates = tuple(side["files_per_second"] for side in sides)
            name = f"{sides[0]['title']}; {sides[1]['title']}"
            pairs.append(Pair(name, rates, f"× {1 / sides[0]['time_ratio']['median']:.2f}"))
        groups.append(Group("MIDI files per second, one process each (more is better)", pairs))
    if streaming := result.get("streaming"):
        step = streaming["step_ms"]
        pairs = [
            Pair(f"{row['stream']} batch; training step", (row["ms"], step), f"{row['share_of_step']:.2%}")
            for row in streaming["streams"]
        ]
        groups.append(Group("milliseconds, and the mean share of input in a step (less is better)", pairs))
    draw_pairs(path, groups, ("first named", "second named"), "Input pipeline")


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--midi", metavar="FOLDER", help="MIDI files to prepare")
    parser.add_argument("--files", type=int, default=100, metavar="N", help="most files (default 100)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="number of passes (default 5)")
    parser.add_argument("--data", metavar="CORPUS", help="a prepared corpus to stream")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--batches", type=int, default=1000, metavar="N", help="batches per stream, at least 2")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="training steps to measure")
    parser.add_argument("--warmup", type=int, default=6, metavar="N", help="steps until the memories are full")
    parser.add_argument("--transpose", type=int, default=3)
    parser.add_argument("--stretch", type=float, default=0.05)
    parser.add_argument("--velocity", type=int, default=8)
    add_outputs(parser)
    a = parser.parse_args(words)
    if not a.midi and not a.data:
        parser.error("--midi FOLDER or --data CORPUS is required")
    return a


def main() -> None:
    """Measure what the options name."""
    a = parse_arguments()
    console, result = Console(width=WIDTH), {}
    if a.midi:
        result["preparing"] = measure(chosen_files(a.midi, a.files), a.rounds)
        show_preparing(result["preparing"], console)
    if a.data:
        config, corpus = build_config(a.preset, settings=a.settings), Corpus.load(a.data)
        result["streaming"] = measure_streams(config, corpus, a)
        shape = f"{config.batch_size} × {config.segment_length}"
        device = f"{mx.default_device().type.name}, {os.cpu_count()} cores"
        title = f"{' '.join(['preset', a.preset, *a.settings])}, batches of {shape}, {a.batches} of them, {device}"
        show_streams(result["streaming"], title, console)
    write_outputs(a, result, lambda path: draw(path, result))


if __name__ == "__main__":
    run_main(main)
