"""How time and memory grow with the length of a piece, horizons, lanes, layers and segment length.

    python benchmarks/scaling.py [--quick] [--json FILE] [--plot FILE]

A model reads and a trainer trains on pieces of 1,024 to 1,048,576 tokens with a tiny model; a full-attention
transformer reads and trains on excerpts up to the length it can handle. Then training steps of a larger model
(`--preset`, `--set`) with one number changed at a time. Each point has its own process; the points of a curve take
turns. A slope is that of a log-log fit through the medians, with its standard error: 0 constant, 1 linear, 2 quadratic.
"""

import argparse
import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import ours
import plain
from measuring import Worker, in_turn, music, random_model, spread
from outputs import add_outputs, numbers, run_main, write_outputs
from pictures import OURS, THEIRS, Curve, Panel, draw_curves
from rich.console import Console
from rich.table import Table

from dsmr_mlx.common.formatting import format_bytes, format_number
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.state import RecurrentState
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.settings import build_config
from dsmr_mlx.training.trainer import Trainer

TINY = (
    "d_model=32", "n_layers=2", "n_heads=1", "head_dim=64", "d_ff=64", "segment_length=256",
    "horizons=custom:128,32", "batch_size=1",
)  # fmt: skip
PHRASE = 1024  # tokens that pieces repeat
TURN = 1 << 14  # tokens per turn: shorter pieces are repeated, excerpts up to a fourth of it
LINEAR, CONSTANT = 0.05, 0.02  # allowed deviation of slopes from 1 and from 0


@dataclass(frozen=True)
class Family:
    """A curve with one point for each x.

    key: name in the results; title: what is done; x_title: what changes; sides: the arguments of the `Worker` of each
    x; repeats: how often a turn repeats the timed work, for each x; linear: whether time must be linear and memory
    constant
    """

    key: str
    title: str
    x_title: str
    x: Sequence[int]
    sides: Sequence[tuple[Any, ...]]
    repeats: Sequence[int] = ()
    linear: bool = False


def reading(config: ModelConfig, tokens: int, repeats: int) -> Callable[[], None]:
    """A turn reads pieces of `tokens` tokens, all of them in all layers; the last state stays."""
    model = random_model(config)
    kept: list[RecurrentState] = []
    gc.collect()
    gc.freeze()

    def read() -> None:
        for _ in range(repeats):
            kept.clear()
            gc.collect()  # reference cycles would count as memory
            kept.append(model.new_state())
            for _ in range(max(tokens // PHRASE, 1)):
                _, kept[0] = model(mx.array(music(min(PHRASE, tokens))[None]), kept[0])
                mx.eval(kept[0].arrays)

    return read


def training(config: TrainConfig, corpus: str, repeats: int) -> Callable[[], None]:
    """A turn trains `repeats` times on the only piece of a corpus."""
    trainer = Trainer(config, Corpus.load(corpus))
    segments = trainer.tokens_per_epoch // config.segment_length

    def train() -> None:
        for _ in range(repeats * segments):
            trainer.train_segment()
        mx.synchronize()  # the update of the weights

    return train


def reading_at_once(config: ModelConfig, tokens: int, repeats: int) -> Callable[[], None]:
    """A turn reads excerpts of `tokens` tokens with full attention."""
    model, ids = random_model(config), mx.array(np.resize(music(PHRASE), (1, tokens)))

    def read() -> None:
        for _ in range(repeats):
            mx.eval(model.logits(plain.full_attention(model, ids)[:, -1]))

    return read


def training_at_once(config: TrainConfig, tokens: int, repeats: int) -> Callable[[], None]:
    """A turn trains on excerpts of `tokens` tokens with full attention, one per step."""
    run = plain.ExcerptTraining(config, random_model(config.model_config(PerformanceTokenizer())))
    excerpt = np.resize(music(PHRASE), (1, tokens + 1)).astype(np.int32)

    def train() -> None:
        for _ in range(repeats):
            run.step(excerpt)

    return train


def piece_families(folder: Path, a: argparse.Namespace) -> Iterator[Family]:
    """Reading and training by length of the piece, DSMR and full attention."""
    config = build_config("tiny", settings=(*TINY, *a.settings), **plain.PLAIN)
    model = config.model_config(PerformanceTokenizer())
    repeats = [max(a.turn // length, 1) for length in a.lengths]
    corpora = [ours.write_corpus(folder / str(length), 1, length) for length in a.lengths]
    read = [(reading, model, *point) for point in zip(a.lengths, repeats, strict=True)]
    yield Family("reading", "reading a piece", "tokens of the piece", a.lengths, read, repeats, linear=True)
    trained = [(training, config, *point) for point in zip(corpora, repeats, strict=True)]
    yield Family("training", "training on a piece", "tokens of the piece", a.lengths, trained, repeats, linear=True)
    for key, title, side, setting, lengths in (
        ("reading_at_once", "full attention, reading", reading_at_once, model, a.excerpts),
        ("training_at_once", "full attention, training", training_at_once, config, a.excerpts[:-1]),
    ):
        repeats = [max(a.turn // 4 // length, 1) for length in lengths]
        sides = [(side, setting, *point) for point in zip(lengths, repeats, strict=True)]
        yield Family(key, title, "tokens of the excerpt", lengths, sides, repeats)


def step_families(folder: Path, a: argparse.Namespace) -> Iterator[Family]:
    """A training step of the preset, with one number changed at a time."""
    base = build_config(a.preset, settings=a.settings, **plain.PLAIN)
    longest = max(a.horizons) + 40 * max(a.segments)
    corpus = ours.write_corpus(folder / "steps", max(base.batch_size, *a.lanes), longest)
    changes = {
        "horizon": ("horizon of all layers, tokens", {n: {"horizons": f"uniform:{n}"} for n in a.horizons}),
        "lanes": ("lanes", {n: {"batch_size": n} for n in a.lanes}),
        "layers": ("layers", {n: {"n_layers": n, "horizons": f"uniform:{a.horizon}"} for n in a.layers}),
        "segment": ("segment length, tokens", {n: {"segment_length": n} for n in a.segments}),
    }
    for key, (x_title, changed) in changes.items():
        configs = [build_config(a.preset, settings=a.settings, **plain.PLAIN, **change) for change in changed.values()]
        sides = [(filled_training, config, corpus) for config in configs]
        yield Family(key, f"training step, by {key}", x_title, list(changed), sides, [1] * len(sides))


def filled_training(config: TrainConfig, corpus: str) -> Callable[[], float]:
    """A turn takes a step with full memories."""
    step = ours.training(config, corpus)
    for _ in range(-(-max(config.schedule.horizons) // config.segment_length) + 1):
        step()
    return step


def measure(family: Family, rounds: int, limit: float, warmup: int) -> dict[str, Any]:
    """Seconds and bytes at each point, and the slopes."""
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(Worker(*side))) for side in family.sides]
        for worker in workers[:warmup]:
            worker()
        times = in_turn(workers, rounds, warmup=0, limit=limit)
        memory = [worker.memory() for worker in workers]
    each = [[spent / n for spent in side] for side, n in zip(times, family.repeats, strict=True)]
    result = {
        "family": family.key,
        "title": family.title,
        "x_title": family.x_title,
        "x": list(family.x),
        "rounds": len(times[0]),
        "seconds": [spread(side) for side in each],
        "held_bytes": [point["held"] for point in memory],
        "peak_bytes": [point["peak"] for point in memory],
        "resident_bytes": [point["resident"] for point in memory],
        "linear": family.linear,
    }
    curves = {"time": [point["median"] for point in result["seconds"]]}
    curves |= {name: result[f"{name}_bytes"] for name in ("held", "peak")}
    result["slopes"] = {name: slope(family.x, y) for name, y in curves.items()}
    result["met"] = is_linear(result["slopes"]) if family.linear else None
    return result


def slope(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Slope of the least-squares line through the logarithms, with its standard error; last: between the last two
    points.
    """
    log_x, log_y = np.log(x), np.log(y)
    gradient, offset = np.polyfit(log_x, log_y, 1)
    rest = log_y - gradient * log_x - offset
    spare = max(len(x) - 2, 1)
    error = math.sqrt((rest @ rest) / spare / ((log_x - log_x.mean()) ** 2).sum())
    last = (log_y[-1] - log_y[-2]) / (log_x[-1] - log_x[-2])
    return {"slope": float(gradient), "error": error, "last": float(last), "at_one": float(np.exp(offset))}


def is_linear(slopes: dict[str, dict[str, float]]) -> bool:
    """Whether time is linear and memory constant, within the tolerances."""
    constant = all(abs(slopes[name]["slope"]) <= CONSTANT for name in ("held", "peak"))
    return constant and abs(slopes["time"]["slope"] - 1) <= LINEAR


def show(result: dict[str, Any], console: Console) -> None:
    """Print the results."""
    table = Table(box=None, title=result["title"], header_style="bold", title_justify="left")
    headings = ("", "from", "to", "time", "to", "slope of time", "last", "peak", "to", "slope of peak", "of held")
    for i, heading in enumerate((*headings, "rounds", "target", "")):
        table.add_column(heading, justify="left" if i in (0, 12, 13) else "right")
    for row in result["rows"]:
        slopes, seconds, peak = row["slopes"], row["seconds"], row["peak_bytes"]
        shown = {name: f"{round(value['slope'], 3) + 0.0:.3f} ± {value['error']:.3f}" for name, value in slopes.items()}
        target = f"time 1 ± {LINEAR}, memory 0 ± {CONSTANT}" if row["linear"] else ""
        table.add_row(
            row["title"],
            *(f"{row['x'][i]:,}" for i in (0, -1)),
            *(duration(seconds[i]["median"]) for i in (0, -1)),
            shown["time"],
            f"{slopes['time']['last']:.2f}",
            *(format_bytes(peak[i]) for i in (0, -1)),
            shown["peak"],
            shown["held"],
            str(row["rounds"]),
            target,
            {True: "met", False: "missed", None: ""}[row["met"]],
        )
    console.print(table)


def duration(seconds: float) -> str:
    """A duration in ms or s."""
    return f"{format_number(1e3 * seconds)} ms" if seconds < 1 else f"{seconds:.1f} s"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw time above memory, three families at a time."""
    rows = {row["family"]: row for row in result["rows"]}
    beside = {"reading": "reading_at_once", "training": "training_at_once"}
    shown = [name for name in rows if name not in beside.values()]
    panels = []
    for i in range(0, len(shown), 3):
        for measured, unit in (("time", "seconds"), ("peak", "peak bytes")):
            for name in shown[i : i + 3]:
                curves = [curve(rows[name], measured, "DSMR", OURS)]
                if beside.get(name) in rows:
                    curves.append(curve(rows[beside[name]], measured, "full attention", THEIRS))
                panels.append(Panel(f"{rows[name]['title'].partition(',')[0]}: {unit}", rows[name]["x_title"], curves))
    draw_curves(path, panels, 3, f"Time, and memory below it ({result['device']})")


def curve(row: dict[str, Any], measured: str, name: str, colour: str) -> Curve:
    """The curve of a family, with its fit."""
    y = [point["median"] for point in row["seconds"]] if measured == "time" else row["peak_bytes"]
    found = row["slopes"][measured]
    fit = [found["at_one"] * x ** found["slope"] for x in row["x"]]
    label = f"{name}: slope {round(found['slope'], 2) + 0.0:.2f} ± {found['error']:.2f}"
    return Curve(row["x"], y, label, colour, fit)


def parse_arguments() -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, as a smoke test")
    parser.add_argument("--preset", default="tiny", help="preset of the training steps (default tiny)")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    some = {"type": numbers, "metavar": "N,N"}
    parser.add_argument(
        "--lengths", **some, default=[1 << n for n in range(10, 21, 2)], help="lengths of pieces in tokens"
    )
    parser.add_argument(
        "--excerpts", **some, default=[1 << n for n in range(9, 15)], help="lengths of excerpts for full attention"
    )
    parser.add_argument("--horizons", **some, default=[64, 256, 1024, 4096])
    parser.add_argument(
        "--horizon", type=int, default=128, metavar="N", help="horizon of all layers if the number of layers changes"
    )
    parser.add_argument("--lanes", **some, default=[1, 2, 4, 8, 16])
    parser.add_argument("--layers", **some, default=[1, 2, 4, 8, 16])
    parser.add_argument("--segments", **some, default=[32, 64, 128, 256, 512])
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="most turns of each point (default 5)")
    parser.add_argument("--seconds", type=float, default=25.0, help="no round starts after this time (default 25)")
    add_outputs(parser)
    a = parser.parse_args()
    a.settings, a.turn = ["batch_size=4", *a.settings], TURN
    if a.quick:
        a.lengths, a.excerpts, a.horizons, a.lanes = [256, 512, 1024], [64, 128, 256], [8, 32], [1, 2]
        a.layers, a.segments, a.rounds, a.horizon, a.turn = [1, 2], [8, 16], 1, 8, 1
    return a


def main() -> None:
    """Measure, show, write."""
    a = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        families = [*piece_families(Path(folder), a), *step_families(Path(folder), a)]
        rows = [measure(family, a.rounds, a.seconds, warmup=3) for family in families]
    device = mx.default_device().type.name
    title = f"pieces: {' '.join(TINY)}; steps: {' '.join(['preset', a.preset, *a.settings])}; {device}"
    result = {"title": title, "device": device, "rows": rows}
    show(result, Console(width=200))
    write_outputs(a, result, partial(draw, result))


if __name__ == "__main__":
    run_main(main)
