"""What a run will need, before it begins: memory and time, estimated and measured on a few steps."""

import statistics
import time
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.trainer import Trainer

TIMED_STEPS = 3


@dataclass(frozen=True)
class Plan:
    """Bytes are of one process; steps and seconds are of the whole run, validation aside.

    peak_estimated: the parts added up; peak_measured: what MLX had allocated at most in the timed steps.
    """

    parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    state_bytes: int
    activations_bytes: int
    peak_measured: int
    tokens_per_epoch: int
    tokens_per_step: float
    steps_per_epoch: float
    steps: float
    seconds_per_step: float

    @property
    def peak_estimated(self) -> int:
        parts = (self.weights_bytes, self.gradients_bytes, self.optimizer_bytes, self.state_bytes)
        return sum(parts) + self.activations_bytes

    @property
    def seconds(self) -> float:
        return self.steps * self.seconds_per_step


def make_plan(config: TrainConfig, corpus: Corpus) -> Plan:
    """Take one step to warm up and three to measure, on the run's own data; nothing is written."""
    before = mx.get_active_memory()
    trainer = Trainer(config, corpus)
    _step(trainer)
    mx.reset_peak_memory()
    tokens = trainer.progress.tokens
    seconds = statistics.median(_timed(trainer) for _ in range(TIMED_STEPS))
    per_step = (trainer.progress.tokens - tokens) / TIMED_STEPS
    weights = _bytes(trainer.parameters)
    return Plan(
        parameters=trainer.model.n_parameters,
        weights_bytes=weights * (2 if config.ema_decay else 1),
        gradients_bytes=weights,  # float32 too, one for each weight
        optimizer_bytes=_bytes(trainer.optimizer_state),
        state_bytes=trainer.memory.nbytes,
        activations_bytes=activation_bytes(
            trainer.model_config, trainer.memory.batch_size, trainer.dtype.size, config.gradient_checkpointing
        ),
        peak_measured=mx.get_peak_memory() - before,
        tokens_per_epoch=trainer.tokens_per_epoch,
        tokens_per_step=per_step,
        steps_per_epoch=trainer.tokens_per_epoch / per_step,
        steps=_steps(config, per_step, seconds),
        seconds_per_step=seconds,
    )


def activation_bytes(config: ModelConfig, lanes: int, itemsize: int, recompute: bool = False) -> int:
    """What a backward pass over one segment keeps, roughly: the inputs of every product and every non-linearity.

    Attention that is not fused keeps its weights, `[B, H, S, M_l + S]`: with long memories these are most of it. Their
    gradient takes as much twice, for one layer at a time. With `recompute` only the inputs of the blocks stay, and one
    block's own at a time; but the memory, which the blocks are given again, is then not written in place.
    """
    heads = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    feed_forward = (4 if config.gated else 2) * config.d_ff

    slots = [horizon + config.segment_length for horizon in config.horizons]
    blocks = [5 * config.d_model + 2 * heads + config.n_heads * n + feed_forward for n in slots]
    kept = config.n_layers * config.d_model + 2 * max(blocks) if recompute else sum(blocks)
    kept += 2 * config.n_heads * max(slots)
    logits = 3 * config.vocab_size
    memory = 2 * config.n_kv_heads * config.head_dim * sum(slots) * itemsize if recompute else 0
    return lanes * (config.segment_length * (kept * itemsize + logits * 4) + memory)


def _steps(config: TrainConfig, tokens_per_step: float, seconds: float) -> float:
    limits = (
        config.max_steps,
        config.max_tokens and config.max_tokens / tokens_per_step,
        config.max_minutes and 60 * config.max_minutes / seconds,
    )
    return min(limit for limit in limits if limit is not None)


def _step(trainer: Trainer) -> None:
    while trainer.train_segment() is None:
        pass


def _timed(trainer: Trainer) -> float:
    started = time.perf_counter()
    _step(trainer)
    return time.perf_counter() - started


def _bytes(tree: object) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))
