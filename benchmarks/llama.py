"""The sides of a comparison that use mlx-lm: DSMR's weights in its Llama, with its caches and its generation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from measuring import music, random_model, take
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.llama import Model, ModelArgs
from plain import in_steps

from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR


def logits_of(model: DSMR, ids: np.ndarray, window: int | None, last: int) -> np.ndarray:
    """Logits `(T, V)` after each of ids `(T,)`: all but the `last` in one call, those one by one.

    window: size of the rotating caches in tokens; None: growing caches.
    """
    llama = as_llama(model)
    caches = new_caches(llama, window)
    return in_steps(lambda tokens: llama(tokens, cache=caches).astype(mx.float32), ids, last)


def playing(config: ModelConfig, dtype: str, position: int, tokens: int, window: int | None) -> Callable[[], None]:
    """A turn generates some tokens with mlx-lm, starting after `position` tokens; see `logits_of`."""
    llama = as_llama(random_model(config, dtype))
    options = {"sampler": mx.random.categorical, "prompt_cache": new_caches(llama, window)}
    return partial(take, generate_step(mx.array(music(position)), llama, max_tokens=-1, **options), tokens)


def reading(config: ModelConfig, dtype: str, tokens: int, window: int | None) -> Callable[[], None]:
    """A turn reads `tokens` tokens with mlx-lm's generation, up to its first sampled token."""
    llama, ids = as_llama(random_model(config, dtype)), mx.array(music(tokens))
    return lambda: take(generate_step(ids, llama, max_tokens=0, prompt_cache=new_caches(llama, window)), 1)


def new_caches(llama: Any, window: int | None) -> list:
    """mlx-lm's caches, one per layer: rotating ones of `window` tokens, or growing ones."""
    return [KVCache() if window is None else RotatingKVCache(window) for _ in llama.layers]


def as_llama(model: DSMR) -> Any:
    """mlx-lm's Llama with the same weights."""
    llama = new_llama(model.config)
    llama.load_weights(list(llama_weights(model).items()), strict=True)
    mx.eval(llama.parameters())
    return llama


def new_llama(c: ModelConfig) -> Any:
    """mlx-lm's Llama of the same width and depth, with random weights."""
    arguments = ModelArgs(
        model_type="llama",
        hidden_size=c.d_model,
        num_hidden_layers=c.n_layers,
        intermediate_size=c.d_ff,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        rope_traditional=c.rope_interleaved,
        vocab_size=c.vocab_size,
        tie_word_embeddings=c.tie_embeddings,
    )
    return Model(arguments)


def llama_weights(model: DSMR) -> dict[str, mx.array]:
    """The weights under the names of mlx-lm's Llama."""
    c = model.config
    weights = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    if not c.tie_embeddings:
        weights["lm_head.weight"] = model.head.weight
    heads = [c.n_heads * c.head_dim, (c.n_heads + c.n_kv_heads) * c.head_dim]
    for i, block in enumerate(model.layers):
        q, k, v = mx.split(block.attention.qkv.weight, heads)
        gate, up = mx.split(block.feed_forward.gate_up.weight, 2)
        attention = {"q": q, "k": k, "v": v, "o": block.attention.out.weight}
        mlp = {"gate": gate, "up": up, "down": block.feed_forward.down.weight}
        layer = f"model.layers.{i}"
        weights |= {f"{layer}.self_attn.{name}_proj.weight": weight for name, weight in attention.items()}
        weights |= {f"{layer}.mlp.{name}_proj.weight": weight for name, weight in mlp.items()}
        weights[f"{layer}.input_layernorm.weight"] = block.attention_norm.weight
        weights[f"{layer}.post_attention_layernorm.weight"] = block.feed_forward_norm.weight
    return weights
