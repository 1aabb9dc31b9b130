"""Wider feed-forward layers that compute the same, to start the training of a larger model from a smaller one.

The output weights of a new unit are 0, as those of a new model with `zero_init`, so it has no effect before training.
Chen, Goodfellow & Shlens 2016, "Net2Net: Accelerating Learning via Knowledge Transfer", copy units instead.
"""

import zlib
from dataclasses import replace

import mlx.core as mx

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.model.config import ModelConfig


def with_d_ff(config: ModelConfig, d_ff: int | None) -> ModelConfig:
    """Return the configuration with more units in each feed-forward layer; None: unchanged.

    Raises `UserError` for fewer units.
    """
    if d_ff is None:
        return config
    if d_ff <= config.d_ff:
        raise UserError(f"`d_ff` {d_ff}: the model has {config.d_ff} units, expected more")
    return replace(config, d_ff=d_ff)


def widen_feed_forward(target: str, array: mx.array, before: ModelConfig, after: ModelConfig) -> mx.array:
    """Return the parameter `target` of the model `after`, made from that of `before`, which has fewer units.

    New rows of `gate_up` `(2 d_ff, …)`, gate first, or `up` `(d_ff, …)` are drawn as in a new model, from a seed that
    depends on the name and on the width before; new biases, and new columns of `down.weight` `(d_model, d_ff)`, are 0.
    """
    new = after.d_ff - before.d_ff
    if ".feed_forward." not in target or new == 0 or target.endswith(".down.bias"):
        return array
    if target.endswith(".down.weight"):
        return mx.pad(array, [(0, 0), (0, new)])
    key = mx.random.key(zlib.crc32(f"{target} {before.d_ff}".encode()))
    parts = mx.split(array, 2 if before.gated else 1)
    drawn = mx.random.normal((len(parts), new, *array.shape[1:]), scale=before.d_model**-0.5, key=key)
    if array.ndim == 1:
        drawn = mx.zeros(drawn.shape)
    return mx.concatenate([piece for pair in zip(parts, drawn.astype(array.dtype), strict=True) for piece in pair])
