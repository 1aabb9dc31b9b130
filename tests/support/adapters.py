"""Small bases for adapters, and runs that train them."""

from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map
from support.tiny import TOKENIZER, tiny_config

from dsmr_mlx import DSMR
from dsmr_mlx.model import checkpoint
from dsmr_mlx.training.config import TrainConfig


def save_base(folder: Path, bits: int | None = None, seed: int = 3, dtype: mx.Dtype = mx.float32, **options) -> str:
    """Write a checkpoint of random weights, quantized to `bits`; dtype: of its floats. Return its path."""
    mx.random.seed(seed)
    sizes = {"d_model": 32, "d_ff": 64, "head_dim": 16}
    config = tiny_config(**sizes | options).model_config(TOKENIZER, bits and {"bits": bits, "group_size": 32})
    model = DSMR(config)
    model.set_dtype(dtype)
    weights = model.parameters()
    if bits is None:
        model.embed.weight = model.embed.weight * 4
        weights = tree_map(lambda p: p + (0.1 * mx.random.normal(p.shape)).astype(dtype), model.parameters())
    checkpoint.save_model(folder, config, weights, TOKENIZER)
    return str(folder)


def adapter_config(init: str, **options) -> TrainConfig:
    """Return the configuration of a run that trains adapters for a base of `save_base`."""
    sizes = {"d_model": 32, "d_ff": 64, "head_dim": 16, "lora_rank": 4}
    return tiny_config(init=init, **sizes | options)
