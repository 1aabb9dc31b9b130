"""DSMR against Aria's own generation on this machine: the same random weights of Aria's shape, the same prompt.

    python benchmarks/aria.py [--layers 16] [--positions 1000,8000] [--lanes 1,4] [--json FILE] [--plot FILE]

Aria's loops are rebuilt from their documented behaviour, see `aria_loops.py`. DSMR converts the file as a user would,
exactly and with shorter horizons, and plays with its grammar and what it needs to rewind. All logits must agree before
anything is timed. Each side has its own process and they take turns; ratios are per round. PyTorch is
required.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import aria_loops
import mlx.core as mx
import numpy as np
from measuring import Worker, blas_threads, in_turn, ratios, spread, take
from outputs import add_outputs, numbers, run_main, write_outputs
from pictures import Group, Pair, draw_pairs
from rich.console import Console
from rich.table import Table

from dsmr_mlx.common.formatting import format_bytes
from dsmr_mlx.convert.importing import plan_conversion, write_conversion
from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.sampling import Sampling
from dsmr_mlx.model import checkpoint
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.aria.tokenizer import AriaTokenizer

EXACT, LOOPS = "DSMR, exact", {"Aria in MLX": aria_loops.MlxLoop, "Aria in PyTorch": aria_loops.TorchLoop}
TOLERANCE = 1e-4  # of logits, relative to the largest
WARMUP = 1  # turns that are not timed


def prompt(tokens: int, size: int) -> np.ndarray:
    """Ids of random notes, int64 `(tokens,)`."""
    rng = np.random.default_rng(0)
    onset = np.cumsum(rng.integers(1, 25, tokens)) / 100
    columns = onset, onset + rng.integers(5, 120, tokens) / 100, rng.integers(30, 95, tokens)
    return (
        AriaTokenizer(size)
        .encode_notes(Notes.sorted(*columns, rng.integers(20, 110, tokens)))[:tokens]
        .astype(np.int64)
    )


def convert(path: Path, out: Path, dtype: str, horizons: str | None = None) -> Path:
    """Convert Aria's file."""
    return write_conversion(plan_conversion(path, dtype=dtype, horizons=horizons), out)


def logits_of(folder: Path, ids: np.ndarray, last: int) -> np.ndarray:
    """DSMR's logits as in `aria_loops.logits_of`."""
    model, _ = checkpoint.load(folder)
    rows, state = [], None
    for chunk in (ids[: len(ids) - last], *np.split(ids[len(ids) - last :], last)):
        logits, state = model(mx.array(chunk[None]), state)
        rows.append(np.array(logits[0, -1:].astype(mx.float32)))
    return np.concatenate(rows)


def playing(folder: Path, lanes: int, ids: np.ndarray, tokens: int) -> Callable[[], None]:
    """A turn draws some tokens in each lane with the player, after a prompt `(T,)`."""
    model, tokenizer = checkpoint.load(folder)
    sampling = Sampling(temperature=aria_loops.TEMPERATURE, min_p=aria_loops.MIN_P)
    player = Player(model, tokenizer, n=lanes, sampling=sampling)
    player.read(ids)
    return partial(take, player.play(Limits()), tokens)


def agreement(files: dict[str, Path], a: argparse.Namespace) -> dict[str, float]:
    """The largest difference of each loop's logits from DSMR's, as a fraction of the largest. Raises `SystemExit`."""
    ids = prompt(a.checked, a.rows)
    mine = logits_of(files[EXACT], ids, 4)
    errors = {}
    for name, loop in LOOPS.items():
        theirs = aria_loops.logits_of(loop, files["weights"], a.dtype, ids, 4)
        errors[name] = float(np.abs(theirs - mine).max() / np.abs(mine).max())
        if not errors[name] <= (TOLERANCE if a.dtype == "float32" else 5e-2):
            raise SystemExit(f"{name}: its logits differ from DSMR's by {errors[name]:.1e} of the largest")
    return errors


def compare(files: dict[str, Path], position: int, lanes: int, a: argparse.Namespace) -> Iterator[dict]:
    """Rows of DSMR against each loop, playing from a position in some lanes."""
    position = min(position, aria_loops.CONTEXT - (a.rounds + WARMUP) * a.tokens)
    ids = prompt(position, a.rows)
    ours = [name for name in files if name != "weights"]
    sides = {name: (playing, files[name], lanes, ids, a.tokens) for name in ours}
    for name, loop in LOOPS.items():
        sides[name] = (aria_loops.playing, loop, files["weights"], a.dtype, lanes, position, a.tokens)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(closing(Worker(*side))) for name, side in sides.items()}
        times = dict(zip(workers, in_turn(list(workers.values()), a.rounds, WARMUP), strict=True))
        memory = {name: side.memory() for name, side in workers.items()}
    for mine in ours:
        for theirs in LOOPS:
            pair = (mine, theirs)
            yield {
                "position": position,
                "lanes": lanes,
                "sides": pair,
                "tokens_per_second": [spread([lanes * a.tokens / s for s in times[name]]) for name in pair],
                "ratio": ratios(times[theirs], times[mine]),
                "held_bytes": [memory[name]["held"] for name in pair],
                "peak_bytes": [memory[name]["peak"] for name in pair],
                "resident_bytes": [memory[name]["resident"] for name in pair],
            }


def show(result: dict, console: Console) -> None:
    """Print the results."""
    agreeing = ", ".join(f"{name} {error:.0e}" for name, error in result["agreement"].items())
    console.print(f"differences of logits from DSMR's, relative to the largest: {agreeing}")
    table = Table(box=None, title=result["title"], header_style="bold", title_justify="left")
    columns = ("tokens", "lanes", "", "tokens/s", "peak", "resident", "against", "tokens/s", "peak", "resident", "×")
    for i, heading in enumerate((*columns, "middle half")):
        table.add_column(heading, justify="left" if i in (2, 6) else "right")
    for row in result["rows"]:
        sides = []
        for i, name in enumerate(row["sides"]):
            peak = format_bytes(row["peak_bytes"][i]) if "PyTorch" not in name else ""
            speed = row["tokens_per_second"][i]["median"]
            sides += [name, f"{speed:.2f}", peak, format_bytes(row["resident_bytes"][i])]
        between = f"{row['ratio']['low']:.2f} – {row['ratio']['high']:.2f}"
        table.add_row(f"{row['position']:,}", str(row["lanes"]), *sides, f"{row['ratio']['median']:.2f}", between)
    console.print(table)


def draw(result: dict, path: Path) -> None:
    """Draw the results."""
    groups: dict[str, list[Pair]] = {}
    for row in result["rows"]:
        mine, theirs = row["sides"]
        pair = Pair(f"{mine} | {theirs}", row["tokens_per_second"], f"× {row['ratio']['median']:.2f}")
        groups.setdefault(f"at {row['position']:,} tokens, {row['lanes']} lanes: tokens/s", []).append(pair)
    drawn = [Group(title, pairs) for title, pairs in groups.items()]
    draw_pairs(path, drawn, ("DSMR", "Aria's loop"), result["title"])


def parse_arguments() -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16, metavar="N", help="(default 16, Aria's)")
    parser.add_argument("--d-model", type=int, default=1536, metavar="N", help="(default 1536, Aria's)")
    parser.add_argument("--rows", type=int, default=17_727, metavar="N", help="ids (default 17727, the base model's)")
    parser.add_argument("--horizons", default="uniform:2048", metavar="SPEC", help="also played (default uniform:2048)")
    parser.add_argument("--dtype", default="float32", metavar="TYPE", help="(default float32)")
    parser.add_argument("--positions", type=numbers, default=[1000, 8000], metavar="N,N", help="tokens before")
    parser.add_argument("--lanes", type=numbers, default=[1, 4], metavar="N,N", help="variations at the same time")
    parser.add_argument("--checked", type=int, default=600, metavar="N", help="tokens whose logits are compared")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="turns of each side (default 6)")
    parser.add_argument("--tokens", type=int, default=10, metavar="N", help="tokens per turn and lane (default 10)")
    add_outputs(parser)
    return parser.parse_args()


def main() -> None:
    """Measure, show, write."""
    a = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = {"weights": aria_loops.write_random(folder / "model.safetensors", a.rows, a.d_model, a.layers)}
        files[EXACT] = convert(files["weights"], folder / "exact", a.dtype)
        files[f"DSMR, {a.horizons}"] = convert(files["weights"], folder / "short", a.dtype, a.horizons)
        device = mx.default_device().type.name
        result = {
            "title": f"{a.layers} layers of {a.d_model}, {a.rows:,} ids, {a.dtype}, {device}",
            "threads": blas_threads(),
            "tolerance": TOLERANCE,
            "agreement": agreement(files, a),
            "rows": [],
        }
        for position in a.positions:
            for lanes in a.lanes:
                result["rows"] += compare(files, position, lanes, a)
    show(result, Console(width=180))
    write_outputs(a, result, partial(draw, result))


if __name__ == "__main__":
    run_main(main)
