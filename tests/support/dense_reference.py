"""A second, plain implementation of DSMR: one dense masked pass over a whole piece, without state or fused kernels."""

import math

import mlx.core as mx
import numpy as np


def visibility(T: int, S: int, horizon: int) -> np.ndarray:
    """`(T, T)` bool: token t sees max(0, s − M) … t, with s = S⌊t/S⌋."""
    t = np.arange(T)[:, None]
    j = np.arange(T)[None]
    return (j <= t) & (j >= S * (t // S) - horizon)


def rope_frequencies(config) -> np.ndarray:
    """Return the radians per position of each pair of dimensions; llama3 as in Meta's `apply_scaling` of Llama 3.1."""
    scaling = config.rope_scaling
    frequencies = []
    for i in range(config.rope_dims // 2):
        frequency = 1 / config.rope_theta ** (2 * i / config.rope_dims)
        if scaling and scaling["type"] == "linear":
            frequency /= scaling["factor"]
        elif scaling:
            low, high, length = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["original_length"]
            wavelength = 2 * math.pi / frequency
            if wavelength > length / low:
                frequency /= scaling["factor"]
            elif wavelength >= length / high:
                smooth = (length / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
        frequencies.append(frequency)
    return np.array(frequencies)


def rope(x: mx.array, config, start: int = 0) -> mx.array:
    """Rotate the first `rope_dims` dimensions of `(B, H, T, D)` by the positions `start` … of the rows."""
    dims, half = config.rope_dims, config.rope_dims // 2
    if dims == 0:
        return x
    angle = np.arange(start, start + x.shape[2])[:, None] * rope_frequencies(config)
    cos, sin = mx.array(np.cos(angle).astype(np.float32)), mx.array(np.sin(angle).astype(np.float32))
    if config.rope_interleaved:
        a, b = x[..., 0:dims:2], x[..., 1:dims:2]
        rotated = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(*x.shape[:3], dims)
    else:
        a, b = x[..., :half], x[..., half:dims]
        rotated = mx.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return mx.concatenate([rotated, x[..., dims:]], axis=-1)


def rms_norm(x: mx.array, module, config) -> mx.array:
    """Apply an RMSNorm over the last axis with the weights of a module."""
    return x * mx.rsqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * module.weight


def norm(x: mx.array, module, config) -> mx.array:
    """Apply an RMSNorm or LayerNorm with the weights of a module."""
    if config.norm == "rms":
        return rms_norm(x, module, config)
    centred = x - x.mean(-1, keepdims=True)
    y = centred * mx.rsqrt((centred * centred).mean(-1, keepdims=True) + config.norm_eps) * module.weight
    return y + module.bias if "bias" in module else y


def activation(x: mx.array, name: str) -> mx.array:
    """Apply an activation, written out."""
    if name == "silu":
        return x / (1 + mx.exp(-x))
    if name == "relu":
        return mx.where(x > 0, x, 0)
    if name == "gelu":
        return 0.5 * x * (1 + mx.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def matrix(module) -> mx.array:
    """Return the dequantized weight of a linear layer or an embedding."""
    if "scales" not in module:
        return module.weight
    return mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)


def linear(x: mx.array, module) -> mx.array:
    """Apply a linear layer, which may be quantized."""
    y = x @ matrix(module).T
    return y + module.bias if "bias" in module else y


def canon(x: mx.array, module, constant_before: int) -> mx.array:
    """Add to `(B, T, d_model)` a weighted sum of each position and the three before it."""
    B, T, d = x.shape
    seen = mx.concatenate([mx.stop_gradient(x[:, :constant_before]), x[:, constant_before:]], axis=1)
    seen = mx.concatenate([mx.zeros((B, 3, d)), seen], axis=1)
    return x + sum(module.weight[:, j] * seen[:, j : j + T] for j in range(4))


def feed_forward(h: mx.array, module, c) -> mx.array:
    if c.gated:
        gate_up = linear(h, module.gate_up)
        h = activation(gate_up[..., : c.d_ff], c.activation) * gate_up[..., c.d_ff :]
    else:
        h = activation(linear(h, module.up), c.activation)
    return linear(h, module.down)


def dense_logits(model, tokens: np.ndarray, constant_before: int = 0) -> mx.array:
    """Return the logits `(B, T, V)`.

    What later positions read of the positions below `constant_before` has no gradient: keys, values and the inputs of
    convolutions.
    """
    c = model.config
    tokens = mx.array(tokens)
    B, T = tokens.shape
    group = c.n_heads // c.n_kv_heads
    x = matrix(model.embed)[tokens]
    if c.max_positions is not None:
        x = x + model.positions.weight[:T]
    embedded, first_values = x, None
    for block, horizon in zip(model.layers, c.horizons, strict=True):
        if c.embedding_skip:
            x = block.skip[0] * x + block.skip[1] * embedded
        h = norm(x, block.attention_norm, c)
        if c.canon:
            h = canon(h, block.attention_canon, constant_before)
        qkv = linear(h, block.attention.qkv)
        qkv = qkv.reshape(B, T, c.n_heads + 2 * c.n_kv_heads, c.head_dim).transpose(0, 2, 1, 3)
        q, k, v = qkv[:, : c.n_heads], qkv[:, c.n_heads : -c.n_kv_heads], qkv[:, -c.n_kv_heads :]
        if c.qk_norm:
            q, k = rms_norm(q, block.attention.q_norm, c), rms_norm(k, block.attention.k_norm, c)
        q, k = rope(q, c), rope(k, c)
        if first_values is None:
            first_values = v
        elif c.value_residual:
            v = block.attention.value_shares[0] * v + block.attention.value_shares[1] * first_values
        k, v = (
            mx.concatenate([mx.stop_gradient(a[:, :, :constant_before]), a[:, :, constant_before:]], axis=2)
            for a in (k, v)
        )
        k, v = mx.repeat(k, group, axis=1), mx.repeat(v, group, axis=1)
        scores = (q @ k.transpose(0, 1, 3, 2)) / math.sqrt(c.head_dim)
        scores = mx.where(mx.array(visibility(T, c.segment_length, horizon)), scores, -mx.inf)
        weights = mx.exp(scores - scores.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True)) @ v
        attended = linear(y.transpose(0, 2, 1, 3).reshape(B, T, -1), block.attention.out)
        h = norm(x if c.parallel_residual else x + attended, block.feed_forward_norm, c)
        if c.canon:
            h = canon(h, block.feed_forward_canon, constant_before)
        x = x + attended + feed_forward(h, block.feed_forward, c)
    x = norm(x, model.norm, c)
    logits = x @ matrix(model.embed).T if c.tie_embeddings else linear(x, model.head)
    logits = logits if c.logit_softcap is None else c.logit_softcap * mx.tanh(logits / c.logit_softcap)
    for i in c.never_predicted:
        logits[..., i] = -1e9
    return logits
