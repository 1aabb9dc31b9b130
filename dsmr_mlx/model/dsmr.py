"""DSMR: a decoder-only transformer that reads music segment by segment (arXiv 2602.19816).

Pre-norm blocks, rotary or learned positions, grouped-query attention. Each layer l attends causally to its own memory
of M_l tokens and to the current segment. Shapes: B lanes, T tokens of a chunk, S tokens of a segment, H query heads,
H_kv key/value heads, D head dimension, V vocabulary, W width of Canon layers.
"""

from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from dsmr_mlx.model.attention import segment_attention
from dsmr_mlx.model.canon import Canon
from dsmr_mlx.model.config import NEVER, ModelConfig
from dsmr_mlx.model.dropout import dropout
from dsmr_mlx.model.embedding import Embedding
from dsmr_mlx.model.long_attention import prefix_attention, view_attention
from dsmr_mlx.model.lora import adapter_keys, add_adapters, project
from dsmr_mlx.model.quantization import logical_size, quantize_model
from dsmr_mlx.model.rotary import Angles, rotate
from dsmr_mlx.model.slots import write
from dsmr_mlx.model.state import LayerState, RecurrentState, Segment, Window

ACTIVATION = {"silu": nn.silu, "gelu": nn.gelu, "gelu_tanh": nn.gelu_approx, "relu": nn.relu}


def make_norm(config: ModelConfig) -> nn.Module:
    """Return an RMSNorm or a LayerNorm over d_model."""
    if config.norm == "rms":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.norm_bias)


def mix(shares: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """Return shares[0]·a + shares[1]·b."""
    of_a, of_b = mx.split(shares, 2)  # indexing would be a gather
    return of_a * a + of_b * b


class Attention(nn.Module):
    """Grouped-query attention of a chunk over a layer's memory and segment, see `DSMR`."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.horizon = config.horizons[layer]
        heads = config.n_heads + 2 * config.n_kv_heads
        self.qkv = nn.Linear(config.d_model, heads * config.head_dim, bias=config.attention_bias)
        self.out = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(config.head_dim, eps=config.norm_eps) for _ in "qk")
        if config.value_residual and layer > 0:
            self.value_shares = mx.array([0.5, 0.5])

    def __call__(
        self,
        x: mx.array,
        layer: LayerState,
        window: Window,
        first_values: mx.array | None = None,
        keys: mx.array | None = None,
    ) -> tuple[mx.array, mx.array, LayerState]:
        """Return the output `(B, T, d_model)` for x of that shape, the chunk's values, and all keys and values.

        first_values: the chunk's values `(B, H_kv, T, D)` in the first layer, if this one mixes them with its own
        keys: for the dropout of adapters, `(B, 2)`
        """
        c, (B, T, _) = self.config, x.shape
        qkv_keys, out_keys = adapter_keys(keys)
        qkv = project(self.qkv, x, qkv_keys).reshape(B, T, -1, c.head_dim).swapaxes(1, 2)  # (B, H + 2 H_kv, T, D)
        qk, v = mx.split(qkv, [c.n_heads + c.n_kv_heads], axis=1)
        if "value_shares" in self:
            v = mix(self.value_shares, v, first_values)
        dtype = layer["keys"].dtype
        q, k, new_values = (new.astype(dtype) for new in (*self._queries_and_keys(qk, window), v))
        all_keys, values = (
            write(layer[name], new, window.slot + self.horizon, axis=2)
            for name, new in (("keys", k), ("values", new_values))
        )
        y = self._attend(q, k, new_values, all_keys, values, window)  # (B, H, T, D)
        y = y.astype(x.dtype).swapaxes(1, 2).reshape(B, T, -1)
        stored = {"keys": mx.stop_gradient(all_keys), "values": mx.stop_gradient(values)}
        return project(self.out, y, out_keys), v, stored

    def _attend(
        self, q: mx.array, k: mx.array, v: mx.array, keys: mx.array, values: mx.array, window: Window
    ) -> mx.array:
        """Return the attention `(B, H, T, D)` over all slots of memory and segment that the window shows."""
        if self.horizon in window.views:
            return view_attention(q, k, v, keys, values, window.views[self.horizon])
        if window.biases is not None:
            return segment_attention(q, k, v, keys, values, window.biases[self.horizon])
        mask, T = window.masks[self.horizon], q.shape[2]
        if isinstance(mask, str):
            end = self.horizon + window.slot + T
            keys, values, mask = keys[:, :, :end], values[:, :, :end], mask if T > 1 else None
        elif mask.shape[-1] < keys.shape[2]:
            return prefix_attention(q, keys, values, mask, self.config.segment_length)
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=self.config.head_dim**-0.5, mask=mask)

    def _queries_and_keys(self, qk: mx.array, window: Window) -> list[mx.array]:
        """Normalize the heads `(B, H + H_kv, T, D)`, if the model does, and rotate them. Return queries and keys."""
        heads = [self.config.n_heads]
        if "q_norm" not in self:  # rotated together, one kernel less
            return mx.split(rotate(qk, self.config, window.offset, window.angles), heads, axis=1)
        q, k = mx.split(qk, heads, axis=1)
        normed = self.q_norm(q), self.k_norm(k)
        return [rotate(part, self.config, window.offset, window.angles) for part in normed]


class FeedForward(nn.Module):
    """A feed-forward layer of two projections, or three with a gate (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATION[config.activation]
        if config.gated:
            self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=config.feed_forward_bias)
        else:
            self.up = nn.Linear(config.d_model, config.d_ff, bias=config.feed_forward_bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.feed_forward_bias)

    def __call__(self, x: mx.array, keys: mx.array | None = None) -> mx.array:
        """Return `(B, T, d_model)`; x has the same shape. keys: for the dropout of adapters, `(B, 2)`."""
        up_keys, down_keys = adapter_keys(keys)
        if "gate_up" in self:
            gate, up = self._gate_and_up(x, up_keys)
            return project(self.down, self.activation(gate) * up, down_keys)
        return project(self.down, self.activation(project(self.up, x, up_keys)), down_keys)

    def _gate_and_up(self, x: mx.array, keys: mx.array | None) -> tuple[mx.array, mx.array]:
        (B, T, d), both = x.shape, self.gate_up
        if T > 1 or "scales" in both or "lora" in both:
            return mx.split(project(both, x, keys), 2, axis=-1)
        # For one token, a batched product of two smaller matrices is faster: OpenBLAS would copy the large one first.
        y = x.reshape(1, B, d) @ both.weight.reshape(2, -1, d).swapaxes(1, 2)  # (2, B, d_ff)
        if "bias" in both:
            y = y + both.bias.reshape(2, 1, -1)
        return tuple(part.swapaxes(0, 1) for part in mx.split(y, 2))  # y[0] would be a gather


class Block(nn.Module):
    """A pre-norm layer: attention, then feed-forward, each added to its input.

    With `parallel_residual` both read the layer's input (Wang & Komatsuzaki 2021).
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        if config.canon:
            self.attention_canon, self.feed_forward_canon = Canon(config.d_model), Canon(config.d_model)
        if config.embedding_skip:
            self.skip = mx.array([1.0, 0.0])
        self.parallel = config.parallel_residual
        self.rate = config.dropout

    def __call__(
        self,
        x: mx.array,
        layer: LayerState,
        embedded: mx.array | None,
        first_values: mx.array | None,
        window: Window,
        keys: tuple[mx.array, mx.array] | None = None,
    ) -> tuple[mx.array, mx.array, LayerState]:
        """Return the output `(B, T, d_model)` for x of that shape, the chunk's values, and the new slots.

        embedded: `(B, T, d_model)`, the input of the first layer, for `embedding_skip`
        first_values: see `Attention`
        keys: for the dropouts of the two parts and their adapters, each `(B, 2)`
        """
        first, second = keys or (None, None)
        if "skip" in self:
            x = mix(self.skip, x, embedded)
        h, attention_inputs = self._input_of("attention", x, layer, window)
        y, values, slots = self.attention(h, layer, window, first_values, first)
        attended = x + dropout(y, self.rate, first)
        h, feed_forward_inputs = self._input_of("feed_forward", x if self.parallel else attended, layer, window)
        z = self.feed_forward(h, second)
        # Outputs without gradient come last: `mx.checkpoint` skips them without counting them.
        return attended + dropout(z, self.rate, second), values, slots | attention_inputs | feed_forward_inputs

    def _input_of(self, part: str, x: mx.array, layer: LayerState, window: Window) -> tuple[mx.array, LayerState]:
        """Normalize x and pass it through the part's Canon layer, if any. Return the result and the layer's inputs."""
        h, canon = self[f"{part}_norm"](x), f"{part}_canon"
        if canon not in self:
            return h, {}
        h, inputs = self[canon](h, layer[canon], window.slot, window.known)
        return h, {canon: inputs}


class DSMR(nn.Module):
    """Depth-Structured Music Recurrence.

    A token at position t of its piece, with segment start s = S⌊t/S⌋, attends in layer l to exactly the positions
    max(0, s − M_l) … t of that piece, no matter how calls divide the piece. Canon layers (`config.canon`) before
    attention and feed-forward also mix in the inputs of positions t − 3 … t − 1. Keys, values and inputs before s come
    from the memory and have no gradient. Rotary positions count from the start of the piece; scores depend only on
    distances, so re-basing them in an endless stream changes nothing else. Lanes do not influence each other.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.d_model)
        if config.max_positions is not None:
            self.positions = Embedding(config.max_positions, config.d_model)
        self.layers = [Block(config, layer) for layer in range(config.n_layers)]
        self.norm = make_norm(config)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        predicted = ~np.isin(np.arange(config.vocab_size), config.never_predicted)  # (V,)
        self._predicted = mx.array(predicted)  # not a parameter, because its name begins with _
        self.apply_to_modules(partial(init_weights, config))
        if config.quantization is not None:
            quantize_model(self, config.quantization)
        if config.lora is not None:
            add_adapters(self, config)

    @property
    def n_parameters(self) -> int:
        """The number of weights, the same for floats and quantized weights."""
        return sum(logical_size(name, p, self.config.quantization) for name, p in tree_flatten(self.parameters()))

    def new_state(self, batch_size: int = 1, dtype: mx.Dtype | None = None, rewindable: bool = False) -> RecurrentState:
        """Return an empty state of `batch_size` lanes; dtype: by default that of the norm's weights.

        Only a `rewindable` state can go back past its segment, see `RecurrentState.rewound`.
        """
        return RecurrentState.empty(self.config, batch_size, dtype or self.norm.weight.dtype, rewindable)

    def __call__(self, tokens: mx.array, state: RecurrentState | None = None) -> tuple[mx.array, RecurrentState]:
        """Return the logits `(B, T, V)`, float32, after each token, and the state after the last.

        tokens: ids `(B, T)`, any T; state: of the tokens before; None: an empty one.

        Raises `ValueError` for ids outside the vocabulary, another shape, a state of another batch size or model, and
        a stream that goes past the model's learned positions.
        """
        tokens = self._checked(tokens)
        B, T = tokens.shape
        state = self.new_state(B) if state is None else state
        if state.batch_size != B:
            raise ValueError(f"`tokens` {tokens.shape}: expected {state.batch_size} lanes, as in the state")
        if state.config != self.config:
            raise ValueError("`state`: it belongs to a model with another configuration")
        logits, done = [], 0
        while done < T:
            n = min(state.segment_room, T - done)
            hidden, state = self.advance(tokens[:, done : done + n], state)
            logits.append(self.logits(hidden))
            done += n
        if not logits:
            return mx.zeros((B, 0, self.config.vocab_size)), state
        return mx.concatenate(logits, axis=1), state

    def advance(
        self,
        tokens: mx.array,
        state: RecurrentState,
        counts: np.ndarray | None = None,
        n_layers: int | None = None,
    ) -> tuple[mx.array, RecurrentState]:
        """Return the hidden states `(B, T, d_model)` of a chunk within the current segment, and the next state.

        tokens: `(B, T)`, not checked, so that nothing is evaluated; the ids must be valid
        counts: `(B,)`, how many of the T tokens belong to the lane's piece, before padding; None: all
        n_layers: run only the lowest n layers, see `prefill.segments_needed`; None: all

        Raises `UserError` as `RecurrentState.window` does.
        """
        state = state.opened()
        T = tokens.shape[1]
        hidden, layers = self.forward(tokens, state.layers[:n_layers], state.window(T, counts))
        return hidden, state.advanced(layers + state.layers[len(layers) :], T)

    def step(
        self, token: mx.array, layers: list[LayerState], slot: int | mx.array, segment: Segment
    ) -> tuple[mx.array, list[LayerState]]:
        """Return the logits `(B, V)`, float32, after one token `(B,)`, and the new layers.

        slot: the token's place in the segment. If it is an int32 scalar array, this is a pure function of arrays whose
        shapes never change, so that decoding compiles it once for all steps.
        """
        hidden, layers = self.forward(token[:, None], layers, segment.window(slot))
        return self.logits(hidden[:, -1]), layers

    def forward(
        self,
        tokens: mx.array,
        layers: list[LayerState],
        window: Window,
        dropout_keys: mx.array | None = None,
        recompute: bool = False,
    ) -> tuple[mx.array, list[LayerState]]:
        """Return the hidden states `(B, T, d_model)` and the new layers: a pure function of arrays, for training steps.

        layers: of the whole model, or of its lowest layers only
        dropout_keys: `(B, 2)` uint32, a random key per lane; None: no dropout. recompute: keep only the input of each
        block for the gradient and compute the rest again (gradient checkpointing, Chen et al. 2016).
        """
        window = replace(window, angles=Angles.of(self.config, window.offset, tokens.shape[1]))
        keys = [None] * (2 * len(self.layers) + 1)
        if dropout_keys is not None:
            split = mx.vmap(lambda key: mx.random.split(key, len(keys)))(dropout_keys)  # (B, 2L + 1, 2)
            keys = [split[:, i] for i in range(len(keys))]
        x = self.embed(tokens)
        if "positions" in self:
            positions = window.offset[:, None] + mx.arange(tokens.shape[1])  # (B, T)
            # Only padding can lie past the table: `RecurrentState.window` refuses pieces that do.
            x = x + self.positions(mx.minimum(positions, self.config.max_positions - 1))
        x = dropout(x, self.config.dropout, keys[-1])
        embedded = x if self.config.embedding_skip else None
        first_values, new_layers = None, []
        for i, (block, layer) in enumerate(zip(self.layers[: len(layers)], layers, strict=True)):
            call = partial(block, window=window, keys=tuple(keys[2 * i : 2 * i + 2]))
            # Passed as arguments, not bound in `call`, so that they have a gradient if they are recomputed.
            run = nn.utils.checkpoint(block, call) if recompute else call
            x, values, layer = run(x, layer, embedded, first_values)
            if first_values is None and self.config.value_residual:
                first_values = values
            new_layers.append(layer)
        return self.norm(x), new_layers

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the logits `(…, V)`, float32, of hidden states `(…, d_model)`."""
        head = self.embed.as_linear if self.config.tie_embeddings else self.head
        logits, cap = head(hidden).astype(mx.float32), self.config.logit_softcap
        logits = logits if cap is None else cap * mx.tanh(logits / cap)
        return mx.where(self._predicted, logits, NEVER) if self.config.never_predicted else logits

    def _checked(self, tokens: mx.array) -> mx.array:
        tokens = mx.array(np.asarray(tokens)) if not isinstance(tokens, mx.array) else tokens
        if tokens.ndim != 2 or not mx.issubdtype(tokens.dtype, mx.integer):
            raise ValueError(f"`tokens` {tokens.dtype} {tokens.shape}: expected integers (B, T)")
        if tokens.size:
            low, high = tokens.min().item(), tokens.max().item()
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"`tokens` from {low} to {high}: expected ids from 0 to {self.config.vocab_size - 1}")
        return tokens


def init_weights(config: ModelConfig, name: str, module: nn.Module) -> None:
    """Draw normal weights with standard deviation d_model^-1/2 for embeddings and fan_in^-1/2 elsewhere; biases are 0.

    Learned positions have half the deviation of embeddings, as in GPT-2. The two projections that write to the residual
    stream are scaled by 1 / 2L as well, or by 0 with `zero_init`: a new model passes its embeddings on almost
    unchanged, and learns faster here than with GPT-2's (2L)^-1/2.
    """
    if isinstance(module, nn.Embedding):
        scale = config.d_model**-0.5 / (2 if name == "positions" else 1)
        module.weight = mx.random.normal(module.weight.shape, scale=scale)
    elif isinstance(module, nn.Linear):
        scale = module.weight.shape[1] ** -0.5
        if name.endswith((".out", ".down")):
            scale = 0 if config.zero_init else scale / (2 * config.n_layers)
        module.weight = mx.random.normal(module.weight.shape, scale=scale)
        if "bias" in module:
            module.bias = mx.zeros_like(module.bias)
