"""Fewer key/value heads: neighbouring heads are averaged, a warm start for grouped-query attention.

Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints".
"""

from dataclasses import replace

import mlx.core as mx

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.model.config import ModelConfig


def with_kv_heads(config: ModelConfig, kv_heads: int | None) -> ModelConfig:
    """Return the configuration with fewer key/value heads; None: unchanged.

    Raises `UserError` unless the heads divide into groups of at least two.
    """
    if kv_heads is None:
        return config
    if not (1 <= kv_heads < config.n_kv_heads and config.n_kv_heads % kv_heads == 0):
        divisors = [str(n) for n in range(1, config.n_kv_heads) if config.n_kv_heads % n == 0]
        expected = f"expected {' or '.join(divisors)}" if divisors else "which cannot be reduced"
        found = f"the model has {config.n_kv_heads} key/value head{'s' if config.n_kv_heads > 1 else ''}"
        raise UserError(f"`kv_heads` {kv_heads}: {found}, {expected}")
    return replace(config, n_kv_heads=kv_heads)


def average_kv_heads(target: str, array: mx.array, before: ModelConfig, after: ModelConfig) -> mx.array:
    """Return the parameter `target` of the model `after`, made from that of `before`, which has more key/value heads.

    Only the fused projection `attention.qkv` `((H + 2 H_kv) · D, …)` changes: the rows of each group of key heads, and
    of value heads, become their mean, and the result is float32. Query heads keep their places, so each reads the mean
    of the group that its old head belongs to.
    """
    if ".attention.qkv." not in target or before.n_kv_heads == after.n_kv_heads:
        return array
    D, rest = before.head_dim, array.shape[1:]
    queries, keys_and_values = mx.split(array, [before.n_heads * D], axis=0)
    groups = keys_and_values.reshape(2 * after.n_kv_heads, -1, D, *rest)  # (2 H_kv, heads of a group, D, …)
    means = groups.astype(mx.float32).mean(axis=1).reshape(2 * after.n_kv_heads * D, *rest)
    return mx.concatenate([queries.astype(mx.float32), means])
