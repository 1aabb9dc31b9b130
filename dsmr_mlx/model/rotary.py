"""Rotary positions (RoPE, Su et al. 2021) and the scalings that stretch them over longer contexts."""

from functools import lru_cache

import mlx.core as mx
import numpy as np

from dsmr_mlx.model.config import ModelConfig


def rotate(x: mx.array, config: ModelConfig, offset: int | mx.array) -> mx.array:
    """Rotate the first `rope_dims` dimensions of `(…, T, D)`.

    offset: the position of row 0, or one per lane, `(B,)`. With `rope_scaling` of type "linear", positions are divided
    by `factor` (Chen et al. 2023); with "llama3", the frequencies are those of `llama3_periods`.
    """
    if config.rope_dims == 0:
        return x
    scaling = config.rope_scaling or {"type": None}
    periods = None
    if scaling["type"] == "llama3":
        factors = (scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"])
        periods = llama3_periods(config.rope_dims, config.rope_theta, *factors, scaling["original_length"])
    return mx.fast.rope(
        x,
        config.rope_dims,
        traditional=config.rope_interleaved,
        base=config.rope_theta if periods is None else None,
        scale=1 / scaling["factor"] if scaling["type"] == "linear" else 1.0,
        offset=offset,
        freqs=periods,
    )


@lru_cache(maxsize=8)
def llama3_periods(
    dims: int, theta: float, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> mx.array:
    """Return the positions per radian, float32 `(dims / 2,)`, of Llama 3.1's RoPE (Grattafiori et al. 2024).

    A wave that turns fewer than `low_freq_factor` times in `original_length` positions becomes `factor` times longer;
    one that turns more than `high_freq_factor` times stays. Between the two, the frequency is interpolated.
    """
    frequencies = theta ** (-np.arange(0, dims, 2) / dims)
    turns = original_length * frequencies / (2 * np.pi)
    unscaled = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    scaled = frequencies * (unscaled + (1 - unscaled) / factor)
    return mx.array((1 / scaled).astype(np.float32))
