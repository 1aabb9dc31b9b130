"""The optimizers of a run and their learning rates.

`optimizer = "adamw"`: AdamW for all weights. `"muon"`: Muon for the matrices of the blocks, each by itself even if some
are stored as one; AdamW with a rate of its own and without decay for everything else.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from dsmr_mlx.model.config import Architecture
from dsmr_mlx.model.lora import matrix_rows
from dsmr_mlx.training.config import TrainConfig

MATRICES = ("attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.up", "feed_forward.down")
MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic polynomial of Jordan et al. 2024
ITERATIONS = 5
RMS = 0.2  # of an update, as large as AdamW's (Liu et al. 2025, section 2.2)


class ScaledOptimizer(optim.MultiOptimizer):
    """Optimizers for different weights, whose learning rates are multiplied by a common factor."""

    def __init__(self, optimizers: list[optim.Optimizer], filters: list[Callable[[str, mx.array], bool]]):
        super().__init__(optimizers, filters)
        self.full_rates = [optimizer.learning_rate.item() for optimizer in optimizers]

    def scale_rates(self, factor: mx.array) -> None:
        """Set each learning rate to its initial value times `factor`, ()."""
        for optimizer, rate in zip(self.optimizers, self.full_rates, strict=True):
            optimizer.learning_rate = rate * factor


def make_optimizer(config: TrainConfig) -> ScaledOptimizer:
    """Return the optimizer of a run.

    AdamW has bias correction (Loshchilov & Hutter 2019). Alone, it decays matrices only, without the convolutions.
    """

    def adamw(rate: float, decay: float) -> optim.AdamW:
        return optim.AdamW(rate, betas=[config.beta1, config.beta2], weight_decay=decay, bias_correction=True)

    if config.optimizer == "muon":
        muon = Muon(config.learning_rate, config.weight_decay, lambda name: fused_rows(config, name), config.dtype)
        return ScaledOptimizer([muon, adamw(config.adamw_learning_rate, 0.0)], [is_block_matrix])
    rates = config.learning_rate, config.weight_decay
    return ScaledOptimizer([adamw(*rates), adamw(rates[0], 0.0)], [lambda name, p: p.ndim >= 2 and "canon" not in name])


def is_block_matrix(name: str, parameter: mx.array) -> bool:
    """Return whether a weight holds matrices of a block, which Muon updates."""
    return name.removesuffix(".weight").endswith(MATRICES) and parameter.ndim == 2


def fused_rows(config: Architecture, name: str) -> list[int]:
    """Return the rows at which another matrix begins in a weight that holds several: q, k and v, or gate and up."""
    rows = matrix_rows(config, name.removesuffix(".weight").rpartition(".")[2])
    return list(accumulate(rows.values()))[:-1]


class Muon(optim.Optimizer):
    """Orthogonalized Nesterov momentum (Jordan et al. 2024) with decoupled weight decay, for matrices.

    Unlike that of `mlx.optimizers`, it keeps the decay out of the momentum, scales updates to the size of AdamW's,
    divides weights into the matrices that they hold, and orthogonalizes all matrices of one shape at once.

    splits: the rows at which another matrix begins in the weight of a name. dtype: of the orthogonalization.
    """

    def __init__(self, learning_rate: float, weight_decay: float, splits: Callable[[str], list[int]], dtype: str):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.weight_decay = weight_decay
        self.splits = splits
        self.dtype: mx.Dtype = getattr(mx, dtype)

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        """Start with no momentum."""
        state["m"] = mx.zeros_like(parameter)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        """Update the momentum and return Nesterov's; `apply_gradients` goes on with that of all weights."""
        state["m"] = MOMENTUM * state["m"] + (1 - MOMENTUM) * gradient
        return MOMENTUM * state["m"] + (1 - MOMENTUM) * gradient

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Return the updated parameters, a tree like that of the gradients."""
        momenta = dict(tree_flatten(super().apply_gradients(gradients, parameters)))
        matrices = {name: mx.split(momentum, self.splits(name)) for name, momentum in momenta.items()}
        directions = iter(self._directions([matrix for parts in matrices.values() for matrix in parts]))
        steps = [(name, mx.concatenate([next(directions) for _ in parts])) for name, parts in matrices.items()]
        rate = self.learning_rate
        return tree_map(lambda s, p: p * (1 - rate * self.weight_decay) - rate * s, tree_unflatten(steps), parameters)

    def _directions(self, matrices: Sequence[mx.array]) -> list[mx.array]:
        """Return each matrix orthogonalized and scaled, float32."""
        by_shape = defaultdict(list)
        for i, matrix in enumerate(matrices):
            by_shape[min(matrix.shape), max(matrix.shape)].append(i)
        directions = list(matrices)
        for (_, larger), members in by_shape.items():
            wide = mx.stack([as_wide(matrices[i]) for i in members]).astype(self.dtype)
            scaled = RMS * math.sqrt(larger) * orthogonalize(wide).astype(mx.float32)
            for i, direction in zip(members, scaled, strict=True):
                directions[i] = direction if directions[i].shape == direction.shape else direction.T
        return directions


def as_wide(matrix: mx.array) -> mx.array:
    """Return a matrix or its transpose, so that it has no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def orthogonalize(matrices: mx.array) -> mx.array:
    """Return matrices `(N, a, b)`, a ≤ b, with all singular values near 1, by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    x = matrices / mx.maximum(mx.linalg.norm(matrices, axis=(1, 2), keepdims=True), 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.swapaxes(1, 2)
        x = mx.addmm(x, mx.addmm(gram, gram, gram, alpha=c, beta=b), x, beta=a)
    return x


def rate_factor(config: TrainConfig, step: int, done: float) -> float:
    """Return the factor of the learning rates in step number `step` (from 0), when the fraction `done` is done.

    A linear warm-up, never zero, reaches 1 at step `warmup_steps`. The end is min_learning_rate / learning_rate, after
    half a cosine or, with "wsd", a line that begins where `in_cooldown` does.
    """
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.lr_schedule == "wsd":
        height = max(0.0, 1 - done) / config.cooldown if in_cooldown(config, done) else 1.0
    else:
        height = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
    floor = config.min_learning_rate / config.learning_rate
    return warmup * (floor + (1 - floor) * height)


def in_cooldown(config: TrainConfig, done: float) -> bool:
    """Return whether the rate falls after a fraction of a run with the schedule "wsd" (Hu et al. 2024)."""
    return config.lr_schedule == "wsd" and config.cooldown > 0 and 1 - done <= config.cooldown


def global_norm(gradients: list[mx.array]) -> mx.array:
    """Return the Euclidean norm, (), of all gradients taken as one vector."""
    return mx.sqrt(sum(g.astype(mx.float32).square().sum() for g in gradients))
