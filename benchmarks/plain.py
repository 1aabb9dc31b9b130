"""DSMR's weights in a plain full-attention transformer, as a side of comparisons.

`full_attention` is a fixed-excerpt transformer: every token sees all tokens before it in its excerpt. With caches it
decodes in the simplest way: every layer keeps everything, and each step concatenates to longer arrays.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from measuring import random_model, take
from mlx.utils import tree_flatten, tree_map

from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model.compiled import Compiled
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.device import on_gpu
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.rotary import rotate
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.optimizer import global_norm, make_optimizer

# Settings of a model that other programs have too.
PLAIN = {
    **dict.fromkeys(("qk_norm", "value_residual", "embedding_skip", "canon", "zero_init"), False),
    **{"logit_softcap": None, "tie_embeddings": True},
}
NOT_PLAIN = ("qk_norm", "value_residual", "embedding_skip", "canon")


def full_attention(model: DSMR, tokens: mx.array, caches: list[list[mx.array]] | None = None) -> mx.array:
    """Hidden states `(B, T, d_model)` of `tokens` `(B, T)`; each attends to all before it and to the caches.

    caches: per layer keys and values `(B, H_kv, N, D)`, empty lists at first; they grow by T. Raises `ValueError` for a
    model with learned positions or one of `NOT_PLAIN`.
    """
    c, (B, T) = model.config, tokens.shape
    if c.max_positions is not None:
        raise ValueError(f"max_positions = {c.max_positions}: the model must have rotary positions only")
    if others := [name for name in NOT_PLAIN if getattr(c, name)]:
        raise ValueError(f"{', '.join(others)}: the model must not have these")
    x = model.embed(tokens)
    for block, cache in zip(model.layers, caches or [[] for _ in model.layers], strict=True):
        qkv = block.attention.qkv(block.attention_norm(x)).reshape(B, T, -1, c.head_dim).swapaxes(1, 2)
        q, k, v = mx.split(qkv, [c.n_heads, c.n_heads + c.n_kv_heads], axis=1)  # (B, H, T, D) each
        position = cache[0].shape[2] if cache else 0
        q, k = rotate(q, c, position), rotate(k, c, position)
        cache[:] = [mx.concatenate(pair, axis=2) for pair in zip(cache, (k, v), strict=True)] if cache else [k, v]
        y = mx.fast.scaled_dot_product_attention(q, *cache, scale=c.head_dim**-0.5, mask="causal")
        attended = x + block.attention.out(y.swapaxes(1, 2).reshape(B, T, -1))
        x = attended + block.feed_forward(block.feed_forward_norm(x if c.parallel_residual else attended))
    return model.norm(x)


class ExcerptTraining:
    """Training on independent excerpts with full attention, with DSMR's optimizer."""

    def __init__(self, config: TrainConfig, model: DSMR) -> None:
        self.config, self.model = config, model
        self.dtype = getattr(mx, config.dtype)
        self.parameters = model.parameters()
        self.optimizer = make_optimizer(config)
        self.optimizer.init(self.parameters)
        compiled = on_gpu() if config.compile is None else config.compile
        self._update = Compiled(self._step, compiled)
        self._optimizer_state = self.optimizer.state

    def step(self, excerpts: np.ndarray) -> float:
        """Update once from `excerpts` `(B, T + 1)`. Returns the mean loss in nats."""
        inputs, targets = mx.array(excerpts[:, :-1]), mx.array(excerpts[:, 1:])
        state = (self.parameters, self._optimizer_state)
        loss, self.parameters, self._optimizer_state = self._update(*state, inputs, targets)
        mx.eval(loss, self.parameters, self._optimizer_state)
        return loss.item()

    def _step(self, parameters: Any, optimizer_state: Any, inputs: mx.array, targets: mx.array) -> tuple:
        def loss_of(parameters: Any) -> mx.array:
            self.model.update(tree_map(lambda p: p.astype(self.dtype), parameters))
            logits = self.model.logits(full_attention(self.model, inputs))
            return nn.losses.cross_entropy(logits, targets, reduction="mean")

        loss, gradients = mx.value_and_grad(loss_of)(parameters)
        norm = global_norm([g for _, g in tree_flatten(gradients)])
        scale = mx.minimum(1.0, self.config.clip_norm / (norm + 1e-6))
        self.optimizer.state = optimizer_state
        parameters = self.optimizer.apply_gradients(tree_map(lambda g: g * scale, gradients), parameters)
        return loss, parameters, self.optimizer.state


def logits_at_once(model: DSMR, ids: np.ndarray) -> np.ndarray:
    """Logits `(T, V)` after each of ids `(T,)`, in one call."""
    return np.array(model.logits(full_attention(model, mx.array(ids[None])))[0])


def logits_in_steps(model: DSMR, ids: np.ndarray, last: int) -> np.ndarray:
    """The same with caches: all but the `last` in one call, those one by one."""
    caches = [[] for _ in model.layers]
    return in_steps(lambda tokens: model.logits(full_attention(model, tokens, caches)), ids, last)


def in_steps(logits_after: Callable[[mx.array], mx.array], ids: np.ndarray, last: int) -> np.ndarray:
    """Logits `(T, V)` of a function that keeps caches: all but the `last` in one call, those one by one."""
    tokens = mx.array(ids[None])
    chunks = mx.split(tokens, list(range(len(ids) - last, len(ids))), axis=1)
    return np.concatenate([np.array(logits_after(chunk)[0]) for chunk in chunks])


def playing(config: ModelConfig, dtype: str, position: int, tokens: int) -> Callable[[], None]:
    """A turn samples some tokens with caches that grow by concatenation, from `position` on."""
    model = random_model(config, dtype)
    shape = (1, config.n_kv_heads, position, config.head_dim)
    # The content of the caches does not affect the time.
    caches = [[mx.random.normal(shape).astype(model.norm.weight.dtype) for _ in "kv"] for _ in model.layers]

    def steps() -> Iterator[mx.array]:
        token = mx.array([[0]])
        while True:
            token = mx.random.categorical(model.logits(full_attention(model, token, caches))[:, -1])[:, None]
            mx.eval(token, caches)
            yield token

    return partial(take, steps(), tokens)


def training(config: TrainConfig, corpus: str, length: int) -> Callable[[], float]:
    """A turn takes a step on as many tokens as a step of `config`, in excerpts of `length`. Returns the loss."""
    ids, lanes = Corpus.load(corpus), config.tokens_per_step // length
    mx.random.seed(config.seed)
    run = ExcerptTraining(config, DSMR(config.model_config(ids.tokenizer)))
    pieces = [ids.tokens(piece) for piece in ids.pieces("train")]
    rng = np.random.default_rng(config.seed)

    def excerpt() -> np.ndarray:
        piece = pieces[rng.integers(len(pieces))]
        start = rng.integers(len(piece) - length)
        return piece[start : start + length + 1].astype(np.int32)

    return lambda: run.step(np.stack([excerpt() for _ in range(lanes)]))
