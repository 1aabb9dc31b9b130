"""The effect of each part of the training recipe: perplexity and speed with and without it.

    python benchmarks/recipe.py --data CORPUS --runs FILE.jsonl [--size small] [--jobs 2] [ROW ...]

Every row of `ROWS` trains a model of one size on the same tokens in the same order, in PyTorch (the reference of
`convert`, faster than MLX on a CPU), and is validated on whole streamed pieces. `old at 8M` and `new at 3M` compare the
recipes at unequal lengths. Finished runs are kept in the file and not repeated, so the work can be stopped and
continued at any time. `--jobs` trains several at once, each on its share of the cores.
"""

import argparse
import math
import multiprocessing
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from finished import append_lines, read_lines
from paper_table import default_dtype
from rich.console import Console
from rich.table import Table

from dsmr_mlx.common.allocator import keep_freed_memory
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.encode import cores
from dsmr_mlx.training.settings import build_config

SIZES = {
    "cpu": (
        *("n_layers=4", "d_model=128", "n_heads=4", "d_ff=352", "horizons=two-scale:long=1x1024,short=128"),
        "eval_tokens=100000",
    ),
    "small": ("eval_tokens=150000",),
}
SHARED = (
    *("warmup_steps=60", "augment_transpose=3", "augment_stretch=0.05", "augment_velocity=8"),
    *("lr_schedule=wsd", "cooldown=0.3", "compile=true"),
)
NONE = {
    **dict.fromkeys(("value_residual", "embedding_skip", "canon", "zero_init", "qk_norm"), "false"),
    "logit_softcap": "none",
}
ADAMW = {"optimizer": "adamw", "learning_rate": "2e-3", "min_learning_rate": "4e-5"}
MUON = {"optimizer": "muon", "learning_rate": "4e-3", "adamw_learning_rate": "3e-3", "min_learning_rate": "8e-5"}
CAPPED = NONE | MUON | {"zero_init": "true", "logit_softcap": "15"}
CANON = CAPPED | {"canon": "true"}
ALL = CANON | {"value_residual": "true", "embedding_skip": "true"}
OLD = NONE | ADAMW | {"tie_embeddings": "true"}


class Row(NamedTuple):
    """A recipe: its settings, and how many tokens it trains on if not those of the table."""

    settings: dict[str, str]
    tokens: int | None = None


ROWS = {
    "AdamW": Row(NONE | ADAMW),
    "Muon": Row(NONE | MUON),
    "+ zero-initialized outputs, logits capped": Row(CAPPED),
    "+ Canon layers": Row(CANON),
    "+ Canon layers, embedding skips": Row(CANON | {"embedding_skip": "true"}),
    "+ Canon layers, value residuals": Row(CANON | {"value_residual": "true"}),
    "all": Row(ALL),
    "all, without Canon layers": Row(ALL | {"canon": "false"}),
    "all, QK-norm": Row(ALL | {"qk_norm": "true"}),
    "all, 2 key/value heads": Row(ALL | {"n_kv_heads": "2"}),
    "all, 1 key/value head": Row(ALL | {"n_kv_heads": "1"}),
    "old at 8M": Row(OLD, 8_000_000),
    "new at 3M": Row(ALL, 3_000_000),
}


class Job(NamedTuple):
    """One run."""

    data: str
    corpus: str
    row: str
    seed: int
    settings: tuple[str, ...]
    threads: int


def train(job: Job) -> dict[str, Any]:
    """Train and validate, in a process of its own. Speed excludes the first ten steps, which compile."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import torch
    from train_pytorch import Training

    keep_freed_memory()
    torch.set_num_threads(job.threads)
    training = Training(build_config(settings=job.settings), Corpus.load(job.data), "cpu")
    started = before = 0.0
    while training.done < 1:
        if training.step == 10:
            started, before = time.perf_counter(), training.tokens
        training.train_step()
    seconds = time.perf_counter() - started
    nats = training.validate()
    return {
        "row": job.row,
        "seed": job.seed,
        "tokens": training.tokens,
        "parameters": sum(weight.numel() for weight in training.model.parameters()),
        "nats_per_token": nats,
        "perplexity": math.exp(nats),
        "tokens_per_second": (training.tokens - before) / seconds,
        "settings": job.settings,
        "corpus": job.corpus,
    }


def jobs(a: argparse.Namespace, finished: list[dict[str, Any]]) -> Iterator[Job]:
    """Yield the runs that are left, seed by seed. Raises `UserError` if a finished run has other settings."""
    done = {(run["row"], run["seed"]): run for run in finished}
    corpus = Corpus.load(a.data).fingerprint
    for seed in a.seeds:
        for name in a.rows or ROWS:
            settings, tokens = ROWS[name]
            own = (*(f"{key}={value}" for key, value in settings.items()), f"max_tokens={tokens or a.tokens}")
            every = (*SIZES[a.size], *SHARED, f"dtype={default_dtype('torch')}", *a.settings, *own, f"seed={seed}")
            if (name, seed) in done:
                check_same(done[name, seed], every, corpus)
            else:
                yield Job(a.data, corpus, name, seed, every, max(1, cores() // a.jobs))


def check_same(run: dict[str, Any], settings: tuple[str, ...], corpus: str) -> None:
    """Raise `UserError` if a finished run has other settings or another corpus than those wanted."""
    before, now = [*run["settings"], f"corpus={run.get('corpus')}"], [*settings, f"corpus={corpus}"]
    if differing := [*(set(before) ^ set(now))]:
        raise UserError(
            f"{run['row']}, seed {run['seed']}: the finished run differs in {', '.join(sorted(differing))}; expected "
            "another file for --runs"
        )


def table(finished: list[dict[str, Any]]) -> Table:
    """Return the means over seeds."""
    out = Table("recipe", "parameters", "tokens", "seeds", "nats ± half the range", "perplexity", "tokens/s")
    for name in ROWS:
        if not (runs := [run for run in finished if run["row"] == name]):
            continue
        nats = [run["nats_per_token"] for run in runs]
        mean, spread = statistics.fmean(nats), f" ± {(max(nats) - min(nats)) / 2:.3f}" if len(nats) > 1 else ""
        speed = statistics.fmean(run["tokens_per_second"] for run in runs)
        size, tokens = (f"{runs[0][key]:,}" for key in ("parameters", "tokens"))
        out.add_row(name, size, tokens, str(len(runs)), f"{mean:.3f}{spread}", f"{math.exp(mean):.2f}", f"{speed:,.0f}")
    return out


def main() -> None:
    """Train what is left and print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, metavar="CORPUS")
    p.add_argument("--runs", required=True, type=Path, metavar="FILE.jsonl")
    p.add_argument("--size", choices=SIZES, default="cpu")
    p.add_argument("--tokens", type=int, default=2_000_000)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    p.add_argument("--jobs", type=int, default=1)
    p.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    p.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    a = p.parse_args()
    if unknown := [name for name in a.rows if name not in ROWS]:
        p.error(f"{unknown[0]}: expected one of {', '.join(ROWS)}")
    finished = read_lines(a.runs)
    try:
        left = list(jobs(a, finished))
    except UserError as error:
        p.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the pool, which ends its processes
    with multiprocessing.get_context("spawn").Pool(a.jobs, maxtasksperchild=1) as pool:
        for run in pool.imap_unordered(train, left):
            finished.append(run)
            append_lines(a.runs, [run])
            print(f"{run['row']}, seed {run['seed']}: perplexity {run['perplexity']:.3f}", flush=True)
    Console().print(table(finished))


if __name__ == "__main__":
    main()
