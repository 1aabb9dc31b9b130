"""Checkpoints of tiny random models."""

from pathlib import Path

import mlx.core as mx
from support.tiny import tiny_config

from dsmr_mlx import DSMR
from dsmr_mlx.model import checkpoint
from dsmr_mlx.tokenizers.base import Tokenizer


def save(folder: Path, tokenizer: Tokenizer, seed: int = 0, **options) -> DSMR:
    """Write a checkpoint of a tiny random model and return the model."""
    mx.random.seed(seed)
    model = DSMR(tiny_config(**options).model_config(tokenizer))
    model.embed.weight = mx.random.normal(model.embed.weight.shape, scale=0.3)
    checkpoint.save_model(folder, model.config, model.parameters(), tokenizer)
    return model
