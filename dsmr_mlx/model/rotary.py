"""Rotary positions (RoPE, Su et al. 2021) and the scalings that stretch them over longer contexts."""

from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.device import on_gpu


class Angles(NamedTuple):
    """How far T positions turn, computed once for all layers: float32 `(B, 1, T, rope_dims)`.

    Each dimension turns towards its partner, the other one of its pair. sines: negative in the first of a pair
    """

    cosines: mx.array
    sines: mx.array

    @classmethod
    def of(cls, config: ModelConfig, offset: mx.array, T: int) -> "Angles | None":
        """Return the angles of T positions from `offset` `(B,)` on. None on a GPU, whose kernel computes its own."""
        if on_gpu() or config.rope_dims == 0:
            return None
        positions = offset[:, None, None, None] + mx.arange(T, dtype=mx.float32)[:, None]
        angles = positions * _signed_frequencies(config.rope_interleaved, *_wave_options(config))
        return cls(mx.cos(angles), mx.sin(angles))


def rotate(x: mx.array, config: ModelConfig, offset: int | mx.array, angles: Angles | None = None) -> mx.array:
    """Rotate the first `rope_dims` dimensions of `(…, T, D)`: pairs of neighbours if interleaved, else of two halves.

    offset: the position of row 0, or one per lane, `(B,)`; angles: of these positions, if they are known
    """
    dims = config.rope_dims
    if dims == 0:
        return x
    if angles is None:
        periods = _period_array(*_wave_options(config))
        options = {"base": None, "scale": 1.0, "freqs": periods}
        return mx.fast.rope(x, dims, traditional=config.rope_interleaved, offset=offset, **options)
    turned = x[..., :dims]
    if config.rope_interleaved:
        partners = turned.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(turned.shape)
    else:
        partners = mx.roll(turned, dims // 2, axis=-1)
    turned = turned * angles.cosines.astype(x.dtype) + partners * angles.sines.astype(x.dtype)
    return turned if dims == x.shape[-1] else mx.concatenate([turned, x[..., dims:]], axis=-1)


def wave_periods(dims: int, theta: float, scaling: dict[str, Any] | None = None) -> np.ndarray:
    """Return the positions per radian of each pair of dimensions, `(dims / 2,)`.

    scaling: `rope_scaling` of a config. "linear" makes all waves `factor` times longer (Chen et al. 2023). "llama3", of
    Llama 3.1 (Grattafiori et al. 2024): a wave that turns fewer than `low_freq_factor` times in `original_length`
    positions becomes `factor` times longer; one that turns more than `high_freq_factor` times stays. Between the two,
    the frequency is interpolated.
    """
    frequencies = theta ** (-np.arange(0, dims, 2) / dims)
    if not scaling:
        return 1 / frequencies
    if scaling["type"] == "linear":
        return scaling["factor"] / frequencies
    turns = scaling["original_length"] * frequencies / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    unscaled = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (frequencies * (unscaled + (1 - unscaled) / scaling["factor"]))


def _wave_options(config: ModelConfig) -> tuple:
    """Return the arguments of `wave_periods`, hashable."""
    return config.rope_dims, config.rope_theta, tuple((config.rope_scaling or {}).items())


@lru_cache(maxsize=8)
def _period_array(dims: int, theta: float, scaling: tuple) -> mx.array:
    return mx.array(wave_periods(dims, theta, dict(scaling)).astype(np.float32))


@lru_cache(maxsize=8)
def _signed_frequencies(interleaved: bool, dims: int, theta: float, scaling: tuple) -> mx.array:
    """Return radians per position, float32 `(dims,)`, negative in the first dimension of each pair."""
    pairs = np.multiply.outer([-1, 1], 1 / wave_periods(dims, theta, dict(scaling)))  # (2, dims / 2)
    return mx.array((pairs.T if interleaved else pairs).ravel().astype(np.float32))
