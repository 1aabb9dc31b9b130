"""Decoding speed: whether it stays constant, and what a step consists of.

    python benchmarks/decode.py [--preset small | --checkpoint RUN] [--rounds 12] [--json FILE] [--plot FILE]
    python benchmarks/decode.py --endless 1000000 [--json FILE] [--plot FILE]

Each comparison has two sides that take turns in one process, some tokens at a time, so a machine that slows down slows
both. Ratios are per round; the table has their medians and middle half.

`--endless N` streams N tokens through a tiny model, most of them read in whole segments. Along the way it shows the
time per generated token, the memory held, and how far the logits are from those of a fresh model that has read only
the tokens still in reach.

`benchmarks/peers.py` compares with other programs.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
from measuring import in_turn, music, random_model, ratios, seconds, spread, take
from outputs import add_outputs, run_main, write_outputs
from pictures import Curve, Group, Pair, Panel, draw_curves, draw_pairs
from rich.console import Console
from rich.table import Table

from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.training.settings import build_config

MAX_PLAYED = 400  # tokens generated at each inspection of an endless stream


def playing(model: DSMR, tokenizer: Tokenizer, position: int, compile: bool | None, **options: Any) -> Player:
    """A player that has read `position` random tokens."""
    player = Player(model, tokenizer, compile=compile, **options)
    player.read(music(position))
    return player


def taking_turns(sides: list[Iterator[object]], a: argparse.Namespace) -> list[list[float]]:
    """Milliseconds per step of each side, round by round."""
    times = in_turn([partial(take, side, a.tokens) for side in sides], a.rounds)
    return [[1e3 * spent / a.tokens for spent in side] for side in times]


def row(name: str, other: str, times: list[list[float]], ratio: dict[str, float], target: str, met: bool) -> dict:
    """One comparison as a row of the results."""
    ms = [spread(side) for side in times]
    return {"comparison": name, "against": other, "ms": ms, "ratio": ratio, "target": target, "met": met}


def compare_positions(model: DSMR, tokenizer: Tokenizer, a: argparse.Namespace) -> dict:
    """A token far into a piece against one near its start."""
    sides = [playing(model, tokenizer, position, a.compile).play(Limits()) for position in (a.far, a.near)]
    times = taking_turns(sides, a)
    ratio = ratios(*times)
    return row(f"a token at {a.far:,}", f"at {a.near:,}", times, ratio, "time ≤ 1.05", ratio["median"] <= 1.05)


def compare_overhead(model: DSMR, tokenizer: Tokenizer, a: argparse.Namespace) -> dict:
    """The share of a step spent in Python and on building graphs, that is, outside evaluations.

    No token is played ahead: waiting for it is no work.
    """
    evaluating = 0.0

    def timed(evaluate: Callable) -> Callable:
        def call(*arrays: object) -> None:
            nonlocal evaluating
            started = time.perf_counter()
            evaluate(*arrays)
            evaluating += time.perf_counter() - started

        return call

    steps = playing(model, tokenizer, a.near, a.compile, ahead=False).play(Limits())
    take(steps, 2 * a.tokens)
    originals = mx.eval, mx.async_eval
    mx.eval, mx.async_eval = map(timed, originals)
    outside, whole = [], []
    try:
        for _ in range(a.rounds):
            before = evaluating
            whole.append(1e3 * seconds(partial(take, steps, a.tokens)) / a.tokens)
            outside.append(whole[-1] - 1e3 * (evaluating - before) / a.tokens)
    finally:
        mx.eval, mx.async_eval = originals
    ratio = ratios(outside, whole)
    times = [outside, whole]
    return row("Python and graph building", "the whole step", times, ratio, "time ≤ 0.20", ratio["median"] <= 0.2)


def compare_variations(model: DSMR, tokenizer: Tokenizer, a: argparse.Namespace) -> dict:
    """Four lanes against one."""
    sides = [playing(model, tokenizer, a.near, a.compile, n=n).play(Limits()) for n in (4, 1)]
    four, one = times = taking_turns(sides, a)
    ratio = ratios([4 * ms for ms in one], four)
    return row("4 variations", "1", times, ratio, "tokens/s ≥ 2", ratio["median"] >= 2)


def memory_of_a_step(model: DSMR, tokenizer: Tokenizer, a: argparse.Namespace) -> dict:
    """The peak memory of a step beyond the state; it is large if slots are not written in place."""
    player = playing(model, tokenizer, a.near, a.compile)
    steps, extra = player.play(Limits()), []
    take(steps, 10)
    for _ in range(2 * model.config.segment_length):
        mx.synchronize()
        active = mx.get_active_memory()
        mx.reset_peak_memory()
        next(steps)
        mx.synchronize()
        extra.append(mx.get_peak_memory() - active)
    return {
        "state_bytes": player.nbytes,
        "median_extra_bytes": statistics.median(extra),
        "max_extra_bytes": max(extra),
    }


def endless(total: int, compile: bool | None) -> Iterator[dict]:
    """Inspect a stream of `total` tokens ten times; see the module docstring."""
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 2, "head_dim": 16, "d_ff": 64, "segment_length": 64}
    config = ModelConfig(vocab_size=PerformanceTokenizer().vocab_size, horizons=[128, 64], **shape)
    model = random_model(config)
    player = Player(model, PerformanceTokenizer(), compile=compile)
    phrase, recent = music(8 * config.segment_length), []
    player.read([])
    n = min(MAX_PLAYED, total // 20)
    for mark in (total * i // 10 for i in range(1, 11)):
        started, begun = time.perf_counter(), player.position
        while player.position < mark - n:
            player.read(phrase)
            recent = phrase.tolist()
        reading = 1e6 * (time.perf_counter() - started) / max(player.position - begun, 1)
        steps, started = player.play(Limits()), time.perf_counter()
        recent += [int(step[0]) for step in islice(steps, n)]
        played = 1e6 * (time.perf_counter() - started) / n
        # All tokens that can influence the logits: the horizons add up across layers, before the current segment.
        reachable = sum(config.horizons) + (player.position - 1) % config.segment_length + 1
        fresh, _ = model(mx.array([recent[-reachable:]]))
        error = mx.abs(fresh[0, -1] - player.logits[0]).max().item()
        mx.clear_cache()
        yield {
            "tokens": player.position,
            "read_us": reading,
            "played_us": played,
            "held_bytes": mx.get_active_memory(),
            "state_bytes": player.nbytes,
            "logit_error": error,
        }


def show_endless(result: dict, console: Console) -> None:
    """Print the table of an endless stream."""
    rows = result["rows"]
    table = Table(box=None, title=f"a stream of {rows[-1]['tokens']:,} tokens through a tiny model")
    for column in ("tokens", "read, µs/token", "generated, µs/token", "memory held", "state", "logit error"):
        table.add_column(column, justify="right")
    for row in rows:
        times = f"{row['read_us']:.1f}", f"{row['played_us']:.0f}"
        sizes = f"{row['held_bytes']:,}", f"{row['state_bytes']:,}"
        table.add_row(f"{row['tokens']:,}", *times, *sizes, f"{row['logit_error']:.1e}")
    console.print(table)


def show(result: dict, console: Console) -> None:
    """Print the comparisons."""
    table = Table(box=None, title=result["title"])
    for column in ("", "ms/step", "against", "ms/step", "ratio", "middle half", "target", ""):
        table.add_column(column, justify="right" if column in ("ms/step", "ratio", "middle half") else "left")
    for row in result["rows"]:
        (ours, theirs), ratio = (f"{ms['median']:.2f}" for ms in row["ms"]), row["ratio"]
        between = f"{ratio['low']:.2f} – {ratio['high']:.2f}"
        outcome = row["target"], "met" if row["met"] else "missed"
        table.add_row(row["comparison"], ours, row["against"], theirs, f"{ratio['median']:.2f}", between, *outcome)
    console.print(table)
    memory = result["memory"]
    console.print(
        f"the state has {memory['state_bytes']:,} bytes; a step allocates {memory['median_extra_bytes']:,.0f} more, "
        f"at the end of a segment {memory['max_extra_bytes']:,}"
    )


def draw(result: dict, path: Path) -> None:
    """Draw the comparisons."""
    pairs = [
        Pair(
            f"{row['comparison']} | {row['against']}",
            tuple(row["ms"]),
            f"{row['ratio']['median']:.2f}, {row['target']}",
        )
        for row in result["rows"]
    ]
    draw_pairs(path, [Group("milliseconds per step", pairs)], ("the first", "the second"), result["title"])


def draw_endless(result: dict, path: Path) -> None:
    """Draw an endless stream."""
    columns = {"read_us": "µs per token read", "played_us": "µs per token generated"}
    columns |= {"held_bytes": "bytes held", "logit_error": "error of the logits"}
    x = [row["tokens"] for row in result["rows"]]
    panels = [
        Panel(title, "tokens so far", [Curve(x, [row[name] for row in result["rows"]])], log=False)
        for name, title in columns.items()
    ]
    draw_curves(path, panels, 4, f"a stream of {x[-1]:,} tokens through a tiny model")


def compare(a: argparse.Namespace) -> dict:
    """All comparisons, on the model given by the options."""
    if a.checkpoint:
        model, tokenizer = checkpoint.load(a.checkpoint)
    else:
        tokenizer, config = PerformanceTokenizer(), build_config(a.preset, settings=a.settings)
        model = random_model(config.model_config(tokenizer), config.dtype)
    comparisons = (compare_positions, compare_overhead, compare_variations)
    device = f"{mx.default_device().type.name}, {os.cpu_count()} cores"
    return {
        "title": f"{a.checkpoint or 'preset ' + a.preset}, {a.rounds} rounds, {device}",
        "rows": [measure(model, tokenizer, a) for measure in comparisons],
        "memory": memory_of_a_step(model, tokenizer, a),
    }


def main() -> None:
    """Parse the options, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--preset", default="small", help="random weights of this size (default small)")
    source.add_argument("--checkpoint", metavar="RUN", help="a checkpoint or run instead")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=12, metavar="N", help="turns of each side (default 12)")
    parser.add_argument("--tokens", type=int, default=40, metavar="N", help="tokens in a turn (default 40)")
    parser.add_argument(
        "--near", type=int, default=1_000, metavar="N", help="position of the first side (default 1000)"
    )
    parser.add_argument(
        "--far", type=int, default=100_000, metavar="N", help="position compared with it (default 100000)"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compile the steps (default: the player decides)"
    )
    parser.add_argument("--endless", type=int, metavar="N", help="stream N tokens through a tiny model instead")
    add_outputs(parser)
    a = parser.parse_args()
    console = Console(width=150)
    result = {"rows": list(endless(a.endless, a.compile))} if a.endless else compare(a)
    (show_endless if a.endless else show)(result, console)
    write_outputs(a, result, partial(draw_endless if a.endless else draw, result))


if __name__ == "__main__":
    run_main(main)
