"""Training, one segment at a time. No files and no printing: `train.py` has the run around it."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from dsmr_mlx.config import ModelConfig
from dsmr_mlx.corpus import Corpus, Piece
from dsmr_mlx.errors import UserError
from dsmr_mlx.evaluation import Evaluation, evaluate
from dsmr_mlx.model import DSMR
from dsmr_mlx.optim import global_norm, learning_rate, make_optimizer
from dsmr_mlx.state import RecurrentState, Window
from dsmr_mlx.streaming import Batch, Lanes
from dsmr_mlx.train_config import TrainConfig


class NotFinite(UserError):
    """The loss or the gradient is NaN or infinite; the weights are those before the step."""


@dataclass
class Progress:
    """What a run has done so far. Tokens are predicted tokens; seconds are of training alone."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    segments: int = 0  # accumulated towards the next step
    pending_tokens: int = 0  # in those segments
    pending_loss: float = 0.0  # summed over them, in nats


@dataclass(frozen=True)
class StepRecord:
    """One update of the weights, as it stands in metrics.jsonl."""

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
    """The state of a run (weights, optimizer, gradients, lanes and their memory) and how one segment changes it.

    The weights and the optimizer are float32; `config.dtype` is what the network computes in. Raises
    `UserError` if the corpus has no training pieces.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus):
        self.config = config
        self.corpus = corpus
        self.model_config: ModelConfig = config.model_config(corpus.vocab_size)
        self.pieces: list[Piece] = corpus.pieces("train")
        self.tokens_per_epoch = sum(piece.length - 1 for piece in self.pieces)
        mx.random.seed(config.seed)
        self.model = DSMR(self.model_config)
        self.parameters: dict[str, Any] = without_empty(self.model.parameters())
        self.optimizer = make_optimizer(config)
        self.optimizer.init(self.parameters)
        self.optimizer_state: dict[str, Any] = self.optimizer.state
        self.gradients = zeros_like(self.parameters)
        self.lanes = Lanes(self._load, len(self.pieces), config.batch_size, config.segment_length, seed=config.seed)
        self.dtype: mx.Dtype = getattr(mx, config.dtype)
        self.memory: RecurrentState = self.model.new_state(config.batch_size, self.dtype)
        self.progress = Progress()
        self._compile()

    def _compile(self) -> None:
        compiled = self.config.compile
        if compiled is None:
            compiled = mx.default_device().type == mx.DeviceType.gpu
        compiler = mx.compile if compiled else lambda function, **_: function
        dropout = [mx.random.state] if self.config.dropout else []
        self._accumulate = compiler(self._accumulate_segment, inputs=dropout, outputs=dropout)
        self._update = compiler(self._update_weights)

    def _load(self, epoch: int, index: int) -> np.ndarray:
        piece = self.pieces[index]
        ids = self.corpus.tokens(piece)
        if ids.max() >= self.model_config.vocab_size:
            raise UserError(
                f"{self.corpus.path}: {piece.source} has the id {ids.max()}, "
                f"expected ids below {self.model_config.vocab_size}"
            )
        return ids

    @property
    def done(self) -> float:
        """The fraction of the run that is done, by whichever limit is nearest."""
        c, p = self.config, self.progress
        limits = [(p.step, c.max_steps), (p.tokens, c.max_tokens), (p.seconds / 60, c.max_minutes)]
        return max(value / limit for value, limit in limits if limit is not None)

    def train_segment(self) -> StepRecord | None:
        """Learn from the next segment of every lane; a record when this completes a step, else None.

        Raises `NotFinite` instead of changing the weights by a gradient that is not finite.
        """
        started = time.perf_counter()
        batch = next(self.lanes)
        loss = self._gradients(batch)
        p = self.progress
        mx.eval(loss, self.gradients, self.memory.arrays)
        p.pending_loss += loss.item()
        p.pending_tokens += batch.n_tokens
        p.segments += 1
        record = self._step(started) if p.segments == self.config.accumulate else None
        p.seconds += time.perf_counter() - started
        return record

    def _gradients(self, batch: Batch) -> mx.array:
        """Add a segment's gradients to the accumulated ones; the segment's loss, summed, not yet evaluated."""
        self.memory = self.memory.reset(batch.fresh).opened()
        window = self.memory.window(self.config.segment_length)
        arrays = [mx.array(a) for a in (batch.inputs, batch.targets, batch.weights)]
        loss, self.gradients, layers = self._accumulate(
            self.parameters, self.gradients, *arrays, self.memory.layers, window.offset, window.masks
        )
        self.memory = self.memory.advanced(layers, self.config.segment_length)
        return loss

    def _accumulate_segment(self, parameters, gradients, inputs, targets, weights, layers, offset, masks):
        def loss_of(parameters, layers):
            self.model.update(tree_map(lambda p: p.astype(self.dtype), parameters))
            hidden, layers = self.model.forward(inputs, layers, Window(0, offset, masks))
            nats = nn.losses.cross_entropy(self.model.logits(hidden), targets)  # (B, S)
            return (nats * weights).sum(), layers

        (loss, layers), new = mx.value_and_grad(loss_of)(parameters, layers)
        return loss, tree_map(mx.add, gradients, new), layers

    def _step(self, started: float) -> StepRecord:
        p, c = self.progress, self.config
        rate = learning_rate(c, p.step, self.done)
        gradients = [g for _, g in tree_flatten(self.gradients)]
        norm = (global_norm(gradients) / p.pending_tokens).item()
        loss = p.pending_loss / p.pending_tokens
        if not np.isfinite(norm) or not np.isfinite(loss):
            raise NotFinite(f"step {p.step + 1}: loss {loss}, gradient norm {norm}: expected finite numbers")
        scale = min(1.0, c.clip_norm / (norm + 1e-6)) / p.pending_tokens
        self.parameters, self.optimizer_state, self.gradients = self._update(
            self.parameters, self.optimizer_state, self.gradients, mx.array(scale), mx.array(rate)
        )
        mx.eval(self.parameters, self.optimizer_state, self.gradients)
        tokens = p.pending_tokens
        p.step, p.tokens = p.step + 1, p.tokens + tokens
        p.segments, p.pending_tokens, p.pending_loss = 0, 0, 0.0
        elapsed = time.perf_counter() - started
        return StepRecord(
            step=p.step,
            tokens=p.tokens,
            epoch=p.tokens / self.tokens_per_epoch,
            loss=loss,
            perplexity=float(np.exp(min(loss, 700.0))),
            learning_rate=rate,
            gradient_norm=norm,
            tokens_per_second=tokens / self.config.accumulate / elapsed,
            peak_memory=mx.get_peak_memory(),
            seconds=p.seconds + elapsed,
        )

    def _update_weights(self, parameters, optimizer_state, gradients, scale, rate):
        self.optimizer.state = optimizer_state
        self.optimizer.learning_rate = rate
        scaled = tree_map(lambda g: g * scale, gradients)
        parameters = self.optimizer.apply_gradients(scaled, parameters)
        return parameters, self.optimizer.state, zeros_like(gradients)

    def evaluation_model(self) -> DSMR:
        """The model with the current weights, in evaluation mode; the next segment changes it back."""
        self.model.update(self.parameters)
        return self.model.eval()

    def validate(self, on_progress: Callable[[int, int], None] | None = None) -> Evaluation:
        """Loss over whole pieces of the validation split, at most about `eval_tokens` of them."""
        evaluation = evaluate(
            self.evaluation_model(),
            self.corpus,
            "validation",
            batch_size=self.config.batch_size,
            max_tokens=self.config.eval_tokens,
            progress=on_progress,
        )
        self.model.train()
        return evaluation

    def state_dict(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """Everything but the weights that a run needs to go on exactly here: arrays, and JSON values."""
        arrays = {f"optimizer.{k}": v for k, v in tree_flatten(self.optimizer_state)}
        if self.progress.segments:
            arrays |= {f"gradients.{k}": v for k, v in tree_flatten(self.gradients)}
        arrays |= {f"memory.{k}": v for k, v in self.memory.to_arrays().items()}
        arrays["random"] = mx.random.state[0]
        return arrays, {"progress": asdict(self.progress), "lanes": self.lanes.cursor()}

    def load_state_dict(
        self, weights: dict[str, mx.array], arrays: dict[str, mx.array], values: dict[str, Any]
    ) -> None:
        """Go to the place that a checkpoint's weights and `state_dict` describe."""
        self.parameters = filled(self.parameters, weights)
        self.optimizer_state = filled(self.optimizer_state, under("optimizer.", arrays))
        self.progress = Progress(**values["progress"])
        if self.progress.segments:
            self.gradients = filled(self.gradients, under("gradients.", arrays))
        memory = under("memory.", arrays)
        self.memory = RecurrentState.from_arrays(self.model_config, memory)
        self.lanes.seek(values["lanes"])
        high, low = arrays["random"].tolist()
        mx.random.seed((high << 32) | low)


zeros_like = partial(tree_map, mx.zeros_like)


def without_empty(tree: Any) -> Any:
    """A tree without branches that hold no array (modules that have no parameters)."""
    return tree_unflatten(tree_flatten(tree))


def under(prefix: str, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def filled(tree: Any, arrays: dict[str, mx.array]) -> Any:
    """A tree with the named arrays, in the order of the tree given: sums over it round the same way again.

    Raises `UserError` for an array that is missing or has another shape.
    """
    leaves = []
    for name, old in tree_flatten(tree):
        if name not in arrays:
            raise UserError(f"checkpoint: {name} is missing")
        if arrays[name].shape != old.shape:
            raise UserError(f"checkpoint: {name} has shape {arrays[name].shape}, expected {old.shape}")
        leaves.append((name, arrays[name]))
    return tree_unflatten(leaves)
