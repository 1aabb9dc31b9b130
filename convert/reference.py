"""The PyTorch reference: DSMR (arXiv 2602.19816) as a plain `nn.Module`, for training elsewhere and for tests of MLX.

Parameters have the names and shapes of the MLX model. `save` writes a DSMR PyTorch checkpoint with

    config      the fields of `ModelConfig`
    state_dict  the weights
    tokenizer   its files, see `tokenizer_files`, or None
    licence     the text of the licence of the weights, if they have one

Shapes: B lanes, T tokens of a chunk, S tokens of a segment, H query heads, H_kv key/value heads, D head dimension,
M memory horizon of a layer, f tokens of the current segment read so far, W width of Canon layers. Needs torch; imports
no MLX.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import atomic_file
from dsmr_mlx.convert.long_memory import Memory, attend_long
from dsmr_mlx.convert.torch_loading import check_state_dict, load_plain
from dsmr_mlx.model.config import CANON_WIDTH, NEVER, ModelConfig
from dsmr_mlx.model.memory_blocks import is_long

# The state of a layer, detached, oldest first: keys (rotated) and values, each (B, H_kv, M + f, D), with fewer slots of
# a long memory until a lane fills it. With Canon layers, also the inputs of both, each (B, W − 1 + f, d_model).
LayerState = tuple[Tensor, ...]
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


class Chunk(NamedTuple):
    """The data of a chunk of T tokens that all layers share.

    embedded: `(B, T, d_model)`, the output of the embedding
    rotation: see `rotation_at`
    masks: per horizon `(B, 1, T, M + f + T)`, True to attend; if it is long, `(B,)`, how many of the newest slots
        before the chunk each lane sees
    known: `(B, W − 1, 1)`, True for tokens before the segment that belong to the lane's piece
    """

    embedded: Tensor
    rotation: Tensor | None
    masks: dict[int, Tensor]
    known: Tensor


@dataclass
class State:
    """The recurrent state of B lanes.

    layers:   for each layer its memory, then the current segment, as in `LayerState`; long keys and values as `Memory`
    position: `(B,)` int64, the number of tokens of its piece that each lane has read
    filled:   f, the number of tokens of the current segment that have been read, equal for all lanes
    """

    layers: list[tuple[Tensor | Memory, ...]]
    position: Tensor
    filled: int = 0

    @property
    def arrays(self) -> list[LayerState]:
        """The layers as tensors, for `DSMR.hidden`."""
        return [tuple(s.slots if isinstance(s, Memory) else s for s in layer) for layer in self.layers]

    def reset(self, lanes: list[int]) -> None:
        """Start new pieces in some lanes. Raises `ValueError` within a segment."""
        if self.filled and lanes:
            raise ValueError(f"lanes {lanes}: {self.filled} tokens into a segment, must be reset at its start")
        self.position = self.position.clone()
        self.position[lanes] = 0


class Canon(nn.Module):
    """A causal depthwise convolution over W tokens, added to its input (Allen-Zhu 2025, "Canon layers")."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.d_model, CANON_WIDTH))

    def forward(self, x: Tensor, before: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and all inputs so far, detached; x, output: `(B, T, d_model)`.

        before: `(B, W − 1 + f, d_model)`, the inputs before x; known: as in `Chunk`
        """
        inputs = torch.cat([before, x.to(before)], dim=1)
        seen = torch.cat([inputs[:, : CANON_WIDTH - 1] * known, inputs[:, CANON_WIDTH - 1 :]], dim=1)
        seen, T = seen[:, -(CANON_WIDTH - 1) - x.shape[1] :], x.shape[1]
        mixed = sum(seen[:, j : j + T] * self.weight[:, j] for j in range(CANON_WIDTH))
        return x + mixed.to(x), inputs.detach()


class Attention(nn.Module):
    """Grouped-query attention of a chunk over the memory of a layer and the current segment."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.config, self.is_long = config, is_long(config.horizons[index])
        heads = config.n_heads + 2 * config.n_kv_heads
        self.qkv = nn.Linear(config.d_model, heads * config.head_dim, bias=config.attention_bias)
        self.out = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.mixes_values = config.value_residual and index > 0
        if self.mixes_values:
            self.value_shares = nn.Parameter(torch.tensor([0.5, 0.5]))

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, chunk: Chunk, mask: Tensor, first_values: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the output `(B, T, d_model)` for x of that shape, keys and values with T more slots, and new values.

        If the memory is long, only the T slots are returned. mask: see `Chunk`; first_values: the new values
        `(B, H_kv, T, D)` of the first layer
        """
        c, (B, T, _) = self.config, x.shape
        qkv = self.qkv(x).view(B, T, -1, c.head_dim).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
        q, k, v = qkv.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], dim=1)
        if c.qk_norm:
            q, k = self.q_norm(q.float()).to(q), self.k_norm(k.float()).to(k)
        if self.mixes_values:
            v = self.value_shares[0] * v + self.value_shares[1] * first_values
        q, k = rotate(q, c, chunk.rotation), rotate(k, c, chunk.rotation)
        q, k, new_values = q.to(keys), k.to(keys), v.to(values)
        if self.is_long:
            y = attend_long(q, k, new_values, keys, values, mask)  # (B, H, T, D)
            keys, values = k, new_values
        else:
            keys, values = torch.cat([keys, k], 2), torch.cat([values, new_values], 2)
            y = attend(q, keys, values, mask)  # (B, H, T, D)
        y = y.to(x).transpose(1, 2).reshape(B, T, -1)  # (B, T, H D)
        return self.out(y), keys.detach(), values.detach(), v


class FeedForward(nn.Module):
    """Feed-forward layer on `(B, T, d_model)`: two projections, or three with a gate (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gated = config.gated
        if config.gated:
            self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=config.feed_forward_bias)
        else:
            self.up = nn.Linear(config.d_model, config.d_ff, bias=config.feed_forward_bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.feed_forward_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x, both `(B, T, d_model)`."""
        if self.gated:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(self.activation(gate) * up)
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """A pre-norm layer: attention, then feed-forward, or both from the same input (`parallel_residual`)."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.config, self.horizon = config, config.horizons[index]
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, index)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        if config.canon:
            self.attention_canon, self.feed_forward_canon = Canon(config), Canon(config)
        if config.embedding_skip:
            self.skip = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(
        self, x: Tensor, layer: LayerState, chunk: Chunk, first_values: Tensor | None
    ) -> tuple[Tensor, LayerState, Tensor]:
        """Return the output `(B, T, d_model)`, the layer with T more slots as in `hidden`, and the chunk's values."""
        keys, values, *inputs = layer
        if self.config.embedding_skip:
            x = self.skip[0] * x + self.skip[1] * chunk.embedded
        h = self.attention_norm(x)
        if self.config.canon:
            h, inputs[0] = self.attention_canon(h, inputs[0], chunk.known)
        mask = chunk.masks[self.horizon]
        y, keys, values, new_values = self.attention(h, keys, values, chunk, mask, first_values)
        after = x + self.dropout(y)
        h = self.feed_forward_norm(x if self.config.parallel_residual else after)
        if self.config.canon:
            h, inputs[1] = self.feed_forward_canon(h, inputs[1], chunk.known)
        return after + self.dropout(self.feed_forward(h)), (keys, values, *inputs), new_values


class DSMR(nn.Module):
    """Depth-Structured Music Recurrence, with the semantics of `dsmr_mlx.DSMR`.

    A token at position t of its piece, with segment start s = S⌊t/S⌋, attends in layer l to exactly the
    positions max(0, s − M_l) … t of that piece. Canon layers mix a token with the W − 1 before it. Raises `UserError`
    for a quantized configuration.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.quantization is not None:
            raise UserError(f"quantization = {config.quantization}: the PyTorch reference has plain weights only")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        if config.max_positions is not None:
            self.positions = nn.Embedding(config.max_positions, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layers))
        self.norm = make_norm(config)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        self.frequencies = rotary_frequencies(config)  # no buffer: it stays float64, also on devices that have none
        never_predicted = torch.tensor(config.never_predicted, dtype=torch.int64)
        self.register_buffer("never_predicted", never_predicted, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize like the MLX model: std fan_in^-1/2; less or 0 for positions and outputs of blocks.

        Gains, Canon layers and learned shares already have their initial values.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.d_model**-0.5 / (2 if name == "positions" else 1))
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith((".out", ".down")):
                    std *= 0 if self.config.zero_init else 1 / (2 * self.config.n_layers)
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def new_state(self, batch_size: int = 1, dtype: torch.dtype | None = None) -> State:
        """Return an empty state; dtype: of the layer states, by default that of the weights."""
        weight, c = self.norm.weight, self.config

        def empty(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype or weight.dtype, device=weight.device)

        layers = []
        for horizon in c.horizons:
            # A long memory grows; it starts with some slots because graphs are compiled anew for empty arrays.
            memory = min(horizon, c.segment_length) if is_long(horizon) else horizon
            slots = [(c.n_kv_heads, memory, c.head_dim)] * 2 + [(CANON_WIDTH - 1, c.d_model)] * (2 if c.canon else 0)
            layers.append(tuple(empty(*shape) for shape in slots))
        return self.state_of(layers, torch.zeros(batch_size, dtype=torch.int64, device=weight.device))

    def state_of(self, arrays: list[LayerState], position: Tensor) -> State:
        """Return the state at the start of a segment from `State.arrays` and the position."""
        layers = [
            (Memory(keys), Memory(values), *inputs) if is_long(horizon) else (keys, values, *inputs)
            for horizon, (keys, values, *inputs) in zip(self.config.horizons, arrays, strict=True)
        ]
        return State(layers, position)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return float32 logits `(B, T, V)` for tokens `(B, T)`, T ≥ 1, and the state after the last.

        Raises `ValueError` if the tokens exceed the learned positions.
        """
        state = self.new_state(len(tokens)) if state is None else state
        logits, done = [], 0
        while done < tokens.shape[1]:
            n = min(self.config.segment_length - state.filled, tokens.shape[1] - done)
            self._check_end(state.position, n)
            hidden, layers = self.hidden(tokens[:, done : done + n], state.arrays, state.position, state.filled)
            state = self.advanced(state, layers, n)
            logits.append(self.logits(hidden))
            done += n
        return torch.cat(logits, dim=1), state

    def hidden(
        self, tokens: Tensor, layers: list[LayerState], position: Tensor, filled: int = 0
    ) -> tuple[Tensor, list[LayerState]]:
        """Run the network on a chunk `(B, T)` in one segment. Return `(B, T, d_model)` and layers with T more slots.

        Of a long memory only the T slots are returned; `advanced` joins them. layers: `State.arrays`. A pure function,
        to wrap in `torch.compile`: shapes are constant for whole segments, except those of long memories.
        """
        places = position[:, None] + torch.arange(tokens.shape[1], device=tokens.device)  # (B, T)
        x = self.embed(tokens)
        if self.config.max_positions is not None:
            x = x + self.positions(places.clamp(max=self.config.max_positions - 1))
        x = self.dropout(x)
        rotation = None if self.frequencies is None else rotation_at(places, self.frequencies)
        masks = {}
        for horizon, (keys, *_) in zip(self.config.horizons, layers, strict=True):
            if is_long(horizon):
                masks[horizon] = (position - filled).clamp(max=keys.shape[2] - filled) + filled
            elif horizon not in masks:
                masks[horizon] = self._mask(horizon, position, filled, tokens)
        chunk = Chunk(x, rotation, masks, before_segment(CANON_WIDTH - 1, position - filled)[:, :, None])
        new_layers, first_values = [], None
        for block, layer in zip(self.layers, layers, strict=True):
            x, layer, values = block(x, layer, chunk, first_values)
            first_values = values if first_values is None else first_values
            new_layers.append(layer)
        return self.norm(x), new_layers

    def advanced(self, state: State, layers: list[LayerState], n: int) -> State:
        """Return the state after n more tokens, given what `hidden` returned.

        At the end of a segment every layer keeps its newest M_l slots, but of a long memory no more than any lane read.
        """
        filled, horizons = state.filled + n, self.config.horizons
        full = filled == self.config.segment_length
        longest = int(state.position.max()) + n if any(map(is_long, horizons)) else 0
        joined = []
        for before, layer, horizon in zip(state.layers, layers, horizons, strict=True):
            if is_long(horizon):
                room = min(horizon, max(longest, self.config.segment_length)) if full else horizon + filled
                memory = [old.appended(new, room) for old, new in zip(before[:2], layer[:2], strict=True)]
                layer = (*memory, *newest_inputs(layer[2:], full))
            elif full:
                layer = (
                    *(slots[:, :, slots.shape[2] - horizon :] for slots in layer[:2]),
                    *newest_inputs(layer[2:], full),
                )
            joined.append(layer)
        return State(joined, state.position + n, 0 if full else filled)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits `(..., V)` for the output `(..., d_model)` of `hidden`."""
        head = (lambda x: F.linear(x, self.embed.weight)) if self.config.tie_embeddings else self.head
        logits, cap = head(hidden).float(), self.config.logit_softcap
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return logits.index_fill(-1, self.never_predicted, NEVER) if self.config.never_predicted else logits

    def _mask(self, horizon: int, position: Tensor, filled: int, tokens: Tensor) -> Tensor:
        """Return `(B, 1, T, M + f + T)`: True for memory of the current piece and the segment up to the token."""
        B, T = tokens.shape
        remembered = before_segment(horizon, position - filled)[:, None].expand(B, T, horizon)
        causal = torch.ones(T, filled + T, dtype=torch.bool, device=tokens.device).tril(filled).expand(B, -1, -1)
        return torch.cat([remembered, causal], dim=2)[:, None]

    def _check_end(self, position: Tensor, n: int) -> None:
        end = self.config.max_positions
        if end is not None and int(position.max()) + n > end:
            raise ValueError(
                f"position {int(position.max()) + n}: expected at most {end}, the number of learned positions"
            )


def before_segment(n: int, start: Tensor) -> Tensor:
    """Return `(B, n)`: which of the n tokens before the segment that begins at `start` `(B,)` belong to the piece."""
    return start[:, None] - n + torch.arange(n, device=start.device) >= 0


def newest_inputs(inputs: LayerState, full: bool) -> LayerState:
    """Return the inputs of Canon layers that are kept: the newest W − 1 at the end of a segment, else all."""
    return tuple(slots[:, 1 - CANON_WIDTH :] for slots in inputs) if full else inputs


class SegmentAttention(torch.autograd.Function):
    """Attention on a CPU with a constant memory: only the last T keys and values have a gradient.

    Compiled, it is faster than the fused kernel, and its gradient needs a third fewer products than automatic
    differentiation. As in Dao et al. 2022, the gradient of the softmax uses the output.
    """

    @staticmethod
    def forward(ctx, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, new: int) -> Tensor:
        """Return `(B, H_kv, R, D)` for scaled queries of that shape.

        keys, values: `(B, H_kv, K, D)`, the last `new` of which are not memory; mask: `(B, 1, R, K)`
        """
        weights = (q @ keys.mT).masked_fill(~mask, -torch.inf).softmax(-1, torch.float32).to(values)
        y = weights @ values
        ctx.save_for_backward(q, keys, values, weights, y)
        ctx.new = new
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Return the gradients of q, keys and values; those of the memory are 0."""
        q, keys, values, weights, y = ctx.saved_tensors
        total = (dy.float() * y.float()).sum(-1, keepdim=True)
        dscores = (weights * (dy @ values.mT - total)).to(q)
        new = ctx.new
        padding = (0, 0, keys.shape[2] - new, 0)
        dk, dv = dscores[..., -new:].mT @ q, weights[..., -new:].mT @ dy
        return dscores @ keys, F.pad(dk, padding), F.pad(dv, padding), None, None


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return the attention `(B, H, T, D)` of q `(B, H, T, D)` over grouped keys and values `(B, H_kv, K, D)`.

    mask: `(B, 1, T, K)`. On a CPU only the last T keys and values have a gradient.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    (B, H, T, D), groups = q.shape, q.shape[1] // keys.shape[1]
    # The queries of a group of heads become the rows of one matrix.
    grouped = (q * D**-0.5).reshape(B, H // groups, groups * T, D)
    mask = mask.repeat(1, 1, groups, 1) if groups > 1 else mask
    y = SegmentAttention.apply(grouped, keys, values, mask, T)
    return y.reshape(B, H, T, D)


def make_norm(config: ModelConfig) -> nn.Module:
    """Return an RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016)."""
    if config.norm == "rms":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.norm_bias)


def rotary_frequencies(config: ModelConfig) -> Tensor | None:
    """Return `(rope_dims / 2,)` float64, radians per token, after `rope_scaling`; None without RoPE.

    llama3 (Llama 3.1): wavelengths above original_length / low_freq_factor are stretched by `factor`, those below
    original_length / high_freq_factor are unchanged, and those between are interpolated.
    """
    if config.rope_dims == 0:
        return None
    exponents = torch.arange(0, config.rope_dims, 2, dtype=torch.float64) / config.rope_dims
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["type"] == "linear":
        return frequencies / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_length"] * frequencies / (2 * math.pi)
    unchanged = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (unchanged + (1 - unchanged) / scaling["factor"])


def rotation_at(places: Tensor, frequencies: Tensor) -> Tensor:
    """Return cosines and sines `(2, B, 1, T, rope_dims / 2)`, float32, for positions `(B, T)`."""
    precise = torch.float32 if places.device.type == "mps" else torch.float64
    angles = places[:, None, :, None].to(precise) * frequencies.to(precise).to(places.device)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, config: ModelConfig, rotation: Tensor | None) -> Tensor:
    """Apply RoPE to the first `rope_dims` of `(B, H, T, D)`: to halves, or to neighbours if interleaved."""
    if rotation is None:
        return x
    turned, rest = x[..., : config.rope_dims].float(), x[..., config.rope_dims :]
    cosine, sine = rotation
    if config.rope_interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
    else:
        a, b = turned.chunk(2, dim=-1)
    pair = (a * cosine - b * sine, a * sine + b * cosine)
    turned = torch.stack(pair, dim=-1).flatten(-2) if config.rope_interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned.to(x), rest], dim=-1)


def save(path: str | Path, model: DSMR, tokenizer: dict[str, str] | None = None, **more) -> None:
    """Write a DSMR PyTorch checkpoint; tokenizer: from `tokenizer_files.pack`; more: further entries."""
    write(path, model.config, model.state_dict(), tokenizer, **more)


def write(
    path: str | Path, config: ModelConfig, state_dict: dict[str, Tensor], tokenizer: dict[str, str] | None, **more
) -> None:
    """Write weights as `save` does, completely or not at all. Raises `OSError` if writing fails."""
    content = {"config": dataclasses.asdict(config), "state_dict": state_dict, "tokenizer": tokenizer}
    try:
        with atomic_file(path) as file:
            torch.save(content | more, file)
    except (OSError, RuntimeError) as error:
        # After a failed write, PyTorch raises a RuntimeError from closing its archive.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, f"{cause.strerror}; nothing was written", str(path)) from error


def load(path: str | Path, device: str = "cpu") -> tuple[DSMR, dict]:
    """Return the model of a DSMR PyTorch checkpoint, in evaluation mode, and the content of the file.

    Raises `UserError` for any other file.
    """
    torch.empty(0, device=device)  # an invalid device is no fault of the file
    content = load_plain(path, device)
    if not isinstance(content, dict) or not content.keys() >= {"config", "state_dict"}:
        raise UserError(f"{path}: not a DSMR checkpoint, expected config and state_dict")
    stated, weights = content["config"], content["state_dict"]
    if isinstance(stated, dict):
        stated = {str(key): value for key, value in stated.items()}
    config = ModelConfig.from_dict(stated, str(path))
    with torch.device("meta"):  # check the sizes before memory is allocated
        check_state_dict(path, weights, DSMR(config).state_dict())
    model = DSMR(config)
    model.load_state_dict(weights)
    return model.to(device).eval(), content
