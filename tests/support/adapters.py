"""Small bases for adapters, and runs that train them."""

from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map
from support.tiny import TOKENIZER, tiny_config

from dsmr_mlx import DSMR
from dsmr_mlx.model import checkpoint
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.training.config import TrainConfig


def save_base(folder: Path, bits: int | None = None, tokenizer: Tokenizer = TOKENIZER, seed: int = 3, **options) -> str:
    """Write a checkpoint of random weights, quantized to `bits`. Return its path."""
    mx.random.seed(seed)
    sizes = {"d_model": 32, "d_ff": 64, "head_dim": 16}
    config = tiny_config(**sizes | options).model_config(tokenizer, bits and {"bits": bits, "group_size": 32})
    model = DSMR(config)
    weights = model.parameters()
    if bits is None:
        model.embed.weight = model.embed.weight * 4
        weights = tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.parameters())
    checkpoint.save_model(folder, config, weights, tokenizer)
    return str(folder)


def adapter_config(init: str, **options) -> TrainConfig:
    """Return the configuration of a run that trains adapters for a base of `save_base`."""
    sizes = {"d_model": 32, "d_ff": 64, "head_dim": 16, "lora_rank": 4}
    return tiny_config(init=init, **sizes | options)
