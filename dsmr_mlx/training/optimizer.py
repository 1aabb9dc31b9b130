"""The optimizer of a run and its learning rate."""

import math

import mlx.core as mx
import mlx.optimizers as optim

from dsmr_mlx.training.config import TrainConfig


def make_optimizer(config: TrainConfig) -> optim.MultiOptimizer:
    """Return AdamW with bias correction (Loshchilov & Hutter 2019). Weight decay applies to matrices only."""

    def adamw(weight_decay: float) -> optim.AdamW:
        betas = [config.beta1, config.beta2]
        return optim.AdamW(config.learning_rate, betas=betas, weight_decay=weight_decay, bias_correction=True)

    return optim.MultiOptimizer([adamw(config.weight_decay), adamw(0.0)], [lambda name, parameter: parameter.ndim >= 2])


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Return the rate of step number `step` (from 0) when the fraction `progress` of the run is done.

    A linear warm-up, never zero, reaches the full rate at step `warmup_steps`; then half a cosine falls to the minimum.
    """
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    floor = config.min_learning_rate
    return warmup * (floor + (config.learning_rate - floor) * cosine)


def global_norm(gradients: list[mx.array]) -> mx.array:
    """Return the Euclidean norm, (), of all gradients taken as one vector."""
    return mx.sqrt(sum(g.astype(mx.float32).square().sum() for g in gradients))
