"""LoRA (Hu et al. 2021): low-rank updates of the matrices of the blocks, trained while all other weights are frozen.

A matrix W `(out, in)` computes W + alpha / rank · B A, with A `(rank, in)` drawn at random and B `(out, rank)` zero at
first, so that a new model equals its base exactly. W may be quantized. Matrices that are stored as one weight have an
adapter each: q, k and v in `qkv`, gate and up in `gate_up`. Their parameters are called
`layers.N.attention.qkv.lora.q.a` and `….b`.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from dsmr_mlx.model.config import Architecture, ModelConfig
from dsmr_mlx.model.dropout import dropout

PART = ".lora."  # in the name of each parameter of an adapter


def matrix_rows(config: Architecture, name: str) -> dict[str, int]:
    """Return the matrices in a weight of a block, by name, with their rows; name: of the layer, such as "qkv"."""
    rows = {"out": config.d_model, "up": config.d_ff, "down": config.d_model}
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    fused = {"qkv": {"q": queries, "k": keys, "v": keys}, "gate_up": {"gate": config.d_ff, "up": config.d_ff}}
    return fused.get(name) or {name: rows[name]}


class Adapters(nn.Module):
    """The adapters of the matrices in one weight; they add `(B, T, Σ rows)` to its output."""

    def __init__(self, width: int, rows: Mapping[str, int], rank: int, scale: float, rate: float):
        super().__init__()
        self.parts, self.scale, self.rate = tuple(rows), scale, rate
        for name, n in rows.items():
            a = mx.random.normal((rank, width), scale=width**-0.5)
            self[name] = {"a": a, "b": mx.zeros((n, rank))}

    def __call__(self, x: mx.array, keys: mx.array | None) -> mx.array:
        """Return the updates for x `(B, T, width)`; keys: for dropout of x, see `dropout`."""
        x = dropout(x, self.rate, keys)
        updates = [(self.scale * (x @ self[name]["a"].T)) @ self[name]["b"].T for name in self.parts]
        return mx.concatenate(updates, axis=-1) if len(updates) > 1 else updates[0]


def project(linear: nn.Module, x: mx.array, keys: mx.array | None = None) -> mx.array:
    """Return the output of a linear layer, quantized or not, with its adapters, if any; keys: for their dropout."""
    y = linear(x)
    return y + linear.lora(x, keys) if "lora" in linear else y


def adapter_keys(keys: mx.array | None) -> tuple[mx.array | None, mx.array | None]:
    """Return keys for the adapters of two layers, each `(B, 2)`, derived from keys of that shape."""
    if keys is None:
        return None, None
    split = mx.vmap(lambda key: mx.random.split(key, 2))(keys)  # (B, 2, 2)
    return split[:, 0], split[:, 1]


def add_adapters(model: nn.Module, config: ModelConfig) -> None:
    """Add adapters to the last layers of a model, as in `config.lora`, and freeze everything else."""
    settings = config.lora
    rank, scale = settings["rank"], settings["alpha"] / settings["rank"]
    widths = {"out": config.n_heads * config.head_dim, "down": config.d_ff}
    model.freeze()
    for block in model.layers[config.n_layers - settings["layers"] :]:
        for part in (block.attention, block.feed_forward):
            for name in [name for name in ("qkv", "out", "gate_up", "up", "down") if name in part]:
                width, rows = widths.get(name, config.d_model), matrix_rows(config, name)
                part[name].lora = Adapters(width, rows, rank, scale, settings["dropout"])


def is_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter."""
    return PART in name


def split_parameters(model: nn.Module, config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the trees of the trained and of the frozen parameters; without adapters all are trained."""
    named = tree_flatten(model.parameters())
    trained = [(name, p) for name, p in named if config.lora is None or is_adapter(name)]
    frozen = [(name, p) for name, p in named if config.lora is not None and not is_adapter(name)]
    return tree_unflatten(trained), tree_unflatten(frozen) if frozen else {}


def merged(weight: mx.array, name: str, adapters: Mapping[str, mx.array], config: ModelConfig) -> mx.array:
    """Return a weight `(out, in)`, not quantized, with its adapters added, float32 if it has some.

    name: of the weight, such as `layers.0.attention.qkv.weight`; adapters: all of the model's, by name.
    """
    layer = name.removesuffix(".weight")
    prefix = f"{layer}{PART}"
    if not any(key.startswith(prefix) for key in adapters):
        return weight
    scale = config.lora["alpha"] / config.lora["rank"]
    pairs = [
        [adapters[f"{prefix}{part}.{side}"].astype(mx.float32) for side in "ba"]
        for part in matrix_rows(config, layer.rpartition(".")[2])
    ]
    return weight.astype(mx.float32) + scale * mx.concatenate([b @ a for b, a in pairs])
