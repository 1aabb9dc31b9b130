"""DSMR against other programs on this machine, with the same weights and shapes: decoding, prefill, training.

    python benchmarks/peers.py [decode] [prefill] [train] [--preset small] [--json FILE] [--plot FILE]

decode, prefill: mlx-lm's Llama with its `RotatingKVCache` (against the same model with one horizon for all layers, so
that both see as many tokens on average) and with its growing `KVCache`; the PyTorch reference with the same schedule; a
cache that grows by concatenation. train: full attention over independent excerpts, with as many tokens per step; the
PyTorch reference on the same batches.

All logits must agree with DSMR's before anything is timed. Each side has its own process and they take turns; ratios
are per round. DSMR decodes with the player, which applies the grammar and can rewind; the others only sample, and so
does "network alone". "compiled" is the player with `compile=True`, as on a GPU; mlx-lm compiles parts of its own. Peers
that are not installed are skipped, with a note.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import ours
import plain
from measuring import Worker, blas_threads, in_turn, loaded_blas, music, random_model, ratios, spread
from mlx.utils import tree_flatten
from outputs import add_outputs, numbers, run_main, write_outputs
from pictures import Group, Pair, draw_pairs
from rich.console import Console
from rich.table import Table

from dsmr_mlx.common.formatting import format_bytes
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.settings import build_config

PARTS = ("decode", "prefill", "train")
OURS, ROTATING, GROWING, TORCH = "DSMR", "mlx-lm, RotatingKVCache", "mlx-lm, KVCache", "PyTorch reference"
CONCATENATED, COMPILED = "a cache grown by concatenation", "PyTorch, compiled, bfloat16"
STEPPED = 4  # tokens of a check that go one by one

Side = tuple[Any, ...]  # the arguments of a `Worker`: a function and its arguments


@dataclass(frozen=True)
class Setting:
    """What is compared. notes: what is skipped, and other remarks."""

    config: TrainConfig
    model: ModelConfig
    device: str  # of PyTorch
    llama: bool
    torch: bool
    notes: list[str]

    @classmethod
    def of(cls, a: argparse.Namespace) -> "Setting":
        """The setting given by the options."""
        config = replace(build_config(a.preset, settings=a.settings, **plain.PLAIN), accumulate=1)
        model = replace(config.model_config(PerformanceTokenizer()), never_predicted=[])  # peers predict every id
        missing = why_not_llama(model)
        torch = find_spec("torch") is not None
        notes = [f"{reason}: skipped" for reason in (missing, None if torch else "PyTorch is not installed") if reason]
        if torch and loaded_blas():
            notes.append(f"{loaded_blas()} also multiplies float32 matrices for PyTorch")
        return cls(config, model, a.torch_device, missing is None, torch, notes)

    @property
    def dtype(self) -> str:
        """The dtype of the computation."""
        return self.config.dtype

    @property
    def uniform(self) -> ModelConfig:
        """One horizon for all layers, with the budget of the schedule."""
        return self.with_horizons(sum(self.model.horizons) // self.model.n_layers)

    @property
    def window(self) -> int:
        """The tokens that the layers of `uniform` see on average over a segment."""
        return self.uniform.horizons[0] + self.model.segment_length // 2

    def with_horizons(self, horizon: int) -> ModelConfig:
        """The model with the same horizon in all layers."""
        return ModelConfig.from_dict(self.model.to_dict() | {"horizons": [horizon] * self.model.n_layers})

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """The weights of `random_model`, as NumPy arrays."""
        return as_numpy(random_model(self.model))

    @property
    def tolerance(self) -> float:
        """The allowed difference of logits, as a fraction of the largest."""
        if self.dtype != "float32":
            return 5e-2
        return 1e-4 if mx.default_device().type == mx.DeviceType.cpu else 5e-3  # a GPU may use TF32


def why_not_llama(config: ModelConfig) -> str | None:
    """Why mlx-lm cannot run a model of this configuration, None if it can."""
    if find_spec("mlx_lm") is None:
        return "mlx-lm is not installed (pip install --no-deps mlx-lm)"
    c = config
    found = (c.norm, c.activation, c.gated, c.rope_dims, c.parallel_residual, c.max_positions, c.rope_scaling)
    biases = c.attention_bias or c.output_bias or c.feed_forward_bias or c.head_bias
    if found != ("rms", "silu", True, c.head_dim, False, None, None) or biases or c.quantization:
        return "mlx-lm's Llama does not have the layers of this configuration"
    return None


def as_numpy(model: DSMR) -> dict[str, np.ndarray]:
    """The parameters of a model as float32 NumPy arrays."""
    return {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(model.parameters())}


def agreement(s: Setting) -> dict[str, float]:
    """The largest difference of each peer's logits from DSMR's, as a fraction of the largest logit.

    If a peer keeps everything, DSMR gets horizons that do. Raises `SystemExit` if a peer exceeds the tolerance.
    """
    length = 2 * s.model.segment_length + 9
    ids = music(length)
    whole = random_model(s.with_horizons(len(ids)), s.dtype)
    logits, _ = whole(mx.array(ids[None]))
    found = {
        "full attention": plain.logits_at_once(whole, ids),
        CONCATENATED: plain.logits_in_steps(whole, ids, STEPPED),
    }
    if s.llama:
        import llama

        for name, window in ((ROTATING, len(ids)), (GROWING, None)):
            found[name] = llama.logits_of(whole, ids, window, STEPPED)
    errors = {name: difference(theirs, np.array(logits[0])) for name, theirs in found.items()}
    if s.torch:
        import pytorch

        ids = music(max(s.model.horizons) + length)
        logits, _ = random_model(s.model, s.dtype)(mx.array(ids[None]))
        with closing(Worker(partial, pytorch.logits_of, s.model, s.weights, ids, s.dtype, s.device)) as worker:
            errors[TORCH] = difference(worker(), np.array(logits[0]))
    for name, error in errors.items():
        if not error <= s.tolerance:
            raise SystemExit(f"{name}: its logits differ from DSMR's by {error:.1e}, must be at most {s.tolerance:.0e}")
    return errors


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute difference, as a fraction of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def decode(s: Setting, a: argparse.Namespace) -> Iterator[dict]:
    """Generating tokens at several positions."""
    uniform = f"{OURS}, {s.uniform.horizons[0]} for all"
    for position in a.positions:
        sides: dict[str, Side] = {OURS: (ours.playing, s.model, s.dtype, position, a.tokens)}
        pairs = []
        if s.llama:
            import llama

            sides[uniform] = (ours.playing, s.uniform, s.dtype, position, a.tokens)
            sides[f"{uniform}, compiled"] = (ours.playing, s.uniform, s.dtype, position, a.tokens, True)
            sides[f"{uniform}, network alone"] = (ours.stepping, s.uniform, s.dtype, position, a.tokens)
            sides[ROTATING] = (llama.playing, s.model, s.dtype, position, a.tokens, s.window)
            sides[GROWING] = (llama.playing, s.model, s.dtype, position, a.tokens, None)
            pairs = [(f"{uniform}{how}", ROTATING) for how in ("", ", compiled", ", network alone")]
            pairs.append((OURS, GROWING))
        sides[CONCATENATED] = (plain.playing, s.model, s.dtype, position, a.tokens)
        pairs.append((OURS, CONCATENATED))
        if s.torch:
            import pytorch

            sides[TORCH] = (pytorch.playing, s.model, s.weights, s.dtype, s.device, position, a.tokens)
            pairs.append((OURS, TORCH))
        yield from compare(f"decode at {position:,}", sides, pairs, a.tokens, a)


def prefill(s: Setting, a: argparse.Namespace) -> Iterator[dict]:
    """Reading prompts of several lengths."""
    uniform = f"{OURS}, {s.uniform.horizons[0]} for all"
    for tokens in a.prompts:
        sides: dict[str, Side] = {OURS: (ours.reading, s.model, s.dtype, tokens)}
        pairs = []
        if s.llama:
            import llama

            sides[uniform] = (ours.reading, s.uniform, s.dtype, tokens)
            sides[ROTATING] = (llama.reading, s.model, s.dtype, tokens, s.window)
            sides[GROWING] = (llama.reading, s.model, s.dtype, tokens, None)
            pairs = [(uniform, ROTATING), (OURS, GROWING)]
        if s.torch:
            import pytorch

            sides[TORCH] = (pytorch.reading, s.model, s.weights, s.dtype, s.device, tokens)
            pairs.append((OURS, TORCH))
        yield from compare(f"prefill, {tokens:,} tokens", sides, pairs, tokens, a, warmup=int(tokens <= 4096))


def train(s: Setting, a: argparse.Namespace) -> Iterator[dict]:
    """Training steps."""
    c = s.config
    fill = -(-max(s.model.horizons) // c.segment_length) + 1  # steps until all memories are full
    with tempfile.TemporaryDirectory() as folder:
        lengths = [length for length in a.excerpts if c.tokens_per_step % length == 0]
        for length in set(a.excerpts) - set(lengths):
            s.notes.append(f"excerpts of {length:,} tokens: skipped, a step has {c.tokens_per_step:,}")
        needed = max([(fill + a.rounds + 8) * c.segment_length, *(2 * length for length in lengths)])
        corpus = ours.write_corpus(Path(folder) / "corpus", c.batch_size, needed)
        sides: dict[str, Side] = {OURS: (ours.training, c, corpus)}
        for length in lengths:
            sides[f"full attention, excerpts of {length:,}"] = (plain.training, c, corpus, length)
        if s.torch:
            import pytorch

            mx.random.seed(c.seed)
            weights = as_numpy(DSMR(s.model))
            sides[TORCH] = (pytorch.training, c, weights, s.device, corpus)
            if a.torch_compiled:
                compiled = replace(c, dtype="bfloat16", compile=True)
                sides[COMPILED] = (pytorch.training, compiled, weights, s.device, corpus)
        pairs = [(OURS, other) for other in sides if other != OURS]
        yield from compare("training step", sides, pairs, c.tokens_per_step, a, warmup=2, fill=fill)


def compare(
    what: str,
    sides: dict[str, Side],
    pairs: Sequence[tuple[str, str]],
    tokens: int,
    a: argparse.Namespace,
    warmup: int = 1,
    fill: int = 0,
) -> Iterator[dict]:
    """One row per pair, after all sides have taken their turns of `tokens` tokens.

    fill: turns that the first side takes before timing; if turns return losses, the first two must agree with
    PyTorch's.
    """
    with ExitStack() as stack:
        workers = {name: stack.enter_context(closing(Worker(*side))) for name, side in sides.items()}
        agreed = check_losses(workers) if fill else None
        for _ in range(fill):
            workers[OURS]()
        times = in_turn(list(workers.values()), a.rounds, warmup, limit=a.seconds)
        seconds = dict(zip(workers, times, strict=True))
        memory = {name: worker.memory() for name, worker in workers.items()}
    for pair in pairs:
        yield {
            "what": what,
            "sides": pair,
            "rounds": len(times[0]),
            "tokens_per_second": [spread([tokens / spent for spent in seconds[name]]) for name in pair],
            "ratio": ratios(seconds[pair[1]], seconds[pair[0]]),
            "peak_bytes": [memory[name]["peak"] or None for name in pair],
            "resident_bytes": [memory[name]["resident"] for name in pair],
            "loss_difference": agreed if pair[1] == TORCH else None,
        }


def check_losses(workers: dict[str, Worker]) -> float | None:
    """The largest relative difference of DSMR's and PyTorch's loss in two steps from equal weights and batches."""
    if TORCH not in workers:
        return None
    losses = np.array([[workers[name]() for name in (OURS, TORCH)] for _ in range(2)])
    found = float(np.abs(losses[:, 0] / losses[:, 1] - 1).max())
    if not found <= 1e-2:
        raise SystemExit(f"{TORCH}: its first losses are {losses[:, 1]}, DSMR's {losses[:, 0]}: must be equal")
    return found


def ahead(ratio: dict[str, float]) -> str:
    """Which side is faster, if the whole middle half agrees."""
    return "DSMR" if ratio["low"] > 1 else "the peer" if ratio["high"] < 1 else "neither"


def show(result: dict, console: Console) -> None:
    """Print the results."""
    agreeing = ", ".join(f"{name} {error:.0e}" for name, error in result["agreement"].items())
    console.print(
        f"differences of logits from DSMR's, relative to the largest: {agreeing} (allowed: {result['tolerance']:.0e})"
    )
    table = Table(box=None, title=result["title"], header_style="bold", title_justify="left")
    headings = ("", "", "tokens/s", "peak", "resident", "peer", "tokens/s", "peak", "resident", "×", "middle half")
    for i, heading in enumerate((*headings, "rounds", "ahead")):
        table.add_column(heading, justify="left" if i in (0, 1, 5, 12) else "right")
    for row in result["rows"]:
        sides = []
        for i, name in enumerate(row["sides"]):
            peak, resident = row["peak_bytes"][i], row["resident_bytes"][i]
            shown = (
                ("", "")
                if row["what"].startswith("decode")
                else (format_bytes(peak) if peak else "", format_bytes(resident))
            )
            sides += [name, f"{row['tokens_per_second'][i]['median']:,.0f}", *shown]
        ratio, last = row["ratio"], (str(row["rounds"]), ahead(row["ratio"]))
        between = f"{ratio['low']:.2f} – {ratio['high']:.2f}"
        table.add_row(row["what"], *sides, f"{ratio['median']:.2f}", between, *last)
    console.print(table)
    for note in result["notes"]:
        console.print(f"note: {note}")


def draw(result: dict, path: Path) -> None:
    """Draw the results."""
    groups: dict[str, list[Pair]] = {}
    for row in result["rows"]:
        name = row["sides"][1] + row["sides"][0].removeprefix(OURS).replace(", ", " | ")
        values, ratio = row["tokens_per_second"], row["ratio"]["median"]
        groups.setdefault(row["what"], []).append(Pair(name, values, f"× {ratio:.2f}"))
    drawn = [Group(f"{what}, tokens/s", pairs) for what, pairs in groups.items()]
    draw_pairs(path, drawn, ("DSMR", "the peer"), result["title"])


def parse_arguments() -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--preset", default="small", help="the size of the model (default small)")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument(
        "--positions", type=numbers, default=[1000, 8192], metavar="N,N", help="positions at which tokens are generated"
    )
    parser.add_argument("--prompts", type=numbers, default=[1024, 8192, 32768], metavar="N,N", help="tokens to read")
    parser.add_argument("--excerpts", type=numbers, default=[512, 1024, 2048], metavar="N,N", help="tokens per excerpt")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="most turns of each side (default 8)")
    parser.add_argument("--seconds", type=float, default=60.0, help="no round starts after this time (default 60)")
    parser.add_argument("--tokens", type=int, default=30, metavar="N", help="tokens generated per turn (default 30)")
    parser.add_argument("--torch-device", default="cpu", metavar="NAME", help="(default cpu)")
    parser.add_argument("--torch-compiled", action="store_true", help="train with torch.compile and bfloat16, too")
    add_outputs(parser)
    a = parser.parse_args()
    if unknown := set(a.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(PARTS)}")
    return a


def main() -> None:
    """Measure, show, write."""
    a = parse_arguments()
    s = Setting.of(a)
    device = mx.default_device().type.name
    result = {
        "title": f"preset {a.preset}{', changed' if a.settings else ''}, {s.config.horizons}, {s.dtype}, {device}",
        "settings": s.config.to_dict(),
        "torch_device": s.device if s.torch else None,
        "threads": blas_threads(),
        "tolerance": s.tolerance,
        "agreement": agreement(s),
        "notes": s.notes,
        "rows": [],
    }
    for name, part in (("decode", decode), ("prefill", prefill), ("train", train)):
        if name in (a.parts or PARTS):
            result["rows"] += part(s, a)
    show(result, Console(width=180))
    write_outputs(a, result, partial(draw, result))


if __name__ == "__main__":
    run_main(main)
