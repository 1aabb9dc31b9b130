"""How close each part of a step is to the limits of the machine.

    python benchmarks/roofline.py [--preset small | --checkpoint RUN] [--set KEY=VALUE] [--rounds 10]
                                  [--json FILE] [--plot FILE]

For a training step with full memories and for a decoded token: the FLOPs of the products and the bytes that kernels
must move, counted from the configuration (`roofline_counts`); the ceilings of the machine, measured with large
products, copies, sums and matrix-vector products; and the time of the step and of each part alone
(`roofline_parts`), in turn, round by round. The bound of a part is the time that the slower ceiling allows.
"unexplained" is the step minus the sum of its parts: overlap makes it negative, cold caches make it positive. "without
memory" is the step of the same model with no horizons.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from measuring import in_turn, music, random_model, spread
from ours import write_corpus
from outputs import add_outputs, run_main, write_outputs
from pictures import write_picture
from rich.console import Console
from rich.table import Table
from roofline_parts import Part, calling, decode_parts, train_parts

from dsmr_mlx.common.formatting import format_number
from dsmr_mlx.common.plotting import LIGHT
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.model import checkpoint
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.settings import build_config
from dsmr_mlx.training.trainer import Trainer

LARGE = {"cpu": (2048, 1 << 26), "gpu": (8192, 1 << 28)}  # rows of a product, floats of an array


def ceilings(config: TrainConfig, large: tuple[int, int], rounds: int) -> dict[str, float]:
    """FLOP/s of products and bytes/s of the memory, the best of several rounds.

    Two products are large, in float32 (decoding) and in the training dtype; one has the shape of the feed-forward
    layers.
    """
    size, floats = large
    dtype = getattr(mx, config.dtype)
    rows, width = config.batch_size * config.segment_length, (2 if config.gated else 1) * config.d_ff
    square, other = mx.ones((size, size)), mx.ones((size, size), dtype)
    x, weight = mx.ones((rows, config.d_model), dtype), mx.ones((width, config.d_model), dtype)
    a, b = mx.ones((floats,)), mx.ones((floats,))
    matrix, vector = a.reshape(-1, 4096), mx.ones((4096,))
    mx.eval(square, other, x, weight, a, b, matrix, vector)
    works = {
        "large product, float32": (2 * size**3, lambda: mx.eval(square @ square)),
        f"large product, {config.dtype}": (2 * size**3, lambda: mx.eval(other @ other)),
        f"feed-forward product, {config.dtype}": (2 * rows * config.d_model * width, lambda: mx.eval(x @ weight.T)),
        "copy": (8 * floats, lambda: mx.eval(a + 1)),
        "sum of two arrays": (12 * floats, lambda: mx.eval(a + b)),
        "matrix times vector": (4 * floats, lambda: mx.eval(matrix @ vector)),
    }
    times = in_turn([work for _, work in works.values()], rounds)
    return {name: amount / min(t) for (name, (amount, _)), t in zip(works.items(), times, strict=True)}


def measure(step: Callable, others: dict[str, Callable], parts: Sequence[Part], a: argparse.Namespace) -> dict:
    """Time a step, its variants and each of its parts in turn. Returns seconds."""
    sides = [calling(step), *map(calling, others.values()), *(work for part in parts for work, _ in part.works)]
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(1 + a.rounds):
        for side, measured in zip(sides, times, strict=True):
            spent = side()
            if turn:
                measured.append(spent)
    whole, beside, rest = times[0], times[1 : 1 + len(others)], iter(times[1 + len(others) :])
    rows = []
    for part in parts:
        weighted = [[often * t for t in next(rest)] for _, often in part.works]
        spent = [sum(turn) for turn in zip(*weighted, strict=True)]
        rows.append({"part": part.name, "count": part.count, "seconds": spent})
    left = [t - sum(parts) for t, *parts in zip(whole, *(row["seconds"] for row in rows), strict=True)]
    rows.append({"part": "unexplained", "count": None, "seconds": left})
    return {"step": whole, "beside": dict(zip(others, beside, strict=True)), "rows": rows}


def result_of(measured: dict, found: dict[str, float], dtype: str, tokens: int) -> dict[str, Any]:
    """The measured step as JSON values: milliseconds, counts, bound and fraction of it; found: the `ceilings`."""
    flops = found[f"large product, {dtype}"]
    bandwidth = max(found[name] for name in ("copy", "sum of two arrays", "matrix times vector"))
    step = statistics.median(measured["step"])
    rows, counted = [], [row["count"] for row in measured["rows"] if row["count"]]
    for row in measured["rows"]:
        milliseconds = {name: 1e3 * t for name, t in spread(row["seconds"]).items()}
        figures = {"part": row["part"], "milliseconds": milliseconds, "share": milliseconds["median"] / (1e3 * step)}
        if row["count"] and (row["count"].flops or row["count"].bytes):
            bound = 1e3 * row["count"].bound(flops, bandwidth)
            reached = bound / milliseconds["median"] if milliseconds["median"] > 0 else None
            figures |= {"flops": row["count"].flops, "bytes": row["count"].bytes, "bound": bound, "reached": reached}
        rows.append(figures)
    all_flops, bound = sum(c.flops for c in counted), sum(c.bound(flops, bandwidth) for c in counted)
    return {
        "tokens": tokens,
        "milliseconds": {name: 1e3 * t for name, t in spread(measured["step"]).items()},
        "flops": all_flops,
        "bytes": sum(c.bytes for c in counted),
        "bound": 1e3 * bound,
        "bound_reached": bound / step,
        "flops_per_second": all_flops / step,
        "flops_reached": all_flops / step / flops,
        "beside": {name: {k: 1e3 * t for k, t in spread(ts).items()} for name, ts in measured["beside"].items()},
        "rows": rows,
    }


def stepping(config: TrainConfig, corpus: Corpus) -> tuple[Trainer, Callable[[], None]]:
    """A trainer with full memories, and a function that takes a step to its end."""
    trainer = Trainer(config, corpus)

    def step() -> None:
        while trainer.train_segment() is None:
            pass
        mx.synchronize()

    longest = max(config.schedule.horizons)
    while trainer.state.steps <= longest:
        step()
    return trainer, step


def training(config: TrainConfig, found: dict[str, float], a: argparse.Namespace) -> dict[str, Any]:
    """The roofline of training steps, on pieces long enough not to end."""
    segments = max(config.schedule.horizons) // config.segment_length + 3 * (a.rounds + 6)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus.load(write_corpus(Path(folder) / "corpus", config.batch_size, segments * config.segment_length))
        trainer, step = stepping(config, corpus)
        alone = stepping(build_config(base=config.to_dict(), horizons="none"), corpus)[1]
        measured = measure(step, {"without memory": alone}, train_parts(trainer), a)
    return result_of(measured, found, config.dtype, config.batch_size * config.segment_length)


def decoding(config: TrainConfig, found: dict[str, float], a: argparse.Namespace) -> dict[str, Any]:
    """The roofline of decoding after a prompt that fills the memories."""
    if a.checkpoint:
        model, tokenizer = checkpoint.load(a.checkpoint)
    else:
        tokenizer = PerformanceTokenizer()
        model = random_model(config.model_config(tokenizer))
    player = Player(model, tokenizer)
    prompt = music(max(model.config.horizons) + model.config.segment_length)
    player.read(prompt if not a.checkpoint else tokenizer.prompt([]))
    steps = player.play(Limits())
    next(steps)
    measured = measure(lambda: next(steps), {}, decode_parts(player), argparse.Namespace(rounds=10 * a.rounds))
    return result_of(measured, found, "float32", player.lanes)


def three_digits(value: float) -> str:
    """A number with three digits."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def show(results: dict[str, Any], title: str) -> None:
    """Print the tables."""
    console = Console(width=110)
    console.print(
        ", ".join(f"{name} {format_number(value)}" for name, value in results["ceilings"].items()), "per second"
    )
    for name in ("training", "decoding"):
        r = results[name]
        table = Table(box=None, title=f"{title}: {name}, {r['tokens']:,} tokens a step")
        for column in ("", "ms", "middle half", "of step", "GFLOP", "MB", "bound, ms", "reached"):
            table.add_column(column, justify="left" if column == "" else "right")
        for row in r["rows"]:
            ms = row["milliseconds"]
            counted = "flops" in row
            table.add_row(
                row["part"],
                three_digits(ms["median"]),
                f"{three_digits(ms['low'])} – {three_digits(ms['high'])}",
                f"{row['share']:.1%}",
                three_digits(row["flops"] / 1e9) if counted else "",
                three_digits(row["bytes"] / 1e6) if counted else "",
                three_digits(row["bound"]) if counted else "",
                f"{row['reached']:.0%}" if row.get("reached") else "",
            )
        ms = r["milliseconds"]
        table.add_section()
        table.add_row(
            "the step",
            three_digits(ms["median"]),
            f"{three_digits(ms['low'])} – {three_digits(ms['high'])}",
            "100 %",
            three_digits(r["flops"] / 1e9),
            three_digits(r["bytes"] / 1e6),
            three_digits(r["bound"]),
            f"{r['bound_reached']:.0%}",
        )
        for beside, times in r["beside"].items():
            table.add_row(
                beside, three_digits(times["median"]), f"{three_digits(times['low'])} – {three_digits(times['high'])}"
            )
        console.print(table)
        console.print(f"{format_number(r['flops_per_second'])}FLOP/s, {r['flops_reached']:.0%} of the ceiling\n")


def draw(path: Path, results: dict[str, Any], title: str) -> None:
    """One bar chart per step; the dark part of a bar is the bound."""

    def paint(figure: Any) -> None:
        figure.text(0.015, 0.955, title, size=10)
        figure.text(0.985, 0.955, "dark: the bound set by the ceilings", ha="right", color=LIGHT["train"])
        for i, name in enumerate(("training", "decoding")):
            paint_steps(figure.add_axes((0.2, 0.56 - 0.48 * i, 0.68, 0.34)), results[name], name)

    write_picture(path, paint, (9.6, 6.8))


def paint_steps(panel: Any, result: dict[str, Any], name: str) -> None:
    """The parts as a waterfall that adds up to the step."""
    place, places = 0.0, [0.0]
    for i, row in enumerate(result["rows"]):
        long, bound = row["milliseconds"]["median"], min(row.get("bound", 0.0), max(row["milliseconds"]["median"], 0.0))
        panel.barh(i, long, left=place, height=0.72, color=LIGHT["segment"])
        panel.barh(i, bound, left=place, height=0.72, color=LIGHT["train"])
        end = max(place, place + long)
        panel.annotate(f"{row['share']:.1%}", (end, i), (4, 0), textcoords="offset points", va="center", fontsize=7.5)
        place += long
        places.append(place)
    panel.set_yticks(range(len(result["rows"])), [row["part"] for row in result["rows"]])
    panel.tick_params(axis="y", labelcolor=LIGHT["ink"])
    panel.set(ylim=(len(result["rows"]) - 0.4, -0.6), xlim=(1.1 * min(places), 1.1 * max(places)))
    panel.grid(True, axis="x")
    panel.grid(False, axis="y")
    step, reached = result["milliseconds"]["median"], result["bound_reached"]
    panel.set_title(f"{name}: {three_digits(step)} ms, {reached:.0%} of the bound", fontsize=9)
    panel.set_xlabel("milliseconds", labelpad=2)


def main() -> None:
    """Parse the options, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", help="sizes, with random weights (default small)")
    parser.add_argument("--checkpoint", metavar="RUN", help="sizes and weights of a checkpoint or run instead")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="timed training steps (default 10)")
    parser.add_argument("--large", type=int, nargs=2, metavar="N", help="rows of the large product, floats of an array")
    add_outputs(parser)
    a = parser.parse_args()
    config = build_config(a.preset, settings=a.settings, **({"init": a.checkpoint} if a.checkpoint else {}))
    large = tuple(a.large) if a.large else LARGE[mx.default_device().type.name]
    found = ceilings(config, large, max(a.rounds // 2, 3))
    mx.clear_cache()
    results = {"ceilings": found, "training": training(config, found, a), "decoding": decoding(config, found, a)}
    title = f"{a.checkpoint or 'preset ' + a.preset} {' '.join(a.settings)}".strip()
    show(results, title)
    write_outputs(a, {"settings": config.to_dict(), **results}, lambda path: draw(path, results, title))


if __name__ == "__main__":
    run_main(main)
