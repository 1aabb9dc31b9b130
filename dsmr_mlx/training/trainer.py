"""Training, one segment at a time: `Trainer.train_segment`. No file I/O and no printing; see `run.py` for these."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus, Piece
from dsmr_mlx.data.lanes import Batch, Lanes
from dsmr_mlx.data.training_pieces import check_training, training_ids
from dsmr_mlx.evaluation import Evaluation, evaluate
from dsmr_mlx.model.attention import as_bias, is_fused
from dsmr_mlx.model.compiled import Compiled
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.lora import split_parameters
from dsmr_mlx.model.state import RecurrentState, Window
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.distributed import Ranks
from dsmr_mlx.training.optimizer import global_norm, make_optimizer, rate_factor


class NotFinite(UserError):
    """Raised if the loss or the gradient is NaN or infinite; the weights are those before the step."""


@dataclass
class RunProgress:
    """The progress of a run. Tokens are predicted tokens; seconds are of training, without validation.

    Pending values are accumulated towards the next step: the tokens of all ranks, the other values of this rank.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0  # steps whose gradient was not finite
    segments: int = 0
    pending_tokens: int = 0
    pending_loss: float = 0.0  # a sum, in nats
    pending_seconds: float = 0.0

    def done(self, config: TrainConfig) -> float:
        """Return the fraction of a run that is done, by the limit that is nearest its end."""
        limits = {"max_steps": self.step, "max_tokens": self.tokens, "max_minutes": self.seconds / 60}
        return max(value / limit for name, value in limits.items() if (limit := getattr(config, name)) is not None)


@dataclass(frozen=True)
class StepRecord:
    """One update of the weights, as in metrics.jsonl. Loss in nats per token, memory in bytes."""

    step: int
    tokens: int
    epoch: float
    loss: float
    perplexity: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    peak_memory: int
    seconds: float


class Trainer:
    """The state of a run (weights, optimizer, gradients, lanes and their memory) and its training step.

    Weights and optimizer are float32; the network computes in `config.dtype`. With several ranks, each holds its share
    of the lanes. Raises `UserError` if the corpus has no training pieces or does not fit the configuration.

    With `config.lora_rank`, "weights" and "parameters" are those of the adapters, all others are frozen in
    `config.dtype` or as quantized; quantization: of these, as in `ModelConfig`.
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        ranks: Ranks | None = None,
        quantization: dict[str, int] | None = None,
    ):
        self.config = config = config.for_corpus(corpus)
        self.corpus = corpus
        self.ranks = ranks or Ranks()
        self.share = self.ranks.share(config.batch_size)
        self.model_config: ModelConfig = config.model_config(corpus.tokenizer, quantization)
        check_training(corpus, config.augmentation, config.fill, config.max_positions)
        self.pieces: list[Piece] = corpus.pieces("train")
        self.tokens_per_epoch = sum(piece.length - 1 for piece in self.pieces)
        set_memory_limits(config)
        mx.random.seed(config.seed)
        self.model = DSMR(self.model_config)
        self.dtype: mx.Dtype = getattr(mx, config.dtype)
        self.parameters, frozen = split_parameters(self.model, self.model_config)
        self.frozen: dict[str, Any] = cast_floats(frozen, self.dtype)
        self.average = self.parameters if config.ema_decay else None
        self.optimizer = make_optimizer(config)
        self.optimizer.init(self.parameters)
        self.optimizer_state: dict[str, Any] = self.optimizer.state
        self.gradients: dict[str, Any] | None = None  # accumulated towards the next step
        shown, sizes = corpus.tokenizer.shown_mask, (len(self.pieces), config.batch_size, config.segment_length)
        self.lanes = Lanes(self._load, *sizes, seed=config.seed, shown=shown)
        self.state = self._new_state()
        self.progress = RunProgress()
        self._evaluated = False  # whether the model holds weights for evaluation
        compiled = mx.default_device().type == mx.DeviceType.gpu if config.compile is None else config.compile
        self._accumulate = Compiled(self._accumulate_segment, compiled, lazy=True)
        self._update = Compiled(self._update_weights, compiled, lazy=True)

    def start_from(self, weights: dict[str, mx.array]) -> None:
        """Replace the random initial weights by those of a model of the same architecture, as float32.

        With adapters, which keep their initial values, the frozen weights are replaced, as `config.dtype`.
        """
        if self.frozen:
            self.frozen = loaded_tree(self.frozen, weights)
            return
        arrays = {name: array.astype(mx.float32) for name, array in weights.items()}
        self.parameters = fill_tree(self.parameters, arrays)
        self.average = self.parameters if self.config.ema_decay else None
        mx.eval(self.parameters)

    @property
    def n_trained(self) -> int:
        """The number of parameters that are trained."""
        return sum(p.size for _, p in tree_flatten(self.parameters))

    def _new_state(self) -> RecurrentState:
        return self.model.new_state(self.share.stop - self.share.start, self.dtype)

    def _load(self, epoch: int, index: int) -> np.ndarray:
        c, ids = self.config, self.corpus.tokens(self.pieces[index])
        return training_ids(self.corpus.tokenizer, ids, c.augmentation, c.fill, c.seed, epoch, index)

    @property
    def done(self) -> float:
        """The fraction of the run that is done, see `RunProgress.done`."""
        return self.progress.done(self.config)

    def train_segment(self) -> StepRecord | None:
        """Train on the next segment of every lane. Return a record if this completes a step, else None.

        Raises `NotFinite`, with the weights unchanged, for a gradient that is not finite; `skip_step` then drops it.
        """
        started = time.perf_counter()
        self._release_evaluated()
        batch = next(self.lanes)
        try:
            loss = self._add_gradients(batch)
        except BaseException:
            self.state = self._new_state()  # the lanes have moved on without it
            raise
        # The old memory is no longer referenced, so that the new one is written in place.
        mx.async_eval(loss, self.gradients, self.state.arrays)
        p = self.progress
        p.pending_loss += loss.item()
        p.pending_tokens += batch.n_tokens
        p.segments += 1
        p.pending_seconds += time.perf_counter() - started
        # A step needs a target: segments in which everything is shown add none.
        return self._take_step() if p.segments >= self.config.accumulate and p.pending_tokens else None

    def _add_gradients(self, batch: Batch) -> mx.array:
        """Add the gradients of this rank's share of a segment to the accumulated ones. Return the summed loss, ().

        Nothing is evaluated yet.
        """
        mine = self.share
        fresh = [lane - mine.start for lane in batch.fresh if mine.start <= lane < mine.stop]
        state = self.state.copy().reset(fresh).opened()
        window = state.window(self.config.segment_length, batch.counts[mine])
        arrays = [mx.array(a[mine]) for a in (batch.inputs, batch.targets, batch.weights)]
        weights = (self.frozen, self.parameters, self.gradients)
        place = (window.offset, window.masks, window.views, window.known)
        inputs = (*weights, *arrays, state.layers, *place, self._dropout_keys())
        loss, self.gradients, layers = self._accumulate(*inputs)
        self.state = state.advanced(layers, self.config.segment_length)
        return loss

    def _dropout_keys(self) -> mx.array | None:
        """Return the `(B, 2)` random keys of this rank's lanes, a pure function of (seed, step, segment, lane)."""
        if not self.config.dropout and not self.config.lora_dropout:
            return None
        place = (self.progress.step + self.progress.skipped, self.progress.segments)
        lanes = range(self.share.start, self.share.stop)
        sequences = (np.random.SeedSequence(self.config.seed, spawn_key=(*place, lane)) for lane in lanes)
        return mx.array(np.stack([sequence.generate_state(2) for sequence in sequences]))

    def _accumulate_segment(
        self, frozen, parameters, gradients, inputs, targets, weights, layers, offset, masks, views, known, keys
    ):
        """The compiled part of `_add_gradients`; inputs, targets and weights are `(B, S)`."""
        S, biases = inputs.shape[1], None
        if not is_fused(self.dtype, S, self.model_config.head_dim):
            biases = {horizon: as_bias(mask, S, horizon + S, self.dtype) for horizon, mask in masks.items()}

        def loss_of(parameters, layers):
            self.model.update(frozen)
            self.model.update(cast_floats(parameters, self.dtype))
            window = Window(0, offset, masks, known, biases, views)
            hidden, layers = self.model.forward(inputs, layers, window, keys, self.config.gradient_checkpointing)
            nats = nn.losses.cross_entropy(self.model.logits(hidden), targets)  # (B, S)
            return (nats * weights).sum(), layers

        (loss, layers), new = mx.value_and_grad(loss_of)(parameters, layers)
        if gradients is None:  # contiguous, as if loaded from a checkpoint, so that sums round the same way
            return loss, tree_map(mx.contiguous, new), layers
        return loss, tree_map(mx.add, gradients, new), layers

    def _take_step(self) -> StepRecord:
        """Update the weights from the accumulated gradients of all ranks."""
        started = time.perf_counter()
        p, c = self.progress, self.config
        rate_scale = rate_factor(c, p.step, self.done)
        gradients = self.ranks.sum(self.gradients)
        norm = (global_norm([g for _, g in tree_flatten(gradients)]) / p.pending_tokens).item()
        (total_loss,) = self.ranks.total([p.pending_loss])
        loss = total_loss / p.pending_tokens
        if not np.isfinite(norm) or not np.isfinite(loss):
            raise NotFinite(f"step {p.step + 1}: loss {loss}, gradient norm {norm}: expected finite numbers")
        scale = min(1.0, c.clip_norm / (norm + 1e-6)) / p.pending_tokens
        decay = min(c.ema_decay, (1 + p.step) / (10 + p.step))
        factors = [mx.array(factor, mx.float32) for factor in (scale, rate_scale, decay)]
        updated = self._update(self.parameters, self.average, self.optimizer_state, gradients, *factors)
        self.parameters, self.average, self.optimizer_state = updated
        self.gradients = None
        mx.async_eval(updated)
        tokens = p.pending_tokens
        mine = p.pending_seconds + time.perf_counter() - started
        (elapsed,) = self.ranks.total([mine if self.ranks.is_main else 0.0])  # one clock for all
        p.step, p.tokens, p.seconds = p.step + 1, p.tokens + tokens, p.seconds + elapsed
        self._clear_pending()
        return StepRecord(
            step=p.step,
            tokens=p.tokens,
            epoch=p.tokens / self.tokens_per_epoch,
            loss=loss,
            perplexity=float(np.exp(min(loss, 700.0))),
            learning_rate=rate_scale * c.learning_rate,
            gradient_norm=norm,
            tokens_per_second=tokens / elapsed,
            peak_memory=mx.get_peak_memory(),
            seconds=p.seconds,
        )

    def _update_weights(self, parameters, average, optimizer_state, gradients, scale, rate_scale, decay):
        """The compiled part of `_take_step`."""
        self.optimizer.state = optimizer_state
        self.optimizer.scale_rates(rate_scale)
        scaled = tree_map(lambda g: g * scale, gradients)
        updated = self.optimizer.apply_gradients(scaled, parameters)
        # Keep the order of the tree, which the gradients follow: sums over them then round the same way, and MLX
        # evaluates them in an order in which recomputed activations are not all alive at once.
        parameters = tree_map(lambda _, new: new, parameters, updated)
        if average is not None:
            average = tree_map(lambda a, p: a + (1 - decay) * (p - a), average, parameters)
        return parameters, average, self.optimizer.state

    def _clear_pending(self) -> None:
        p = self.progress
        p.segments, p.pending_tokens, p.pending_loss, p.pending_seconds = 0, 0, 0.0, 0.0

    def skip_step(self) -> None:
        """Continue after `NotFinite`: drop the gradients and the memory of all lanes, which may not be finite."""
        self.gradients = None
        self.state = self._new_state()
        self._clear_pending()
        self.progress.skipped += 1

    def diagnosis(self) -> dict[str, Any]:
        """Return, after `NotFinite`, the position of every lane and the arrays that are not finite, as JSON values."""

        def bad(tree: Any) -> list[str]:
            return [name for name, array in tree_flatten(tree) if not mx.isfinite(array).all().item()]

        reading = [
            lane and {"source": self.pieces[lane.piece].source, "draw": lane.draw, "read_up_to": lane.offset}
            for lane in self.lanes.lanes
        ]
        return {
            "progress": asdict(self.progress),
            "lanes": reading,
            "gradients_not_finite": bad(self.gradients or {}),
            "weights_not_finite": bad(self.parameters),
            "memory_not_finite": bad(self.state.to_arrays()),
        }

    @property
    def generation_weights(self) -> dict[str, Any]:
        """The weights that are evaluated and saved as the model: the average if there is one."""
        return self.parameters if self.average is None else self.average

    def evaluation_model(self) -> DSMR:
        """Return the model with the generation weights, until the next segment."""
        self._evaluated = True
        if self.frozen:
            self.model.update(self.frozen)
            self.model.update(cast_floats(self.generation_weights, self.dtype))
        else:
            self.model.update(self.generation_weights)
        return self.model

    def _release_evaluated(self) -> None:
        """Drop the model's references to evaluated weights. A compiled step would not replace them, so that they would
        stay in memory beside the newer ones.
        """
        if self._evaluated:
            self.model.update(
                tree_map(lambda a: mx.broadcast_to(mx.array(0, a.dtype), a.shape), self.model.parameters())
            )
            self._evaluated = False

    def validate(self, on_progress: Callable[[int, int], None] | None = None) -> Evaluation:
        """Evaluate whole pieces of the validation split, up to about `eval_tokens` tokens."""
        return evaluate(
            self.evaluation_model(),
            self.corpus,
            "validation",
            batch_size=self.config.batch_size,
            max_tokens=self.config.eval_tokens,
            progress=on_progress,
        )

    def state_dict(self) -> tuple[dict[str, mx.array], dict[str, mx.array], dict[str, Any]]:
        """Return what an exact resume needs besides the generation weights: arrays, those of the memory, JSON values.

        All ranks must call it together; the result does not depend on their number.
        """
        arrays = {f"optimizer.{k}": v for k, v in tree_flatten(self.optimizer_state)}
        if self.average is not None:
            arrays |= {f"weights.{k}": v for k, v in tree_flatten(self.parameters)}
        progress = asdict(self.progress)
        if self.progress.segments:
            arrays |= {f"gradients.{k}": v for k, v in tree_flatten(self.ranks.sum(self.gradients))}
            (progress["pending_loss"],) = self.ranks.total([self.progress.pending_loss])
        layers = tree_map(self.ranks.gather, self.state.layers)
        starts, rebased = (np.array(self.ranks.gather(mx.array(a))) for a in (self.state.starts, self.state.rebased))
        state = RecurrentState(self.model_config, layers, self.state.steps, starts, rebased)
        memory = state.to_arrays()
        mx.eval(arrays, memory)
        return arrays, memory, {"progress": progress, "lanes": self.lanes.cursor()}

    def load_state_dict(
        self,
        weights: dict[str, mx.array],
        arrays: dict[str, mx.array],
        memory: dict[str, mx.array],
        values: dict[str, Any],
    ) -> None:
        """Restore the state from a checkpoint's weights and `state_dict`; without memory, all lanes begin empty."""
        raw = under("weights.", arrays)
        self.parameters = fill_tree(self.parameters, raw or weights)
        self.average = fill_tree(self.parameters, weights) if self.config.ema_decay else None
        self.optimizer_state = fill_tree(self.optimizer_state, under("optimizer.", arrays))
        self.progress, self.gradients = RunProgress(**values["progress"]), None
        if self.progress.segments:
            self.gradients = fill_tree(self.parameters, under("gradients.", arrays))
            if not self.ranks.is_main:  # the pending values are sums over ranks: only rank 0 takes them
                self.gradients, self.progress.pending_loss = tree_map(mx.zeros_like, self.gradients), 0.0
        self.state = self._new_state()
        if memory:
            state = RecurrentState.from_arrays(self.model_config, memory)
            if state.batch_size != self.config.batch_size:
                raise UserError(f"checkpoint: memory of {state.batch_size} lanes, expected {self.config.batch_size}")
            self.state = state.take(range(state.batch_size)[self.share])
        self.lanes.seek(values["lanes"])


def set_memory_limits(config: TrainConfig) -> None:
    """Set MLX's memory limits to those of the configuration; a limit that is None stays MLX's default.

    Raises `UserError` for more wired memory than the GPU may use.
    """
    for megabytes, set_limit in (
        (config.cache_limit_mb, mx.set_cache_limit),
        (config.memory_limit_mb, mx.set_memory_limit),
        (config.wired_limit_mb, mx.set_wired_limit),
    ):
        if megabytes is not None:
            try:
                set_limit(megabytes << 20)
            except ValueError as error:
                most = mx.device_info(mx.gpu).get("max_recommended_working_set_size", 0) >> 20
                raise UserError(f"`wired_limit_mb` {megabytes}: expected at most {most} ({error})") from None


def cast_floats(tree: Any, dtype: mx.Dtype) -> Any:
    """Return a tree with all floats as `dtype`; packed quantized weights stay as they are."""
    return tree_map(lambda p: p.astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p, tree)


def loaded_tree(tree: Any, arrays: dict[str, mx.array]) -> Any:
    """Return a tree of the named arrays with the types of `tree`.

    Each is evaluated by itself and removed from `arrays`, so that lazily loaded ones need memory only once.
    """
    leaves = []
    for name, old in tree_flatten(tree):
        leaves.append((name, arrays.pop(name).astype(old.dtype)))
        mx.eval(leaves[-1][1])
    return tree_unflatten(leaves)


def under(prefix: str, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return the arrays with a name prefix, without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def fill_tree(tree: Any, arrays: dict[str, mx.array]) -> Any:
    """Return a tree of the named arrays in the order of `tree`, so that sums over it round the same way.

    Raises `UserError` if an array is missing or has another shape or type.
    """
    leaves = []
    for name, old in tree_flatten(tree):
        if name not in arrays:
            raise UserError(f"checkpoint: {name} is missing")
        if arrays[name].shape != old.shape:
            raise UserError(f"checkpoint: {name} has shape {arrays[name].shape}, expected {old.shape}")
        if arrays[name].dtype != old.dtype:
            raise UserError(f"checkpoint: {name} is {arrays[name].dtype}, expected {old.dtype}")
        leaves.append((name, arrays[name]))
    return tree_unflatten(leaves)
