"""Small models of other programs, with their names and conventions and random weights."""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dsmr_mlx import DSMR, ModelConfig
from dsmr_mlx.convert.families import FAMILIES
from dsmr_mlx.convert.mapping import configure, find_family, plan
from dsmr_mlx.convert.rules import Configuration, Family


class MemorySource:
    """A source in memory: a state dict and a configuration."""

    def __init__(self, tensors: dict[str, torch.Tensor], config: dict | None = None):
        self.path = Path("weights.pt")
        self.config = config or {}
        self.config_name = "config.json"
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> mx.array:
        """Return one tensor in float32."""
        return mx.array(self.tensors[name].float().numpy())


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Set random parameters: matrices of about unit gain; vectors change by 0.3 on average."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(p + 0.3 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5)
    return module.eval()


def converted(
    source: MemorySource,
    families: Sequence[Family] = FAMILIES,
    horizon: int = 40,
    segment_length: int = 8,
    allow_unused: Sequence[str] = (),
    **settings,
) -> tuple[DSMR, Configuration]:
    """Convert a source, with one horizon for all layers. Return model and configuration."""
    family, prefix = find_family(source, families, allow_unused)
    known = configure(family, prefix, source, settings)
    fields = known.fields | {"segment_length": segment_length, "horizons": [horizon] * known.fields["n_layers"]}
    config = ModelConfig.from_dict(fields)
    steps = plan(family, prefix, source, config, allow_unused)
    model = DSMR(config)
    weights = [(step.target, step.apply([source.read(n) for n in step.sources], config)) for step in steps]
    model.load_weights(weights, strict=True)
    return model.eval(), known


def random_tokens(vocab_size: int, batch: int = 2, length: int = 37, seed: int = 0) -> np.ndarray:
    """Return random ids (batch, length)."""
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, length))


def assert_same_logits(model: DSMR, tokens: np.ndarray, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Compare logits of a whole pass and of a stream in uneven chunks; tolerance: relative to the largest logit."""
    expected = expected.detach().numpy()
    state, streamed = None, []
    for chunk in np.split(tokens, [1, 4, 9, 24], axis=1):
        logits, state = model(mx.array(chunk), state)
        streamed.append(logits)
    for logits in (model(mx.array(tokens))[0], mx.concatenate(streamed, axis=1)):
        assert np.abs(np.array(logits) - expected).max() <= tolerance * np.abs(expected).max()


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return causal attention `(B, T, H D)` for q, k, v `(B, T, H, D)`."""
    y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    return y.transpose(1, 2).flatten(2)


def rotate(x: torch.Tensor, theta: float, interleaved: bool = False) -> torch.Tensor:
    """Apply RoPE to `(B, T, H, D)`, to pairs of neighbours or of the two halves, with complex numbers."""
    T, D = x.shape[1], x.shape[-1]
    angle = torch.arange(T)[:, None] * theta ** (-torch.arange(0, D, 2) / D)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # (T, 1, D / 2)
    pairs = x.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    a, b = pairs.unbind(-1 if interleaved else -2)
    turned = torch.view_as_real(torch.complex(a, b) * turn)  # (B, T, H, D / 2, 2)
    return (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)


class AriaBlock(nn.Module):
    """A layer of Aria."""

    def __init__(self, d: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.mixed_qkv = nn.Linear(d, 3 * d, bias=False)
        self.att_proj_linear = nn.Linear(d, d, bias=False)
        self.ff_gate_proj = nn.Linear(d, 4 * d, bias=False)
        self.ff_up_proj = nn.Linear(d, 4 * d, bias=False)
        self.ff_down_proj = nn.Linear(4 * d, d, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return hidden states `(B, T, d)` for x `(B, T, d)`."""
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in self.mixed_qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.att_proj_linear(causal_attention(rotate(q, 5e5), rotate(k, 5e5), v))
        y = self.norm2(x)
        return x + self.ff_down_proj(F.silu(self.ff_gate_proj(y)) * self.ff_up_proj(y))


class Aria(nn.Module):
    """`TransformerLM` of EleutherAI/aria with the names of the published weights."""

    def __init__(self, vocab_size: int, d: int, n_heads: int, n_layers: int):
        super().__init__()
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(vocab_size, d)
        self.model.encode_layers = nn.ModuleList(AriaBlock(d, n_heads) for _ in range(n_layers))
        self.model.out_layer_norm = nn.LayerNorm(d)
        self.lm_head = nn.Linear(d, vocab_size, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits `(B, T, V)` for ids `(B, T)`."""
        x = self.model.tok_embeddings(ids)
        for layer in self.model.encode_layers:
            x = layer(x)
        return self.lm_head(self.model.out_layer_norm(x))


class NanoGPTBlock(nn.Module):
    """A layer of nanoGPT."""

    def __init__(self, d: int, n_heads: int, bias: bool):
        super().__init__()
        self.n_heads = n_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d, bias=bias), nn.LayerNorm(d, bias=bias)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(d, 3 * d, bias=bias), nn.Linear(d, d, bias=bias)
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(d, 4 * d, bias=bias), nn.Linear(4 * d, d, bias=bias)
        self.attn.register_buffer("bias", torch.ones(16, 16).tril()[None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return hidden states `(B, T, d)` for x `(B, T, d)`."""
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in self.attn.c_attn(self.ln_1(x)).chunk(3, -1))
        x = x + self.attn.c_proj(causal_attention(q, k, v))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    """`GPT` of karpathy/nanoGPT."""

    def __init__(self, vocab_size: int, d: int, n_heads: int, n_layers: int, block_size: int, bias: bool):
        super().__init__()
        names = {
            "wte": nn.Embedding(vocab_size, d),
            "wpe": nn.Embedding(block_size, d),
            "h": nn.ModuleList(NanoGPTBlock(d, n_heads, bias) for _ in range(n_layers)),
            "ln_f": nn.LayerNorm(d, bias=bias),
        }
        self.transformer = nn.ModuleDict(names)
        self.lm_head = nn.Linear(d, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits `(B, T, V)` for ids `(B, T)`."""
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[: ids.shape[1]]
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


class PianoLayer(nn.Module):
    """A layer of PianoNet."""

    def __init__(self, d: int, n_heads: int, n_kv_heads: int, d_ff: int):
        super().__init__()
        self.n_heads, self.n_kv_heads, D = n_heads, n_kv_heads, d // n_heads
        self.ln_attn, self.ln_mlp = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.wq, self.attn.wo = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.attn.wk, self.attn.wv = nn.Linear(d, n_kv_heads * D), nn.Linear(d, n_kv_heads * D)
        self.mlp.w1, self.mlp.w3 = nn.Linear(d, d_ff, bias=False), nn.Linear(d, d_ff, bias=False)
        self.mlp.w2 = nn.Linear(d_ff, d, bias=False)
        self.attn.register_buffer("rope_cache", torch.zeros(3, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return hidden states `(B, T, d)` for x `(B, T, d)`."""
        y = self.ln_attn(x)
        q = rotate(self.attn.wq(y).unflatten(-1, (self.n_heads, -1)), 50_000, interleaved=True)
        k = rotate(self.attn.wk(y).unflatten(-1, (self.n_kv_heads, -1)), 50_000, interleaved=True)
        v = self.attn.wv(y).unflatten(-1, (self.n_kv_heads, -1))
        k, v = (x.repeat_interleave(self.n_heads // self.n_kv_heads, dim=2) for x in (k, v))
        x = x + self.attn.wo(causal_attention(q, k, v))
        y = self.ln_mlp(x)
        return x + self.mlp.w2(F.silu(self.mlp.w1(y)) * self.mlp.w3(y))


class PianoNet(nn.Module):
    """The model of examples/custom_map.toml, with unknown names."""

    def __init__(self, vocab_size: int = 31, d: int = 32, n_heads: int = 8, n_kv_heads: int = 2, d_ff: int = 48):
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.token_table = nn.Embedding(vocab_size, d)
        self.decoder.blocks = nn.ModuleList(PianoLayer(d, n_heads, n_kv_heads, d_ff) for _ in range(2))
        self.decoder.ln_out = nn.RMSNorm(d, eps=1e-6)
        self.to_vocab = nn.Linear(d, vocab_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits `(B, T, V)` for ids `(B, T)`."""
        x = self.decoder.token_table(ids)
        for block in self.decoder.blocks:
            x = block(x)
        return self.to_vocab(self.decoder.ln_out(x))


def write_aria(path: Path, rows: int, d: int = 64, **more: tuple[int, ...]) -> Path:
    """Write weights like those of Aria, small and random: its names, heads of 64, no configuration beside them.

    more: names and shapes of other tensors, such as the adapter for embeddings of the demo.
    """
    torch.manual_seed(0)
    tensors = Aria(rows, d=d, n_heads=d // 64, n_layers=2).state_dict()
    tensors |= {name: torch.randn(shape) for name, shape in more.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), {name: mx.array(tensor.numpy()) for name, tensor in tensors.items()})
    return path
