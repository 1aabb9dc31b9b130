"""Copies of layers that have no effect before training, to start the training of a deeper model from a shallower one.

A copy stands after its layer. The weights with which it adds to the stream are 0, so the model computes the same.
Wu et al. 2024, "LLaMA Pro: Progressive LLaMA with Block Expansion" (arXiv 2401.02415).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.model.config import ModelConfig

OUTPUTS = ("attention.out.", "feed_forward.down.")  # what a layer adds to the stream
PARAMETER = re.compile(r"layers\.(\d+)\.(.+)")


def with_copies(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """Return the configuration with a copy after each of these layers, counted from 0, with the same horizon.

    Raises `UserError` for layers that the model lacks, that are named twice, and for the first if others mix in its
    values (`value_residual`).
    """
    known = range(int(config.value_residual), config.n_layers)
    if len(set(layers)) < len(layers) or not set(layers) <= set(known):
        numbers = f"different numbers from {known[0]} to {known[-1]}" if known else "none for this model"
        raise UserError(f"`copy_layers` {','.join(map(str, layers))}: expected {numbers}")
    times = [1 + (layer in layers) for layer in range(config.n_layers)]
    horizons = [horizon for horizon, n in zip(config.horizons, times, strict=True) for _ in range(n)]
    return replace(config, n_layers=len(horizons), horizons=horizons)


def with_copy(target: str, array: mx.array, layers: Sequence[int]) -> Iterator[tuple[str, mx.array]]:
    """Yield a parameter under its name in the deeper model, and that of the copy if its layer is one of `layers`."""
    found = PARAMETER.fullmatch(target)
    if found is None:
        yield target, array
        return
    layer, name = int(found[1]), found[2]
    place = layer + sum(other < layer for other in layers)
    yield f"layers.{place}.{name}", array
    if layer in layers:
        yield f"layers.{place + 1}.{name}", _without_effect(name, array)


def _without_effect(name: str, array: mx.array) -> mx.array:
    """Return a parameter of a copy: of its outputs zeros, of its embedding skip the shares 1 and 0, else the same."""
    if name.startswith(OUTPUTS):
        return mx.zeros_like(array)
    return mx.array([1, 0], array.dtype) if name == "skip" else array
