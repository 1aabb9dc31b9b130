"""The cost of horizon schedules, the rows of `paper_table.py`: recurrent state, peak memory, training, decoding.

    python benchmarks/schedule_cost.py --data CORPUS [--size cpu] [--json FILE] [ROW ...]

Each schedule has its own process, so its peak memory is measured alone. It takes turns with the first one, which
stays loaded, so ratios compare the same moments and at most two models are in memory. Memories are full from the
first measured step on. `FHCR` has no full memory; `whole_piece.py` measures it.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import mlx.core as mx
from measuring import Worker, in_turn, random_model, ratios, spread
from outputs import add_outputs, run_main, write_outputs
from paper_table import ITEMSIZES, SIZES, Size, as_list, default_dtype, say
from rich.console import Console
from rich.table import Table

from dsmr_mlx.common.formatting import format_bytes, format_number
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.settings import build_config

ROWS = ("full", "two-scale", "inverse-two-scale", "linear-rising", "linear-falling", "uniform")


def training(config: TrainConfig, data: str) -> Callable[[], int]:
    """A turn takes a training step and returns the bytes of the recurrent state."""
    from dsmr_mlx.training.trainer import Trainer

    trainer = Trainer(config, Corpus.load(data))

    def step() -> int:
        while trainer.train_segment() is None:
            pass
        mx.synchronize()  # the update of the weights
        return trainer.state.nbytes

    return step


def decoding(config: TrainConfig, data: str, tokens: int) -> Callable[[], None]:
    """A turn generates some tokens with random weights and a full memory."""
    from dsmr_mlx.generation.grammar import Limits
    from dsmr_mlx.generation.player import Player

    corpus = Corpus.load(data)
    longest = corpus.tokens(max(corpus.pieces("train"), key=lambda piece: piece.length))
    player = Player(random_model(config.model_config(corpus.tokenizer), config.dtype), corpus.tokenizer)
    player.read(longest[: min(len(longest) - 1, max(config.schedule.horizons) + config.segment_length)])
    steps = player.play(Limits())

    def play() -> None:
        for _ in islice(steps, tokens):
            pass

    return play


def measure(configs: dict[str, TrainConfig], data: str, rounds: int, decoded: int) -> dict[str, dict[str, Any]]:
    """`training` and `decoding` of each schedule, see `against_first`; `decoded`: tokens per turn."""
    # Segments until the longest memory is full, in addition to the warm-up.
    fill = max(-(-max(c.schedule.horizons) // (c.segment_length * c.accumulate)) for c in configs.values())
    first = next(iter(configs.values()))
    say("training steps")
    sides = [partial(Worker, training, config, data) for config in configs.values()]
    trained = against_first(sides, rounds, fill, first.tokens_per_step)
    say("decoding")
    sides = [partial(Worker, decoding, config, data, decoded) for config in configs.values()]
    played = against_first(sides, rounds, 1, decoded)
    return {
        name: {"horizons": config.horizons, "budget": config.schedule.budget, "training": train, "decoding": play}
        for (name, config), train, play in zip(configs.items(), trained, played, strict=True)
    }


def against_first(starts: Sequence[Callable[[], Worker]], rounds: int, fill: int, tokens: int) -> list[dict[str, Any]]:
    """The cost of each side, which takes turns with the first.

    fill: turns before anything is measured; tokens: per turn. tokens_per_second and ratio (to the first, per round)
    have median and quartiles; peak_bytes is the peak of MLX's allocations.
    """
    first = starts[0]()
    for _ in range(fill):
        first()
    times, results = [], []
    for start in starts[1:]:
        other = start()
        for _ in range(fill):
            other()
        reference, seconds = in_turn([first, other], rounds)
        results.append(result(other, seconds, tokens) | {"ratio": ratios(reference, seconds)})
        other.close()
        times += reference
        say(f"{len(results) + 1} of {len(starts)} schedules")
    if not times:
        (times,) = in_turn([first], rounds)
    results.insert(0, result(first, times, tokens) | {"ratio": spread([1.0])})
    first.close()
    return results


def result(side: Worker, seconds: Sequence[float], tokens: int) -> dict[str, Any]:
    """The cost of one side; `state_bytes` is what its turns return."""
    rate = spread([tokens / each for each in seconds])
    return {"tokens_per_second": rate, "peak_bytes": side.memory()["peak"], "state_bytes": side()}


def show(rows: dict[str, dict[str, Any]], title: str) -> None:
    """Print the table; × is against the first row."""
    table = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    table.add_column("schedule")
    for heading in ("budget", "state", "", "peak", "", "train tokens/s", "×", "decode tokens/s", "×"):
        table.add_column(heading, justify="right")
    first = next(iter(rows.values()))["training"]
    for name, row in rows.items():
        cells = []
        for key in ("state_bytes", "peak_bytes"):
            own = row["training"][key]
            cells += [format_bytes(own), f"{own / first[key]:.0%}"]
        for each in (row["training"], row["decoding"]):
            ratio = each["ratio"]
            cells.append(format_number(each["tokens_per_second"]["median"]))
            cells.append(f"{ratio['median']:.2f} ({ratio['low']:.2f} – {ratio['high']:.2f})")
        table.add_row(name, f"{row['budget']:,}", *cells)
    Console(width=150).print(table)


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help=f"the first is the reference (default: {', '.join(ROWS)})"
    )
    parser.add_argument("--data", required=True, metavar="CORPUS")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="of the model (default cpu)")
    parser.add_argument("--dtype", choices=ITEMSIZES, help="of the training (default: bfloat16 on a GPU)")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="turns of each side (default 6)")
    parser.add_argument("--decoded", type=int, default=40, metavar="N", help="tokens in a turn (default 40)")
    for name, what in (("cap", "of full and the long layers"), ("short", "of the other layers")):
        parser.add_argument(f"--{name}", type=int, metavar="M", help=f"tokens of memory {what}")
    add_outputs(parser, plot=False)
    a = parser.parse_args()
    if unknown := [name for name in a.rows if name not in ROWS]:
        parser.error(f"{unknown[0]}: expected one of {', '.join(ROWS)}")
    size, corpus = Size.named(a.size, cap=a.cap, short=a.short), Corpus.load(a.data)
    shared = {"dtype": a.dtype or default_dtype("mlx")} | dict(each.partition("=")[::2] for each in a.settings)
    configs = {
        name: build_config(size.preset, settings=as_list(settings)).for_corpus(corpus)
        for name, settings in size.row_settings(a.rows or ROWS, shared).items()
    }
    rows = measure(configs, a.data, a.rounds, a.decoded)
    show(rows, f"{' '.join(['size', a.size, *a.settings])}, {os.cpu_count()} cores")
    write_outputs(a, {"settings": next(iter(configs.values())).to_dict(), "rows": rows})


if __name__ == "__main__":
    run_main(main)
