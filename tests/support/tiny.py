"""A corpus and a configuration for training runs of a second."""

from pathlib import Path

from support.music import random_notes

from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.training.config import TrainConfig

TOKENIZER = PerformanceTokenizer()


def write_corpus(
    folder: Path,
    train: int = 5,
    validation: int = 2,
    notes: int = 12,
    seed: int = 0,
    tokenizer: Tokenizer = TOKENIZER,
) -> Corpus:
    """Write a corpus of random pieces of different lengths; the same arguments give the same corpus."""
    with CorpusWriter(folder, tokenizer) as writer:
        for i in range(train + validation):
            split = "train" if i < train else "validation"
            piece = random_notes(100 * seed + i, notes + 5 * i)
            ids = tokenizer.encode_notes(piece)
            writer.add(ids, source=f"{i}.mid", split=split, duration=piece.duration, notes=len(piece))
        writer.commit({})
    return Corpus.load(folder)


PLAIN = {  # without the recipe of the presets
    "tie_embeddings": True,
    "value_residual": False,
    "embedding_skip": False,
    "canon": False,
    "logit_softcap": None,
    "zero_init": False,
    "optimizer": "adamw",
    "lr_schedule": "cosine",
}


def tiny_config(**options) -> TrainConfig:
    """Return a plain configuration for a run of 20 steps; options override its settings."""
    defaults = PLAIN | {
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "head_dim": 8,
        "d_ff": 24,
        "segment_length": 8,
        "horizons": "two-scale:long=1x12,short=4",
        "batch_size": 3,
        "learning_rate": 1e-2,
        "min_learning_rate": 1e-4,
        "warmup_steps": 3,
        "max_steps": 20,
        "eval_every": 10,
        "checkpoint_every": 10,
        "sample_seconds": 0.0,
    }
    return TrainConfig(**(defaults | options))
