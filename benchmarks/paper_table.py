"""The paper's table: perplexity and the value of memory (KRCU) of every horizon schedule, and of whole-piece memory.

    python benchmarks/paper_table.py --data maestro --out benchmarks/results/paper-table                # a CPU, an hour
    python benchmarks/paper_table.py --data maestro --out benchmarks/results/paper-table --size paper   # a GPU or a Mac

Every row trains one model on the same tokens in the same order and evaluates it on whole validation pieces: perplexity,
and how much the loss rises over the 8,192 tokens after all memory is emptied, as `dsmr-mlx evaluate --reset-at` does.
All rows but `full` and `FHCR` have the budget of two-scale. `FHCR` keeps whole pieces with 2 key/value heads.
`schedule_cost.py` measures the time and memory of the same rows.

Rows are trained one after the other. Stop the program at any time; the same command continues the unfinished row.
OUT gets a folder for each row, `table.json` and `table.md`.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from measuring import save
from outputs import run_main

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import write_atomically
from dsmr_mlx.common.formatting import format_bytes
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model.horizons import parse
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.settings import build_config

ROOT = Path(__file__).parents[1]
STDERR = 2  # file descriptor: standard output has the table alone
ITEMSIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Size:
    """A preset and changes to it, and the schedules.

    cap: tokens that every layer of `full` and the long layers carry; long: number of long layers; short: tokens of the
    others; whole: the horizon of FHCR; tokens: of a run; eval_tokens: of the validation, None for all
    """

    preset: str
    settings: Mapping[str, str]
    cap: int
    long: int
    short: int
    tokens: int
    whole: str = "whole"
    eval_tokens: int | None = None

    @classmethod
    def named(cls, name: str, **changes: int | str | None) -> Self:
        """One of `SIZES` with other numbers; None changes nothing."""
        return replace(SIZES[name], **{field: value for field, value in changes.items() if value is not None})

    def row_settings(self, names: Sequence[str], shared: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """All settings of the named rows, or of all rows; `shared` are added to those of the size.

        Raises `UserError` for an unknown name or invalid settings.
        """
        shared = {**self.settings, **shared}
        known = self.rows(build_config(self.preset, settings=as_list(shared)).n_layers)
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"row {unknown[0]}: expected one of {', '.join(known)}")
        return {name: shared | known[name] for name in names or known}

    def rows(self, layers: int) -> dict[str, dict[str, str]]:
        """What distinguishes each row, by name."""
        two_scale = f"long={self.long}x{self.cap},short={self.short}"
        budget = parse(f"two-scale:{two_scale}", layers).budget
        horizons = {
            "full": f"full:{self.cap}",
            "two-scale": f"two-scale:{two_scale}",
            "inverse-two-scale": f"inverse-two-scale:{two_scale}",
            "linear-rising": f"linear:budget={budget},reverse",
            "linear-falling": f"linear:budget={budget}",
            "uniform": f"uniform:budget={budget}",
        }
        return {name: {"horizons": spec} for name, spec in horizons.items()} | {
            "FHCR": {"horizons": self.whole, "n_kv_heads": "2"}
        }


SIZES = {
    # About 1.2 M parameters; 5 minutes a row on two cores, FHCR 20.
    "cpu": Size(
        preset="tiny",
        settings={"n_heads": "4", "head_dim": "32", "batch_size": "32"},
        cap=2048,
        long=1,
        short=128,
        tokens=1_000_000,
        eval_tokens=300_000,
    ),
    # About 40 M parameters.
    "paper": Size(preset="base", settings={}, cap=8192, long=4, short=896, tokens=100_000_000),
}


@dataclass(frozen=True)
class Row:
    """A run of a row: its name, its seed, and its settings as `key=value`."""

    name: str
    seed: int
    settings: dict[str, str] = field(hash=False)
    config: TrainConfig = field(hash=False)

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"{self.name}-{self.seed}"


def make_rows(a: argparse.Namespace, corpus: Corpus) -> list[Row]:
    """The requested rows, seed by seed. Raises `UserError` for invalid settings."""
    size = Size.named(a.size, cap=a.cap, long=a.long, short=a.short, whole=a.whole)
    shared = {
        "dtype": a.dtype or default_dtype(a.framework),
        "max_tokens": f"{a.tokens or size.tokens}",
        "eval_every": "1000000000",  # only at the end
        "eval_tokens": "20000",
        "sample_seconds": "0",
    }
    if a.framework == "torch":
        shared["compile"] = "true" if shutil.which("g++") else "false"
    shared |= dict(setting.partition("=")[::2] for setting in a.settings)
    rows = []
    for seed in a.seeds:
        for name, settings in size.row_settings(a.rows, shared | {"seed": f"{seed}"}).items():
            config = build_config(size.preset, settings=as_list(settings)).for_corpus(corpus)
            rows.append(Row(name, seed, settings, config))
    check_reset(rows[0].config, corpus, a)
    return rows


def check_reset(config: TrainConfig, corpus: Corpus, a: argparse.Namespace) -> None:
    """Raise `UserError`, before anything is trained, unless some validation piece goes past the reset."""
    from dsmr_mlx.evaluation.losses import sample_pieces
    from dsmr_mlx.evaluation.reset import check_reset_at

    pieces = sample_pieces(corpus.pieces("validation"), eval_tokens(a))
    check_reset_at(config.model_config(corpus.tokenizer), pieces, a.reset_at)


def eval_tokens(a: argparse.Namespace) -> int | None:
    """About how many tokens are evaluated; None: all."""
    return a.eval_tokens or SIZES[a.size].eval_tokens


def as_list(settings: Mapping[str, str]) -> list[str]:
    """Settings as `key=value`."""
    return [f"{key}={value}" for key, value in settings.items()]


def default_dtype(framework: str) -> str:
    """bfloat16 if the machine supports it, else float32."""
    if framework == "mlx":
        import mlx.core as mx

        return "bfloat16" if mx.default_device().type == mx.DeviceType.gpu else "float32"
    import torch

    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(encoding="utf-8", errors="replace") if cpu.exists() else ""
    return "bfloat16" if torch.cuda.is_available() or "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def train(row: Row, folder: Path, preset: str, data: str, framework: str) -> None:
    """Train a row in another process, or continue its training.

    Raises `UserError` if the program fails or is stopped.
    """
    sets = [word for setting in as_list(row.settings) for word in ("--set", setting)]
    common = ["--data", data, "--preset", preset, *sets, "--resume"]
    if framework == "torch":
        command = [sys.executable, str(ROOT / "examples/train_pytorch.py"), "--out", str(folder / "model.pt"), *common]
    else:
        command = [sys.executable, "-m", "dsmr_mlx.train", "--out", str(folder / "run"), *common]
    if subprocess.run(command, stdout=STDERR, check=False).returncode:
        raise UserError(f"{row.folder}: training failed: {' '.join(command)}")
    if framework == "torch":
        import torch

        progress = torch.load(folder / "model.pt.last", weights_only=True, mmap=True)["progress"]
    else:
        progress = json.loads((folder / "run/last/training.json").read_text(encoding="utf-8"))["progress"]
    if progress["tokens"] < row.config.max_tokens:
        raise UserError(f"{row.folder}: stopped after {progress['tokens']:,} tokens; the same command continues")


def trained_model(folder: Path, framework: str) -> Path:
    """The MLX checkpoint of a trained row."""
    if framework == "mlx":
        return folder / "run/last"
    from dsmr_mlx.convert import plan_conversion, write_conversion

    return write_conversion(plan_conversion(folder / "model.pt"), folder / "model", force=True)


def measure(model_path: Path, corpus: Corpus, reset_at: int | None, eval_tokens: int | None) -> dict[str, Any]:
    """Perplexity of the validation split, and the value of memory after `reset_at` tokens."""
    from dsmr_mlx.evaluation.losses import piece_losses, sample_pieces, summarize
    from dsmr_mlx.evaluation.reset import WINDOW, check_reset_at, measure_reset
    from dsmr_mlx.model.checkpoint import load

    model, _ = load(model_path)
    pieces = sample_pieces(corpus.pieces("validation"), eval_tokens)
    at = check_reset_at(model.config, pieces, reset_at)
    ids = [corpus.tokens(piece) for piece in pieces]
    losses = piece_losses(model, ids)
    works = [piece.work for piece in pieces]
    found, end = summarize(corpus, pieces, losses), at + WINDOW  # later tokens do not count, and take long to read
    reset = measure_reset(model, [piece[: end + 1] for piece in ids], [nats[:end] for nats in losses], at, works)
    error = reset.gain.error if math.isfinite(reset.gain.error) else None
    return {
        "perplexity": found.perplexity,
        "nats_per_token": found.nats_per_token,
        "validation_tokens": found.tokens,
        "validation_pieces": found.pieces,
        "krcu": reset.gain.nats,
        "krcu_error": error,
        "reset_at": at,
        "reset_pieces": reset.pieces,
        "krcu_by_distance": [[each.start, each.gain.nats] for each in reset.by_distance],
    }


def finish(row: Row, a: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """The result of a row: read if it is finished, else trained and measured. It is stored last."""
    folder = Path(a.out) / row.folder
    stored = folder / "result.json"
    # The checkpoint records no choice of framework, which changes the random weights.
    wanted = {"framework": a.framework, "corpus": corpus.fingerprint, "settings": row.config.to_dict()}
    wanted |= {"reset_at": a.reset_at, "eval_tokens": eval_tokens(a)}
    begun = folder / "wanted.json"
    if begun.exists():
        found = json.loads(begun.read_text(encoding="utf-8"))
        for name in wanted:
            if found.get(name) != wanted[name]:
                raise UserError(f"{folder}: has other {name}, expected another `out`: {differing(found, wanted, name)}")
    else:
        save(begun, wanted)
    if stored.exists():
        return json.loads(stored.read_text(encoding="utf-8"))
    say(f"{row.folder}: {row.config.horizons}")
    train(row, folder, SIZES[a.size].preset, a.data, a.framework)
    c = row.config
    state = c.schedule.state_bytes(
        c.n_kv_heads, c.head_dim, c.segment_length, c.batch_size, ITEMSIZES[c.dtype], c.canon_size
    )
    result = {"row": row.name, "seed": row.seed, "horizons": c.horizons, "n_kv_heads": c.n_kv_heads}
    result |= {"budget": c.schedule.budget, "state_bytes": state}
    result |= measure(trained_model(folder, a.framework), corpus, a.reset_at, wanted["eval_tokens"])
    save(stored, result)
    return result


def differing(found: dict[str, Any], wanted: dict[str, Any], name: str) -> str:
    """Describe the first difference in a few words."""
    old, new = found.get(name), wanted[name]
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in new if old.get(key) != new[key])
        old, new, name = old.get(key), new[key], key
    return f"{name} = {old}, not {new}"


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The table: means over seeds, rows in the order of their first result."""
    lines = [
        "| | horizons | heads | budget, tokens | state | perplexity | KRCU, nats |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(result["row"] for result in results):
        runs = [result for result in results if result["row"] == name]
        perplexity, krcu = (statistics.fmean(run[key] for run in runs) for key in ("perplexity", "krcu"))
        first = runs[0]
        error = f" ± {first['krcu_error']:.4f}" if len(runs) == 1 and first["krcu_error"] is not None else ""
        lines.append(
            f"| {name} | `{first['horizons']}` | {first['n_kv_heads']} | {first['budget']:,} | "
            f"{format_bytes(first['state_bytes'])} | {perplexity:.3f} | {krcu:.4f}{error} |"
        )
    return "\n".join(lines) + "\n"


def say(message: str) -> None:
    """Print a line of progress with the time."""
    print(time.strftime("%H:%M:%S"), message, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="names of rows (default: all)")
    parser.add_argument("--data", required=True, metavar="CORPUS")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder of the table and its runs")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="of the model and the runs (default cpu)")
    parser.add_argument(
        "--framework", choices=("torch", "mlx"), default="torch" if sys.platform != "darwin" else "mlx",
        help="framework of the training (default: mlx on a Mac, else torch, which is faster on a CPU)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=ITEMSIZES, help="of the training (default: bfloat16 if supported)")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens of a run")
    parser.add_argument("--cap", type=int, metavar="M", help="tokens that full and the long layers carry")
    parser.add_argument("--long", type=int, metavar="N", help="number of long layers")
    parser.add_argument("--short", type=int, metavar="M", help="tokens that the other layers carry")
    parser.add_argument("--whole", metavar="SPEC", help="horizon of FHCR, such as whole:32768 (default whole)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="seeds (default 0)")
    parser.add_argument("--reset-at", type=int, metavar="N", help="tokens before memory is emptied (default 8,192)")
    parser.add_argument("--eval-tokens", type=int, metavar="N", help="tokens of the validation, about")
    return parser.parse_args()


def main() -> None:
    """Make the table, row by row."""
    a, results = parse_arguments(), []
    corpus = Corpus.load(a.data)
    for row in make_rows(a, corpus):
        (Path(a.out) / row.folder).mkdir(parents=True, exist_ok=True)
        results.append(finish(row, a, corpus))
        save(Path(a.out) / "table.json", {"size": a.size, "cores": os.cpu_count(), "rows": results})
        write_atomically(Path(a.out) / "table.md", markdown(results))
    print(markdown(results), end="")


if __name__ == "__main__":
    run_main(main)
