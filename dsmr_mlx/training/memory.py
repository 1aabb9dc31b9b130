"""Estimate the memory of a run from its arrays and shapes, and find settings with which it fits.

With long memories, such as `whole`, the size of the state limits how many lanes fit; see `advise`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from dsmr_mlx.common.formatting import format_bytes
from dsmr_mlx.evaluation.losses import busy_lanes, sample_pieces
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.horizons import HorizonSchedule
from dsmr_mlx.model.memory_blocks import BLOCK, is_long
from dsmr_mlx.training.config import DTYPES, TrainConfig
from dsmr_mlx.training.distributed import Ranks
from dsmr_mlx.training.trainer import Trainer

USABLE = 0.8  # of the memory of the machine, or of its GPU
LIVE_BLOCKS = 10  # arrays as large as a block of scores of a long memory, alive at once (measured on a CPU)


@dataclass(frozen=True)
class RunMemory:
    """The bytes of the parts of a run in one process. frozen: weights that adapters are trained on; validation: the
    recurrent state of a validation, which is made beside that of training, but when there are no activations; gathered:
    the state of all lanes, which every one of several processes holds while a checkpoint is written.
    """

    frozen: int
    weights: int
    gradients: int
    optimizer: int
    state: int
    activations: int
    validation: int = 0
    gathered: int = 0

    @property
    def fixed(self) -> int:
        """The bytes that do not depend on the number of lanes."""
        return self.frozen + self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The most that is alive at once."""
        return self.fixed + self.state + max(self.activations, self.validation, self.gathered)


def estimate_memory(trainer: Trainer) -> RunMemory:
    """Return the estimate for a trainer, whose arrays need not be evaluated."""
    config, weights = trainer.config, _bytes(trainer.parameters)
    return RunMemory(
        frozen=_bytes(trainer.frozen),
        weights=weights * (2 if config.ema_decay else 1),
        gradients=weights,  # float32 too, one for each weight
        optimizer=_bytes(trainer.optimizer_state),
        state=trainer.state.nbytes,
        activations=activation_bytes(
            trainer.model_config, trainer.state.batch_size, trainer.dtype.size, config.gradient_checkpointing
        ),
        validation=validation_lanes(trainer) * lane_bytes(trainer.model_config, mx.float32.size),
        gathered=gathered_bytes(trainer.state.nbytes, trainer.ranks),
    )


def gathered_bytes(state: int, ranks: Ranks) -> int:
    """Return the bytes of the state of all lanes, given those of one process; 0 if there is only one."""
    return state * ranks.size if ranks.size > 1 else 0


def validation_lanes(trainer: Trainer) -> int:
    """Return how many lanes a validation has; 0 without validation pieces."""
    corpus, config = trainer.corpus, trainer.config
    if "validation" not in corpus.splits:
        return 0
    pieces = sample_pieces(corpus.pieces("validation"), config.eval_tokens)
    return busy_lanes([piece.length - 1 for piece in pieces], config.batch_size)


def lane_bytes(model: ModelConfig, itemsize: int) -> int:
    """Return the bytes of the recurrent state of one lane."""
    return HorizonSchedule.custom(model.horizons).state_bytes(
        model.n_kv_heads, model.head_dim, model.segment_length, 1, itemsize, model.canon_size
    )


def too_large(trainer: Trainer, resumed: bool = False) -> str | None:
    """Return a warning, with settings that would help, if a run is estimated to leave less than a fifth of the
    machine's memory free.

    resumed: propose only what a resumed run may change.
    """
    needed, memory = estimate_memory(trainer), machine_memory()
    if fits(needed.total, memory):
        return None
    found = f"this run needs about {format_bytes(needed.total)}, the machine has {format_bytes(memory)}"
    found = f"{found}, of which it may use {100 * USABLE:.0f} %"
    for settings, total in _smaller(trainer, needed, resumed):
        if fits(total, memory):
            return f"{found}; with {', '.join(settings)} it needs {format_bytes(total)}"
    return f"{found}; {'use more processes' if resumed else 'choose a smaller model or shorter memories'}"


def fits(needed: int, memory: int) -> bool:
    """Return whether `needed` bytes fit into `memory` bytes, with a share left free for what is not counted."""
    return needed <= USABLE * memory


def _smaller(trainer: Trainer, needed: RunMemory, resumed: bool) -> Iterator[tuple[list[str], int]]:
    """Yield settings that take less and less memory, and the bytes that the run then needs.

    bfloat16 is proposed only on a GPU: on a CPU without instructions for it, it is slow. A resumed run keeps its dtype
    and its lanes.
    """
    config, model, lanes = trainer.config, trainer.model_config, trainer.state.batch_size
    gpu = mx.default_device().type == mx.DeviceType.gpu
    dtype = "bfloat16" if gpu and not resumed else config.dtype
    itemsize = getattr(mx, dtype).size
    state = needed.state * itemsize // trainer.dtype.size

    def total(lanes: int, state: int, recompute: bool) -> int:
        most = config.batch_size * lanes // trainer.state.batch_size  # of all processes, one of which validates
        validation = min(needed.validation, most * lane_bytes(model, mx.float32.size))
        gathered = gathered_bytes(state, trainer.ranks)
        return needed.fixed + state + max(activation_bytes(model, lanes, itemsize, recompute), validation, gathered)

    named = [f"dtype={dtype}"] if dtype != config.dtype else []
    if named:
        yield named, total(lanes, state, config.gradient_checkpointing)
    named = [*named, *(["gradient_checkpointing=true"] if not config.gradient_checkpointing else [])]
    if named:
        yield named, total(lanes, state, True)
    if resumed:
        return
    fewer = config.batch_size
    while fewer > 1:
        fewer //= 2
        share = max(lanes * fewer // config.batch_size, 1)
        settings = [f"batch_size={fewer}", f"accumulate={config.accumulate * config.batch_size // fewer}"]
        yield [*named, *settings], total(share, state * share // lanes, True)


@dataclass(frozen=True)
class LaneAdvice:
    """The bytes that a lane needs with a dtype, and how many lanes fit into the machine."""

    dtype: str
    state_bytes: int
    activations_bytes: int
    lanes: int


def advise(config: TrainConfig, model: ModelConfig, memory: int, needed: RunMemory) -> list[LaneAdvice]:
    """Return for each dtype how many lanes fit into `memory` bytes beside weights, optimizer and validation."""
    advice, room, each = [], USABLE * memory - needed.fixed, lane_bytes(model, mx.float32.size)
    for dtype in DTYPES:
        itemsize = getattr(mx, dtype).size
        state = lane_bytes(model, itemsize)
        activations = activation_bytes(model, 1, itemsize, config.gradient_checkpointing)
        # A validation has no more lanes than the training.
        validating = max((room - needed.validation) // state, min(room // (state + each), needed.validation // each))
        lanes = max(int(min(room // (state + activations), validating)), 0)
        advice.append(LaneAdvice(dtype, state, activations, lanes))
    return advice


def machine_memory() -> int:
    """Return the memory of the machine in bytes: the most that MLX recommends on its GPU, if known, else all memory."""
    info = mx.device_info()
    names = ("max_recommended_working_set_size", "memory_size", "total_memory")  # two of Metal, one of CUDA
    known = next((info[name] for name in names if info.get(name)), None)
    return int(known or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def activation_bytes(config: ModelConfig, lanes: int, itemsize: int, recompute: bool = False) -> int:
    """Estimate the bytes that a backward pass over one segment keeps: the inputs of all products and non-linearities.

    Attention that is not fused keeps its weights, `(B, H, S, M_l + S)`, which dominate if memories are long. Their
    gradient takes twice as much, for one layer at a time. With `recompute` only the inputs of the blocks are kept, and
    the activations of one block at a time; but the recurrent state is then not updated in place. Long memories keep
    no weights, see `memory_blocks`: a few blocks of scores of one layer are alive at a time. Layers below the first
    with adapters keep nothing.
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
    """Return how many numbers per token a block keeps for optional settings."""
    kept = {
        "qk_norm": (config.n_heads + config.n_kv_heads) * config.head_dim,
        "value_residual": 2 * config.n_kv_heads * config.head_dim,
        "embedding_skip": config.d_model,
        "canon": config.canon_size,
    }
    return sum(numbers for name, numbers in kept.items() if getattr(config, name))


def _bytes(tree: object) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))
