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
from dsmr_mlx.doctor.finding import Finding, Status, judged
from dsmr_mlx.doctor.numbers import ADVICE
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.memory import estimate_memory
from dsmr_mlx.training.settings import build_config
from dsmr_mlx.training.trainer import Trainer

STEPS = 20
PLAN_SHARE = 0.25  # how far the measured peak may be from the plan


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
    """Some steps learn and stay finite; with `full`, also in bfloat16 and at the size of `small`, near the plan."""
    values, wrong = {}, []
    sizes = [("tiny", "float32", 4)] + ([("small", "float32", 8), ("small", "bfloat16", 8)] if full else [])
    with scales() as corpus:
        for preset, dtype, lanes in sizes:
            config = config_of(preset, dtype=dtype, batch_size=lanes)
            name = f"{preset} in {dtype}"
            mx.reset_peak_memory()
            trainer = Trainer(config, corpus)
            found = losses(trainer, STEPS)
            peak, planned = mx.get_peak_memory(), estimate_memory(trainer).total
            values[name] = {"first": found[0], "last": found[-1], "peak": peak, "planned": planned}
            if not all(map(math.isfinite, found)) or found[-1] > 0.9 * found[0]:
                wrong.append(f"{name} does not learn")
            if full and preset != "tiny" and abs(peak / planned - 1) > PLAN_SHARE:
                wrong.append(f"{name} takes {format_bytes(peak)}, planned were {format_bytes(planned)}")
    first = next(iter(values.values()))
    text = "; ".join(wrong) or f"{STEPS} steps: loss {first['first']:.2f} → {first['last']:.2f}"
    return judged(not wrong, text, values, ADVICE)


def check_resuming() -> Finding:
    """Whether steps taken again, and steps after a restart, give the same weights bit by bit."""
    config = config_of("tiny", batch_size=4)
    with scales() as corpus:
        once, again, resumed = (Trainer(config, corpus) for _ in range(3))
        losses(once, 5)
        losses(again, 3)
        resumed.load_state_dict(dict(tree_flatten(again.generation_weights)), *again.state_dict())
        losses(again, 2)
        losses(resumed, 2)
    values = {"repeated": same(once, again), "resumed": same(again, resumed)}
    exact = all(values.values())
    if exact or mx.default_device().type == mx.DeviceType.gpu:
        text = "bitwise the same" if exact else "not bitwise the same, which a GPU may not promise"
        return Finding("", Status.OK if exact else Status.NOTE, text, values)
    return judged(False, "other weights than without the restart", values, ADVICE)


def same(a: Trainer, b: Trainer) -> bool:
    """Whether two runs have the same weights."""
    pairs = zip(tree_flatten(a.parameters), tree_flatten(b.parameters), strict=True)
    return all(mx.array_equal(x, y).item() for (_, x), (_, y) in pairs)


def measure_training(full: bool) -> Finding:
    """The speed of training steps of `small`; with `full`, of `base` too."""
    values = {}
    with scales() as corpus:
        for preset, lanes in (("small", 8), ("base", 4))[: 2 if full else 1]:
            trainer = Trainer(config_of(preset, batch_size=lanes), corpus)
            losses(trainer, 2)
            speeds = []
            for _ in range(3):
                started, before = time.perf_counter(), trainer.progress.tokens
                losses(trainer, 1)
                speeds.append((trainer.progress.tokens - before) / (time.perf_counter() - started))
            values[preset] = {"tokens_per_second": statistics.median(speeds), "lanes": lanes}
    text = "; ".join(
        f"{name}: {value['tokens_per_second']:,.0f} tokens a second with {value['lanes']} lanes"
        for name, value in values.items()
    )
    return Finding("", Status.OK, text, values)
