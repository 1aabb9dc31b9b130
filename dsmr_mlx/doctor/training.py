"""Whether training learns, repeats and resumes, and how fast it is."""

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dsmr_mlx.common.formatting import format_bytes
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.doctor.allocated import allocated
from dsmr_mlx.doctor.finding import Finding, Status, judged
from dsmr_mlx.doctor.numbers import ADVICE
from dsmr_mlx.model.device import on_gpu
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.memory import estimate_memory, fits, machine_memory
from dsmr_mlx.training.settings import build_config
from dsmr_mlx.training.trainer import Trainer

STEPS = 20
PLAN_SHARE = 0.25  # how far the measured peak may be from the plan
APART = 10.0  # on a GPU a resumed run may differ this many times as much as two identical runs do


@contextmanager
def scales(pieces: int = 6, notes: int = 400) -> Iterator[Corpus]:
    """A temporary corpus of scales, which any model learns."""
    tokenizer, rng = PerformanceTokenizer(), np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        with CorpusWriter(Path(folder) / "corpus", tokenizer) as writer:
            for i in range(pieces):
                onset = np.arange(notes) / 8
                pitch = 48 + (np.arange(notes) + int(rng.integers(24))) % 24
                piece = Notes.sorted(onset, onset + 0.1, pitch, np.full(notes, 64))
                split = "validation" if i == 0 else "train"
                ids = tokenizer.encode_notes(piece)
                writer.add(ids, source=f"{i}.mid", split=split, duration=piece.duration, notes=len(piece))
            writer.commit({})
        yield Corpus.load(Path(folder) / "corpus")


def config_of(preset: str, **settings: Any) -> TrainConfig:
    """The settings of a short run."""
    options = {"max_steps": STEPS, "warmup_steps": 3, "eval_tokens": 1000, "sample_seconds": 0} | settings
    return build_config(preset, settings=[f"{name}={value}" for name, value in options.items()])


def losses(trainer: Trainer, steps: int) -> list[float]:
    """The loss of so many steps."""
    found: list[float] = []
    while len(found) < steps:
        if (record := trainer.train_segment()) is not None:
            found.append(record.loss)
    return found


def check_training(full: bool) -> Finding:
    """Some steps learn and stay finite. With `full`, larger models in float32 and bfloat16, too, near the plan."""
    gpu = on_gpu()  # a CPU would take an hour for `base`
    presets = {"tiny": 4} | ({"small": 8} if full else {}) | ({"base": 4} if full and gpu else {})
    values: dict[str, dict[str, float]] = {}
    notes, wrong = [], []
    with scales() as corpus:
        for preset, lanes in presets.items():
            for dtype in ("float32", "bfloat16") if preset != "tiny" else ("float32",):
                name = f"{preset} in {dtype}"
                found = values[name] = take_steps(config_of(preset, dtype=dtype, batch_size=lanes), corpus)
                if "last" not in found:
                    notes.append(f"{name} needs {format_bytes(found['planned'])}, too much for this machine")
                    continue
                if not found["last"] <= 0.9 * found["first"]:  # nor if it is NaN
                    wrong.append(f"{name} does not learn")
                if preset != "tiny" and abs(found["peak"] / found["planned"] - 1) > PLAN_SHARE:
                    peak, planned = (format_bytes(found[key]) for key in ("peak", "planned"))
                    wrong.append(f"{name} takes {peak}, planned were {planned}")
    first = next(iter(values.values()))
    learned = f"{STEPS} steps: loss {first['first']:.2f} → {first['last']:.2f}"
    return judged(not wrong, "; ".join([*(wrong or [learned]), *notes]), values, ADVICE)


def take_steps(config: TrainConfig, corpus: Corpus) -> dict[str, float]:
    """Train for some steps. Return the first and the last loss, and the peak memory and the planned one in bytes.

    Nothing but the plan if the run needs more than the machine has. A loss is NaN if any is.
    """
    before = allocated()
    trainer = Trainer(config, corpus)
    planned = estimate_memory(trainer).total
    if not fits(planned, machine_memory()):
        return {"planned": planned}
    found = losses(trainer, STEPS)
    last = found[-1] if all(map(math.isfinite, found)) else math.nan
    return {"first": found[0], "last": last, "peak": mx.get_peak_memory() - before, "planned": planned}


def check_resuming() -> Finding:
    """Whether steps taken again, and steps after a restart, give the same weights bit by bit.

    A GPU may add in another order each time. Then a restart must not make more of a difference than repeating does.
    """
    config = config_of("tiny", batch_size=4)
    with scales() as corpus:
        once, again, resumed = (Trainer(config, corpus) for _ in range(3))
        losses(once, 5)
        losses(again, 3)
        resumed.load_state_dict(dict(tree_flatten(again.generation_weights)), *again.state_dict())
        losses(again, 2)
        losses(resumed, 2)
    repeated, restarted = distance(once, again), distance(again, resumed)
    values = {
        "repeated": repeated == 0,
        "resumed": restarted == 0,
        "differences": {"repeated": repeated, "resumed": restarted},
    }
    if all(values[name] for name in ("repeated", "resumed")):
        return Finding("", Status.OK, "bitwise the same", values)
    gpu = on_gpu()
    if gpu and restarted <= APART * repeated:
        text = f"not bitwise the same: runs differ by {repeated:.1e}, a resumed one by {restarted:.1e}"
        return Finding("", Status.NOTE, text, values)
    what = "a resumed run has other weights" if restarted else "the same steps give other weights"
    return judged(False, f"{what}, by {restarted or repeated:.1e}; runs differ by {repeated:.1e}", values, ADVICE)


def distance(a: Trainer, b: Trainer) -> float:
    """The largest difference between the weights of two runs; NaN if a weight is NaN."""
    pairs = zip(tree_flatten(a.parameters), tree_flatten(b.parameters), strict=True)
    return float(mx.stack([mx.abs(x - y).max() for (_, x), (_, y) in pairs]).max())


def measure_training(full: bool) -> Finding:
    """The speed of training steps of `small`; with `full`, of `base` too."""
    values = {}
    with scales() as corpus:
        for preset, lanes in (("small", 8), ("base", 4))[: 2 if full else 1]:
            speed = training_speed(config_of(preset, batch_size=lanes), corpus)
            values[preset] = {"tokens_per_second": speed, "lanes": lanes}
    text = "; ".join(
        f"{name}: {value['tokens_per_second']:,.0f} tokens a second with {value['lanes']} lanes"
        for name, value in values.items()
    )
    return Finding("", Status.OK, text, values)


def training_speed(config: TrainConfig, corpus: Corpus) -> float:
    """The tokens per second of three steps, after two to warm up."""
    allocated()  # frees the trainer before
    trainer = Trainer(config, corpus)
    losses(trainer, 2)
    speeds = []
    for _ in range(3):
        started, before = time.perf_counter(), trainer.progress.tokens
        losses(trainer, 1)
        speeds.append((trainer.progress.tokens - before) / (time.perf_counter() - started))
    return statistics.median(speeds)
