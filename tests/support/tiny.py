"""A corpus and a configuration for training runs of a second."""

from pathlib import Path

import numpy as np

from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.training.config import TrainConfig

TOKENIZER = PerformanceTokenizer()


def random_notes(seed: int, n: int) -> Notes:
    """Return n random notes on the 10 ms grid, about 8 a second."""
    rng = np.random.default_rng(seed)
    onset = np.cumsum(rng.integers(1, 25, n)) / 100
    duration = rng.integers(5, 60, n) / 100
    return Notes.sorted(onset, onset + duration, rng.integers(40, 80, n), rng.integers(30, 100, n))


def write_corpus(folder: Path, train: int = 5, validation: int = 2, notes: int = 12, seed: int = 0) -> Corpus:
    """Write a corpus of random pieces of different lengths; the same arguments give the same corpus."""
    with CorpusWriter(folder, TOKENIZER) as writer:
        for i in range(train + validation):
            split = "train" if i < train else "validation"
            piece = random_notes(100 * seed + i, notes + 5 * i)
            ids = TOKENIZER.encode_notes(piece)
            writer.add(ids, source=f"{i}.mid", split=split, duration=piece.duration, notes=len(piece))
        writer.commit({})
    return Corpus.load(folder)


def tiny_config(**options) -> TrainConfig:
    """Return a configuration for a run of 20 steps; options override its settings."""
    defaults = {
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "head_dim": 8,
        "d_ff": 24,
        "segment_length": 8,
        "horizons": "two-scale:long=1x12,short=4",
        "batch_size": 3,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "max_steps": 20,
        "eval_every": 10,
        "checkpoint_every": 10,
        "sample_seconds": 0.0,
    }
    return TrainConfig(**(defaults | options))
