"""The parts of a step, each timed alone at the shapes of the step.

The time of a kernel is that of its evaluation, without building the graph in Python, which is a part of its own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from roofline_counts import NOTHING, Count, decode_counts, train_counts, weights_of

from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.model.attention import as_bias, is_fused, segment_attention
from dsmr_mlx.model.rotary import Angles, rotate
from dsmr_mlx.model.state import RecurrentState
from dsmr_mlx.training.optimizer import global_norm
from dsmr_mlx.training.trainer import Trainer

WAITS = 3  # times the host waits for the device in a training step: full segments, loss, norm


@dataclass(frozen=True)
class Part:
    """A part of a step: its count, and work that together takes as long as it.

    works: (a function that returns seconds, how often a step does it); a negative number subtracts its time.
    """

    name: str
    count: Count
    works: list[tuple[Callable[[], float], int]]


def calling(function: Callable[[], object]) -> Callable[[], float]:
    """Time a call."""

    def timed() -> float:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    return timed


def evaluating(build: Callable[[], object]) -> Callable[[], float]:
    """Time the evaluation of what `build` returns."""

    def timed() -> float:
        arrays = build()
        started = time.perf_counter()
        mx.eval(arrays)
        return time.perf_counter() - started

    return timed


def with_gradients(function: Callable, *inputs: mx.array) -> Callable[[], float]:
    """Time a function of arrays and its gradients along ones."""
    direction = mx.ones_like(function(*inputs))
    mx.eval(inputs, direction)
    return evaluating(lambda: mx.vjp(function, list(inputs), [direction]))


def train_parts(trainer: Trainer) -> list[Part]:
    """The parts of a training step: products, attention, elementwise work, loss, memory, optimizer, host."""
    c, B, dtype = trainer.model_config, trainer.state.batch_size, trainer.dtype
    counts = train_counts(c, B, dtype.size)
    S = c.segment_length

    def random(*shape: int) -> mx.array:
        return mx.random.normal(shape).astype(dtype)

    parts = []
    for name, (rows, columns, n) in weights_of(c).items():
        work = with_gradients(lambda x, w: x @ w.T, random(B * S, rows), random(columns, rows))
        parts.append(Part(name, counts[name], [(work, n)]))
    products, passes = attention_works(c, B, dtype)
    parts.append(Part("attention products", counts["attention products"], products))
    softmax = Part("softmax and masks", counts["softmax and masks"], passes)
    parts += [softmax, Part("elementwise", counts["elementwise"], elementwise_works(c, B, random))]
    logits, targets = mx.random.normal((B, S, c.vocab_size)), mx.zeros((B, S), mx.int32)
    loss = with_gradients(lambda x: nn.losses.cross_entropy(x, targets), logits)
    parts.append(Part("loss", Count(0, 4 * logits.nbytes), [(loss, 1)]))
    return [*parts, *step_parts(trainer, counts)]


def attention_works(c, B: int, dtype: mx.Dtype) -> tuple[list, list]:
    """The products of attention and its gradient alone; all of attention minus the products.

    If MLX has one fused kernel, it counts as the products, and nothing is left.
    """
    S, products, passes = c.segment_length, [], []
    fused = is_fused(dtype, S, c.head_dim)
    for M in sorted(set(c.horizons)):
        layers, groups = c.horizons.count(M), c.n_heads // c.n_kv_heads
        q = mx.random.normal((B, c.n_heads, S, c.head_dim)).astype(dtype)
        keys = mx.random.normal((B, c.n_kv_heads, M + S, c.head_dim)).astype(dtype)
        new, scores = keys[:, :, -S:], mx.random.normal((B, c.n_kv_heads, groups * S, M + S)).astype(dtype)
        rows = q.reshape(B, c.n_kv_heads, -1, c.head_dim)
        mx.eval(q, keys, scores, rows)

        def alone(rows=rows, keys=keys, scores=scores):
            """Scores and output, and the gradients of both; those of the new keys and values."""
            over_all = [rows @ keys.swapaxes(-1, -2) for _ in range(2)] + [scores @ keys for _ in range(2)]
            return over_all, [scores[..., -S:].swapaxes(-1, -2) @ rows for _ in range(2)]

        if fused:

            def attend(q, k, v, keys=keys):
                return mx.fast.scaled_dot_product_attention(q, keys, keys, scale=c.head_dim**-0.5, mask="causal")
        else:
            bias = as_bias("causal", S, M + S, dtype)

            def attend(q, k, v, keys=keys, bias=bias):
                return segment_attention(q, k, v, keys, keys, bias)

        whole = with_gradients(attend, q, mx.contiguous(new), mx.contiguous(new))
        alone = evaluating(alone)
        products.append((whole if fused else alone, layers))
        if not fused:
            passes += [(whole, layers), (alone, -layers)]
    return products, passes


def elementwise_works(c, B: int, random: Callable) -> list:
    """Norms, rotary positions, activations and residual sums of a step."""
    S, d = c.segment_length, c.d_model
    norm = mx.fast.rms_norm if c.norm == "rms" else lambda x, w, eps: mx.fast.layer_norm(x, w, None, eps)
    x, weight = random(B, S, d), mx.ones((d,), random(1).dtype)
    heads = random(B, c.n_heads + c.n_kv_heads, S, c.head_dim)
    gate, up = random(B, S, c.d_ff), random(B, S, c.d_ff)
    offset = mx.zeros((B,), mx.int32)
    angles = Angles.of(c, offset, S)
    activate = (lambda g, u: nn.silu(g) * u) if c.gated else (lambda g, u: nn.silu(g))
    return [
        (with_gradients(lambda x, w: norm(x, w, c.norm_eps), x, weight), 2 * c.n_layers + 1),
        (with_gradients(lambda h: rotate(h, c, offset, angles), heads), c.n_layers),
        (with_gradients(activate, gate, up), c.n_layers),
        (evaluating(lambda: [x + x, x + x]), 2 * c.n_layers),  # and the sum of the two gradients in the backward pass
    ]


def step_parts(trainer: Trainer, counts: dict[str, Count]) -> list[Part]:
    """What surrounds the network: memory, optimizer, input, Python graphs, waiting."""
    c, memory = trainer.model_config, FullMemory(trainer)
    gradients = tree_map(mx.zeros_like, trainer.parameters)
    factors = [mx.array(1.0)] * 3
    mx.eval(gradients, factors)

    def update() -> object:
        return trainer._update(trainer.parameters, trainer.average, trainer.optimizer_state, gradients, *factors)

    def norm() -> mx.array:
        return global_norm([g for _, g in tree_flatten(gradients)])

    def graph() -> None:
        """Build the graph of a segment and drop it."""
        state = RecurrentState.empty(c, trainer.state.batch_size, trainer.dtype)
        kept, trainer.state, old = trainer.state, state, trainer.gradients
        trainer._add_gradients(batch)
        trainer.state, trainer.gradients = kept, old

    batch = next(trainer.lanes)
    batch.fresh.clear()
    return [
        Part("memory", counts["memory"], [(calling(memory.turn), 1)]),
        Part("optimizer", counts["optimizer"], [(evaluating(update), 1), (evaluating(norm), 1)]),
        Part("input", NOTHING, [(calling(lambda: next(trainer.lanes)), 1)]),
        Part("graphs in Python", NOTHING, [(calling(work), 1) for work in (graph, update, norm)]),
        Part("waiting", NOTHING, [(evaluating(lambda: mx.array(0) + 1), WAITS)]),
    ]


class FullMemory:
    """A state whose segment is full again and again."""

    def __init__(self, trainer: Trainer):
        c = trainer.model_config
        self.state = RecurrentState.empty(c, trainer.state.batch_size, trainer.dtype)
        shape = (trainer.state.batch_size, c.n_kv_heads, c.segment_length, c.head_dim)
        self.new = mx.zeros(shape, trainer.dtype)
        mx.eval(self.state.arrays, self.new)

    def turn(self) -> None:
        """Write new keys and values in every layer, and move the full segment into the rings."""
        state, self.state = self.state, None
        layers = [
            layer
            | {name: mx.slice_update(layer[name], self.new, mx.array([M]), axes=(2,)) for name in ("keys", "values")}
            for layer, M in zip(state.layers, state.config.horizons, strict=True)
        ]
        state = state.advanced(layers, state.config.segment_length)
        layers = None
        mx.eval(state.arrays)
        self.state = state.opened()
        del state
        mx.eval(self.state.arrays)


def decode_parts(player: Player) -> list[Part]:
    """The parts of a token: products, attention, memory, elementwise work, sampling, host."""
    model, n, itemsize = player.model, player.lanes, player.state.dtype.size
    c = model.config
    x = mx.random.normal((n, 1, c.d_model)).astype(player.state.dtype)
    wide = mx.random.normal((n, 1, c.n_heads * c.head_dim)).astype(x.dtype)
    inner = mx.random.normal((n, 1, c.d_ff)).astype(x.dtype)
    q = mx.random.normal((n, c.n_heads, 1, c.head_dim)).astype(x.dtype)
    mx.eval(x, wide, inner, q)
    blocks = model.layers
    ups = [partial(b.feed_forward._gate_and_up, keys=None) if c.gated else b.feed_forward.up for b in blocks]
    products = [
        lambda: [b.attention.qkv(x) for b in blocks],
        lambda: [b.attention.out(wide) for b in blocks],
        lambda: [up(x) for up in ups],
        lambda: [b.feed_forward.down(inner) for b in blocks],
        lambda: model.logits(x),
    ]
    head = model.embed if c.tie_embeddings else model.head
    ff = "gate_up" if c.gated else "up"
    stored = [
        sum(stored_bytes(b.attention.qkv) for b in blocks),
        sum(stored_bytes(b.attention.out) for b in blocks),
        sum(stored_bytes(b.feed_forward[ff]) for b in blocks),
        sum(stored_bytes(b.feed_forward.down) for b in blocks),
        stored_bytes(head),
    ]
    counts = decode_counts(c, n, stored, itemsize)
    parts = [
        Part(name, counts[name], [(evaluating(work), 1)]) for name, work in zip(weights_of(c), products, strict=True)
    ]
    return [*parts, *decode_rest(player, counts, x, q)]


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(array.nbytes for array in module.parameters().values())


def decode_rest(player: Player, counts: dict[str, Count], x: mx.array, q: mx.array) -> list[Part]:
    """The parts of a token besides the products."""
    model, state = player.model, player.state.copy()
    c, slot = model.config, mx.array(0)
    window = state.segment().window(slot)
    slots = [[mx.array(layer[name]) for name in ("keys", "values")] for layer in state.layers]
    mx.eval(slots, window.masks)
    new = mx.zeros((player.lanes, c.n_kv_heads, 1, c.head_dim), x.dtype)
    rotated = mx.zeros((player.lanes, c.n_heads + c.n_kv_heads, 1, c.head_dim), x.dtype)
    bounds = player.bounds(Limits(), player.decode_state.music)

    def attend() -> list[mx.array]:
        return [
            mx.fast.scaled_dot_product_attention(q, *layer, scale=c.head_dim**-0.5, mask=window.masks[M])
            for layer, M in zip(slots, c.horizons, strict=True)
        ]

    def write() -> list[list[mx.array]]:
        for layer, M in zip(slots, c.horizons, strict=True):
            layer[:] = [mx.slice_update(a, new, mx.array([M]), axes=(2,)) for a in layer]
        return slots

    def elementwise() -> list:
        gate, angles = mx.ones((player.lanes, 1, c.d_ff), x.dtype), Angles.of(c, window.offset, 1)
        work = [[b.attention_norm(x), b.feed_forward_norm(x), x + x, x + x] for b in model.layers]
        others = [[nn.silu(gate) * gate, rotate(rotated, c, window.offset, angles)] for _ in model.layers]
        return [work, others, model.norm(x)]

    def draw() -> object:
        return player._draw(bounds)

    def graph() -> None:
        player._step(draw()[0], state.layers, slot, state.segment())

    return [
        Part("attention", counts["attention"], [(evaluating(attend), 1)]),
        Part("memory", counts["memory"], [(evaluating(write), 1)]),
        Part("elementwise", NOTHING, [(evaluating(elementwise), 1)]),
        Part("grammar and sampling", NOTHING, [(evaluating(draw), 1)]),
        Part("graphs in Python", NOTHING, [(calling(graph), 1)]),
        Part("waiting", NOTHING, [(evaluating(lambda: mx.array(0) + 1), 1)]),
    ]
