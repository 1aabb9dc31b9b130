"""The PyTorch reference: DSMR (arXiv 2602.19816) as a plain `nn.Module`, for training elsewhere and for tests of MLX.

Parameters have the names and shapes of the MLX model. `save` writes a DSMR PyTorch checkpoint with

    config      the fields of `ModelConfig`
    state_dict  the weights
    tokenizer   its files, see `tokenizer_files`, or None

Shapes: B lanes, T tokens of a chunk, S tokens of a segment, H query heads, H_kv key/value heads, D head dimension,
M memory horizon of a layer, f tokens of the current segment read so far. Needs torch; imports no MLX.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import atomic_file
from dsmr_mlx.model.config import ModelConfig

LayerState = tuple[Tensor, Tensor]  # keys (rotated) and values, each (B, H_kv, M + f, D), oldest first
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


@dataclass
class State:
    """The recurrent state of B lanes. All tensors are detached.

    layers:   for each layer its memory of M_l slots, oldest first, then the slots of the current segment
    position: `(B,)` int64, the number of tokens of its piece that each lane has read
    filled:   f, the number of tokens of the current segment that have been read, equal for all lanes
    """

    layers: list[LayerState]
    position: Tensor
    filled: int = 0

    def reset(self, lanes: list[int]) -> None:
        """Start new pieces in some lanes. Raises `ValueError` within a segment."""
        if self.filled and lanes:
            raise ValueError(f"lanes {lanes}: {self.filled} tokens into a segment, must be reset at its start")
        self.position = self.position.clone()
        self.position[lanes] = 0


class Attention(nn.Module):
    """Grouped-query attention of a chunk over the memory of a layer and the current segment."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        heads = config.n_heads + 2 * config.n_kv_heads
        self.qkv = nn.Linear(config.d_model, heads * config.head_dim, bias=config.attention_bias)
        self.out = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=config.output_bias)

    def forward(self, x: Tensor, layer: LayerState, rotation: Tensor | None, mask: Tensor) -> tuple[Tensor, LayerState]:
        """Return the output `(B, T, d_model)` for x of that shape, and the layer state with T more slots.

        mask: `(B, 1, T, M + f + T)`, True to attend
        """
        c, (B, T, _) = self.config, x.shape
        qkv = self.qkv(x).view(B, T, -1, c.head_dim).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
        q, k, v = qkv.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], dim=1)
        q, k = rotate(q, c, rotation), rotate(k, c, rotation)
        keys, values = torch.cat([layer[0], k.to(layer[0])], 2), torch.cat([layer[1], v.to(layer[1])], 2)
        y = attend(q.to(keys), keys, values, mask)  # (B, H, T, D)
        y = y.to(x).transpose(1, 2).reshape(B, T, -1)  # (B, T, H D)
        return self.out(y), (keys.detach(), values.detach())


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

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.parallel = config.parallel_residual

    def forward(self, x: Tensor, layer: LayerState, rotation: Tensor | None, mask: Tensor) -> tuple[Tensor, LayerState]:
        """Return the output `(B, T, d_model)` and the new layer state. Arguments as for `Attention.forward`."""
        y, layer = self.attention(self.attention_norm(x), layer, rotation, mask)
        attended = x + self.dropout(y)
        fed = self.feed_forward(self.feed_forward_norm(x if self.parallel else attended))
        return attended + self.dropout(fed), layer


class DSMR(nn.Module):
    """Depth-Structured Music Recurrence, with the semantics of `dsmr_mlx.DSMR`.

    A token at position t of its piece, with segment start s = S⌊t/S⌋, attends in layer l to exactly the
    positions max(0, s − M_l) … t of that piece. Raises `UserError` for a quantized configuration.
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
        self.layers = nn.ModuleList(Block(config) for _ in config.horizons)
        self.norm = make_norm(config)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        self.register_buffer("frequencies", rotary_frequencies(config), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize like the MLX model: std fan_in^-1/2, less for positions and projections to the residual stream."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.d_model**-0.5 / (2 if name == "positions" else 1))
            elif isinstance(module, nn.Linear):
                shrink = 2 * self.config.n_layers if name.endswith((".out", ".down")) else 1
                nn.init.normal_(module.weight, std=module.in_features**-0.5 / shrink)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def new_state(self, batch_size: int = 1, dtype: torch.dtype | None = None) -> State:
        """Return an empty state; dtype: of keys and values, by default that of the weights."""
        weight, c = self.norm.weight, self.config
        layers = []
        for horizon in c.horizons:
            shape = (batch_size, c.n_kv_heads, horizon, c.head_dim)
            layers.append(tuple(torch.zeros(shape, dtype=dtype or weight.dtype, device=weight.device) for _ in "kv"))
        return State(layers, torch.zeros(batch_size, dtype=torch.int64, device=weight.device))

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return float32 logits `(B, T, V)` for tokens `(B, T)`, T ≥ 1, and the state after the last.

        Raises `ValueError` if the tokens exceed the learned positions.
        """
        state = self.new_state(len(tokens)) if state is None else state
        logits, done = [], 0
        while done < tokens.shape[1]:
            n = min(self.config.segment_length - state.filled, tokens.shape[1] - done)
            self._check_end(state.position, n)
            hidden, layers = self.hidden(tokens[:, done : done + n], state.layers, state.position, state.filled)
            state = self.advanced(state, layers, n)
            logits.append(self.logits(hidden))
            done += n
        return torch.cat(logits, dim=1), state

    def hidden(
        self, tokens: Tensor, layers: list[LayerState], position: Tensor, filled: int = 0
    ) -> tuple[Tensor, list[LayerState]]:
        """Run the network on a chunk `(B, T)` in one segment. Return `(B, T, d_model)` and layers with T more slots.

        A pure function, with constant shapes for whole segments: the part to wrap in `torch.compile`.
        """
        places = position[:, None] + torch.arange(tokens.shape[1], device=tokens.device)  # (B, T)
        x = self.embed(tokens)
        if self.config.max_positions is not None:
            x = x + self.positions(places.clamp(max=self.config.max_positions - 1))
        x = self.dropout(x)
        rotation = None if self.frequencies is None else rotation_at(places, self.frequencies)
        masks = {horizon: self._mask(horizon, position, filled, tokens) for horizon in set(self.config.horizons)}
        new_layers = []
        for block, layer, horizon in zip(self.layers, layers, self.config.horizons, strict=True):
            x, layer = block(x, layer, rotation, masks[horizon])
            new_layers.append(layer)
        return self.norm(x), new_layers

    def advanced(self, state: State, layers: list[LayerState], n: int) -> State:
        """Return the state after n more tokens. At the end of a segment every layer keeps its newest M_l slots."""
        filled = state.filled + n
        if filled == self.config.segment_length:
            horizons, filled = self.config.horizons, 0
            layers = [
                tuple(slots[:, :, slots.shape[2] - horizon :] for slots in layer)
                for layer, horizon in zip(layers, horizons, strict=True)
            ]
        return State(layers, state.position + n, filled)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits `(..., V)` for the output `(..., d_model)` of `hidden`."""
        head = (lambda x: F.linear(x, self.embed.weight)) if self.config.tie_embeddings else self.head
        return head(hidden).float()

    def _mask(self, horizon: int, position: Tensor, filled: int, tokens: Tensor) -> Tensor:
        """Return `(B, 1, T, M + f + T)`: True for memory of the current piece and the segment up to the token."""
        B, T = tokens.shape
        start = position - filled  # (B,)
        places = start[:, None] - horizon + torch.arange(horizon, device=tokens.device)  # positions of the memory slots
        remembered = (places >= 0)[:, None].expand(B, T, horizon)
        causal = torch.ones(T, filled + T, dtype=torch.bool, device=tokens.device).tril(filled).expand(B, -1, -1)
        return torch.cat([remembered, causal], dim=2)[:, None]

    def _check_end(self, position: Tensor, n: int) -> None:
        end = self.config.max_positions
        if end is not None and int(position.max()) + n > end:
            raise ValueError(
                f"position {int(position.max()) + n}: expected at most {end}, the number of learned positions"
            )


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return the attention `(B, H, T, D)` of q `(B, H, T, D)` over grouped keys and values `(B, H_kv, K, D)`."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    # Training compiled for a CPU is about 1.3 times as fast as with the fused kernel.
    keys, values = (slots.repeat_interleave(q.shape[1] // slots.shape[1], dim=1) for slots in (keys, values))
    scores = (q * q.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    return scores.float().masked_fill(~mask, -torch.inf).softmax(-1).to(values) @ values


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
    angles = places[:, None, :, None].to(precise) * frequencies.to(precise)
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
    content = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(content, dict) or not content.keys() >= {"config", "state_dict"}:
        raise UserError(f"{path}: not a DSMR checkpoint, expected config and state_dict")
    model = DSMR(ModelConfig.from_dict(content["config"], str(path)))
    model.load_state_dict(content["state_dict"])
    return model.to(device).eval(), content
