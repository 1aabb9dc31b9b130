"""The memory and time that a run will need, estimated and measured on a few steps.

With long memories, such as `whole`, the first steps are faster than later ones, because memories are still short; the
state has its full size from the start. For these the plan also advises how many lanes fit into the machine with each
dtype. Nothing is measured if the run does not fit.
"""

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model.memory_blocks import is_long
from dsmr_mlx.training import warm_start
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.distributed import Ranks
from dsmr_mlx.training.memory import LaneAdvice, RunMemory, advise, estimate_memory, fits, machine_memory, too_large
from dsmr_mlx.training.saved_run import resume_point, saved_progress
from dsmr_mlx.training.trainer import RunProgress, Trainer

TIMED_STEPS = 3
MAC_GIGABYTES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
MAC_SHARES = (2 / 3, 3 / 4)  # of the memory that macOS lets the GPU use: up to 36 GB, and above


@dataclass(frozen=True)
class Plan:
    """The needs of a run. Bytes are per process; steps and seconds are of what is left of it, without validation.

    peak_measured: the peak memory that MLX allocated in the timed steps; None if the run does not fit into the machine:
        then nothing was measured, and times are NaN
    memory_bytes: of the machine; warning: if the run does not fit, what would help
    advice: with long memories, one for each dtype, if the run may still choose
    trained: with adapters, how many of the parameters these are
    tokens_done: trained before, of a run that is resumed
    """

    parameters: int
    trained: int
    needed: RunMemory
    peak_measured: int | None
    memory_bytes: int
    warning: str | None
    advice: list[LaneAdvice]
    tokens_per_epoch: int
    tokens_per_step: float
    steps_per_epoch: float
    tokens_done: int
    steps: float
    seconds_per_step: float

    @property
    def smallest_mac(self) -> tuple[int, int] | None:
        """The memory, in gigabytes, of the smallest Mac that the run fits into, and the bytes that its GPU may use.

        A fifth of these stay free.
        """
        needed = max(self.needed.total, self.peak_measured or 0)
        usable = {size: int(size * MAC_SHARES[size > 36] * 2**30) for size in MAC_GIGABYTES}
        return next(((size, most) for size, most in usable.items() if fits(needed, most)), None)

    @property
    def seconds(self) -> float:
        """The duration of what is left of the run."""
        return self.steps * self.seconds_per_step


def make_plan(config: TrainConfig, corpus: Corpus, latest: Path | None = None) -> Plan:
    """Measure three steps on the run's own data, after one to warm up. Writes nothing.

    latest: the newest checkpoint of a run that is resumed. Raises `UserError` for an unsuitable initial checkpoint.
    """
    if config.init is not None and latest is None:
        warm_start.check(config, corpus)
    before, memory = mx.get_active_memory(), machine_memory()
    base, quantization = warm_start.frozen_base(config, latest, Ranks())
    trainer = Trainer(config, corpus, quantization=quantization)  # not evaluated, so its arrays take no memory yet
    needed = estimate_memory(trainer)
    long = any(map(is_long, trainer.model_config.horizons))
    advice = advise(config, trainer.model_config, memory, needed) if long and latest is None else []
    measured, seconds, per_step = None, math.nan, float(trainer.config.tokens_per_step)
    if fits(needed.total, memory):
        if base:
            warm_start.load_weights(trainer, base.folder, Ranks())
        seconds, per_step = _measured(trainer)
        measured = mx.get_peak_memory() - before
    progress = RunProgress() if latest is None else progress_at_resume(config, latest)
    return Plan(
        parameters=trainer.model.n_parameters,
        trained=trainer.n_trained,
        needed=needed,
        peak_measured=measured,
        memory_bytes=memory,
        warning=too_large(trainer, resumed=latest is not None),
        advice=advice,
        tokens_per_epoch=trainer.tokens_per_epoch,
        tokens_per_step=per_step,
        steps_per_epoch=trainer.tokens_per_epoch / per_step,
        tokens_done=progress.tokens,
        steps=_count_steps(config, progress, per_step, seconds),
        seconds_per_step=seconds,
    )


def _measured(trainer: Trainer) -> tuple[float, float]:
    """Return the seconds and the tokens of a step."""
    _step(trainer)
    mx.reset_peak_memory()
    tokens = trainer.progress.tokens
    seconds = statistics.median(_timed(trainer) for _ in range(TIMED_STEPS))
    return seconds, (trainer.progress.tokens - tokens) / TIMED_STEPS


def progress_at_resume(config: TrainConfig, latest: Path) -> RunProgress:
    """Return the progress from which a run with the newest checkpoint `latest` goes on."""
    folder = resume_point(latest, config)
    return saved_progress(folder if folder.is_dir() else latest)


def _count_steps(config: TrainConfig, progress: RunProgress, tokens_per_step: float, seconds: float) -> float:
    """Return the number of steps that are left until the nearest limit."""
    left = (
        config.max_steps and config.max_steps - progress.step,
        config.max_tokens and (config.max_tokens - progress.tokens) / tokens_per_step,
        config.max_minutes and (60 * config.max_minutes - progress.seconds) / seconds,
    )
    return max(0.0, min(steps for steps in left if steps is not None))


def _step(trainer: Trainer) -> None:
    while trainer.train_segment() is None:
        pass


def _timed(trainer: Trainer) -> float:
    started = time.perf_counter()
    _step(trainer)
    return time.perf_counter() - started
