"""From logits to the next token: temperature, then top-k, top-p and min-p, then a draw."""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from dsmr_mlx.config import Config
from dsmr_mlx.errors import UserError

LEAST_TEMPERATURE = 1e-30  # float32 has nothing much smaller, and the likeliest token is certain long before


@dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How a token is drawn. The filters act on the probabilities after the temperature, in the order of the fields.

    temperature: divides the logits; 0 takes the likeliest token
    top_k: keep the k likeliest tokens; 0 keeps all
    top_p: keep the fewest likeliest tokens whose probabilities reach p (Holtzman et al. 2020); 1 keeps all
    min_p: keep tokens at least so likely relative to the likeliest (Nguyen et al. 2024); 0 keeps all
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        self.check_types()
        self.require("temperature", 0 <= self.temperature < math.inf, "0 or more")
        self.require("top_k", self.top_k >= 0, "0 or more")
        self.require("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1")
        self.require("min_p", 0 <= self.min_p < 1, "at least 0 and below 1")


def filter_logits(logits: mx.array, sampling: Sampling) -> mx.array:
    """Log-odds `[B, V]` against the likeliest token, at a temperature above 0; −inf where a filter removes the token.

    Ties are kept together.
    """
    logits = (logits - logits.max(axis=-1, keepdims=True)) / max(sampling.temperature, LEAST_TEMPERATURE)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = mx.topk(logits, sampling.top_k, axis=-1).min(axis=-1, keepdims=True)
        logits = mx.where(logits >= kth, logits, -mx.inf)
    if sampling.top_p < 1:
        probabilities = mx.softmax(logits, axis=-1)
        descending = -mx.sort(-probabilities, axis=-1)
        before = mx.cumsum(descending, axis=-1) - descending
        least = mx.where(before < sampling.top_p, descending, 2.0).min(axis=-1, keepdims=True)
        logits = mx.where(probabilities >= least, logits, -mx.inf)
    if sampling.min_p > 0:
        logits = mx.where(logits >= math.log(sampling.min_p), logits, -mx.inf)
    return logits


def draw(logits: mx.array, keys: mx.array, sampling: Sampling) -> mx.array:
    """Tokens `[B]` int32 drawn from logits `[B, V]`, each lane with its own random key `[B, 2]`."""
    if sampling.temperature == 0:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    filtered = filter_logits(logits, sampling)
    return mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(filtered, keys).astype(mx.int32)


def lane_keys(seed: int, lanes: int) -> mx.array:
    """Random keys `[B, 2]` uint32: lane i's depends on the seed and i alone, not on how many lanes there are.

    Raises `UserError` for a negative seed.
    """
    if seed < 0:
        raise UserError(f"seed = {seed}: expected 0 or more")
    return mx.array(np.stack([np.random.SeedSequence([seed, i]).generate_state(2) for i in range(lanes)]))


def split_keys(keys: mx.array) -> tuple[mx.array, mx.array]:
    """Keys `[B, 2]` for now and for the next time."""
    pairs = mx.vmap(lambda key: mx.random.split(key, 2))(keys)
    return pairs[:, 0], pairs[:, 1]
