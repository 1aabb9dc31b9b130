"""The memory and time that a run will need, estimated and measured on a few steps.

With long memories, such as `whole`, the first steps say little: memories are still short, so steps are fast. But the
state has its full size from the start. Then the plan advises how many lanes fit into the machine with each dtype, and
measures nothing if the run itself does not fit.
"""

import math
import os
import statistics
import time
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.horizons import HorizonSchedule
from dsmr_mlx.model.memory_blocks import BLOCK, is_long
from dsmr_mlx.training import warm_start
from dsmr_mlx.training.config import DTYPES, TrainConfig
from dsmr_mlx.training.distributed import Ranks
from dsmr_mlx.training.trainer import Trainer

TIMED_STEPS = 3
USABLE = 0.8  # of the machine's memory
MAC_GIGABYTES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
MAC_SHARES = (2 / 3, 3 / 4)  # of the memory that macOS lets the GPU use: up to 36 GB, and above
LIVE_BLOCKS = 10  # as large as the scores of a block of a long memory, at the same time (measured on a CPU)


@dataclass(frozen=True)
class LaneAdvice:
    """What a lane needs with a dtype, in bytes, and how many lanes fit into the machine."""

    dtype: str
    state_bytes: int
    activations_bytes: int
    lanes: int


@dataclass(frozen=True)
class Plan:
    """The needs of a run. Bytes are per process; steps and seconds are of the whole run without validation.

    peak_measured: the peak memory that MLX allocated in the timed steps; None if the run does not fit into the machine:
        then nothing was measured, and times are NaN
    memory_bytes: of the machine
    advice: with long memories, one for each dtype
    trained, frozen_bytes: with adapters, how many of the parameters these are, and the bytes of the others
    """

    parameters: int
    trained: int
    frozen_bytes: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    state_bytes: int
    activations_bytes: int
    peak_measured: int | None
    memory_bytes: int
    advice: list[LaneAdvice]
    tokens_per_epoch: int
    tokens_per_step: float
    steps_per_epoch: float
    steps: float
    seconds_per_step: float

    @property
    def peak_estimated(self) -> int:
        """The sum of the parts, in bytes."""
        parts = (self.frozen_bytes, self.weights_bytes, self.gradients_bytes, self.optimizer_bytes, self.state_bytes)
        return sum(parts) + self.activations_bytes

    @property
    def smallest_mac(self) -> tuple[int, int] | None:
        """The memory, in gigabytes, of the smallest Mac that the run fits into, and the bytes that its GPU may use."""
        needed = max(self.peak_estimated, self.peak_measured or 0)
        usable = {size: int(size * MAC_SHARES[size > 36] * 2**30) for size in MAC_GIGABYTES}
        return next(((size, most) for size, most in usable.items() if needed <= most), None)

    @property
    def seconds(self) -> float:
        """The duration of the run."""
        return self.steps * self.seconds_per_step


def make_plan(config: TrainConfig, corpus: Corpus) -> Plan:
    """Measure three steps on the run's own data, after one to warm up. Writes nothing."""
    before, memory = mx.get_active_memory(), machine_memory()
    base, quantization = warm_start.frozen_base(config, None, Ranks())
    trainer = Trainer(config, corpus, quantization=quantization)  # not evaluated, so its arrays take no memory yet
    weights, optimizer = _bytes(trainer.parameters), _bytes(trainer.optimizer_state)
    parts = {
        "frozen_bytes": _bytes(trainer.frozen),
        "weights_bytes": weights * (2 if config.ema_decay else 1),
        "gradients_bytes": weights,  # float32 too, one for each weight
        "optimizer_bytes": optimizer,
        "state_bytes": trainer.state.nbytes,
        "activations_bytes": activation_bytes(
            trainer.model_config, trainer.state.batch_size, trainer.dtype.size, config.gradient_checkpointing
        ),
    }
    long = any(map(is_long, trainer.model_config.horizons))
    fixed = sum(parts[f"{name}_bytes"] for name in ("frozen", "weights", "gradients", "optimizer"))
    advice = advise(config, trainer.model_config, memory, fixed) if long else []
    measured, seconds, per_step = None, math.nan, float(trainer.config.tokens_per_step)
    if not long or sum(parts.values()) < USABLE * memory:
        if base:
            warm_start.load_weights(trainer, base.folder, Ranks())
        seconds, per_step = _measured(trainer)
        measured = mx.get_peak_memory() - before
    return Plan(
        parameters=trainer.model.n_parameters,
        trained=trainer.n_trained,
        **parts,
        peak_measured=measured,
        memory_bytes=memory,
        advice=advice,
        tokens_per_epoch=trainer.tokens_per_epoch,
        tokens_per_step=per_step,
        steps_per_epoch=trainer.tokens_per_epoch / per_step,
        steps=_count_steps(config, per_step, seconds),
        seconds_per_step=seconds,
    )


def _measured(trainer: Trainer) -> tuple[float, float]:
    """Return the seconds and the tokens of a step."""
    _step(trainer)
    mx.reset_peak_memory()
    tokens = trainer.progress.tokens
    seconds = statistics.median(_timed(trainer) for _ in range(TIMED_STEPS))
    return seconds, (trainer.progress.tokens - tokens) / TIMED_STEPS


def advise(config: TrainConfig, model: ModelConfig, memory: int, fixed: int) -> list[LaneAdvice]:
    """Return for each dtype how many lanes fit into `memory` bytes beside `fixed` bytes of weights and optimizer."""
    advice = []
    for dtype in DTYPES:
        itemsize = getattr(mx, dtype).size
        state = HorizonSchedule.custom(model.horizons).state_bytes(
            model.n_kv_heads, model.head_dim, model.segment_length, 1, itemsize, model.canon_size
        )
        activations = activation_bytes(model, 1, itemsize, config.gradient_checkpointing)
        lanes = max(int((USABLE * memory - fixed) // (state + activations)), 0)
        advice.append(LaneAdvice(dtype, state, activations, lanes))
    return advice


def machine_memory() -> int:
    """Return the memory of the machine in bytes: what the GPU should use at most if MLX knows it, else all memory."""
    info = mx.device_info()
    known = info.get("max_recommended_working_set_size") or info.get("memory_size")
    return int(known or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def activation_bytes(config: ModelConfig, lanes: int, itemsize: int, recompute: bool = False) -> int:
    """Estimate the bytes that a backward pass over one segment keeps: the inputs of all products and non-linearities.

    Attention that is not fused keeps its weights, `(B, H, S, M_l + S)`, which dominate if memories are long. Their
    gradient takes twice as much, for one layer at a time. With `recompute` only the inputs of the blocks are kept, and
    the activations of one block at a time; but the recurrent state is then not updated in place. Long memories keep
    no weights, see `memory_blocks`; a few blocks of scores of one layer live at a time. Layers below the first that has
    adapters keep nothing.
    """
    heads = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    feed_forward = (4 if config.gated else 2) * config.d_ff

    slots = [horizon + config.segment_length for horizon in config.horizons]
    scores = [
        config.segment_length if is_long(horizon) else n for horizon, n in zip(config.horizons, slots, strict=True)
    ]
    trained = config.lora["layers"] if config.lora else config.n_layers
    scores = scores[config.n_layers - trained :]
    blocks = [5 * config.d_model + 2 * heads + config.n_heads * n + feed_forward + _extras(config) for n in scores]
    kept = trained * config.d_model + 2 * max(blocks) if recompute else sum(blocks)
    in_blocks = LIVE_BLOCKS * BLOCK if any(map(is_long, config.horizons)) else 0
    kept += config.n_heads * max(2 * max(scores), in_blocks)
    logits = 3 * config.vocab_size
    memory = 2 * config.n_kv_heads * config.head_dim * sum(slots) * itemsize if recompute else 0
    return lanes * (config.segment_length * (kept * itemsize + logits * 4) + memory)


def _extras(config: ModelConfig) -> int:
    """Return the numbers a token that a block keeps for the settings that are off by default."""
    kept = {
        "qk_norm": (config.n_heads + config.n_kv_heads) * config.head_dim,
        "value_residual": 2 * config.n_kv_heads * config.head_dim,
        "embedding_skip": config.d_model,
        "canon": config.canon_size,
    }
    return sum(numbers for name, numbers in kept.items() if getattr(config, name))


def _count_steps(config: TrainConfig, tokens_per_step: float, seconds: float) -> float:
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
