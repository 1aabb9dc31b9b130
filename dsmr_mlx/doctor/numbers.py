"""Whether what the device computes is right: against the CPU, and against plain formulas."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from dsmr_mlx.doctor.finding import Finding, Status, judged
from dsmr_mlx.model import canon, dsmr, embedding
from dsmr_mlx.model.attention import as_bias
from dsmr_mlx.model.checkpoint import load_config_and_tokenizer
from dsmr_mlx.model.checkpoint_folder import resolve
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.device import on_gpu
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.memory_blocks import is_long
from dsmr_mlx.model.quantization import is_quantized, quantize_model
from dsmr_mlx.model.rotary import Angles, rotate
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.training.settings import build_config

MAX_ERROR = 1e-3  # of logits in float32
MAX_DIVERGENCE = 1e-3  # nats between float32 and bfloat16
MAX_GRADIENT_ERROR = 1e-3  # of the largest gradient of a weight
CHUNKS = (1, 5, 8, 9, 33, 128)  # tokens read at once: MLX chooses other kernels from 1, 9 and 33 on
LENGTH = 300  # tokens, more than two segments
POSITIONS = (0, 8192, 100_000)
ADVICE = "update macOS and MLX (pip install --upgrade mlx); if it stays, use DSMR_DEVICE=cpu and report it"


@contextmanager
def on(device: mx.Device) -> Iterator[None]:
    """Compute on a device within the block."""
    before = mx.default_device()
    mx.set_default_device(device)
    try:
        yield
    finally:
        mx.set_default_device(before)


def new_model(preset: str = "small", **settings: Any) -> DSMR:
    """A model of a preset's shape with random weights that predicts unevenly, as trained models do."""
    options = {"canon": "true", "zero_init": "false"} | settings
    config = build_config(preset, settings=[f"{name}={value}" for name, value in options.items()])
    return seeded(config.model_config(PerformanceTokenizer()))


def seeded(config: ModelConfig) -> DSMR:
    """A model with the same random weights each time."""
    mx.random.seed(0)
    model = DSMR(config).eval()
    model.embed.weight = model.embed.weight * 15
    mx.eval(model.parameters())
    return model


def tokens(lanes: int, length: int, vocab_size: int) -> mx.array:
    """Ids `(lanes, length)`, the same each time."""
    return mx.array(np.random.default_rng(0).integers(3, vocab_size, (lanes, length)), mx.int32)


def logits_of(model: DSMR, ids: mx.array, chunk: int) -> np.ndarray:
    """Logits `(B, T, V)`, float32, if so many tokens are read at once."""
    state, parts = None, []
    for begin in range(0, ids.shape[1], chunk):
        logits, state = model(ids[:, begin : begin + chunk], state)
        parts.append(np.array(logits))
    return np.concatenate(parts, axis=1)


def check_logits(full: bool) -> Finding:
    """Logits read in chunks of every size, by one lane and by four, against the CPU, which reads all at once."""
    model, worst = new_model(), {}
    for lanes in (1, 4):
        ids = tokens(lanes, LENGTH, model.config.vocab_size)
        with on(mx.cpu):
            expected = logits_of(model, ids, LENGTH)
        for chunk in CHUNKS if full or lanes == 1 else (1, 128):
            error = float(np.abs(logits_of(model, ids, chunk) - expected).max())
            worst[f"{lanes} × {chunk}"] = error
    largest = max(worst.values())
    text = f"chunks of {', '.join(map(str, CHUNKS))} tokens differ by at most {largest:.1e}"
    return judged(largest <= MAX_ERROR, text, {"largest": largest, "differences": worst}, ADVICE)


def check_half_precision() -> Finding:
    """How far the predictions in bfloat16 are from those in float32."""
    model = new_model()
    ids = tokens(1, LENGTH, model.config.vocab_size)
    exact = log_softmax(logits_of(model, ids, LENGTH))
    model.set_dtype(mx.bfloat16)
    half = log_softmax(logits_of(model, ids, LENGTH))
    divergence = float((np.exp(exact) * (exact - half)).sum(axis=-1).mean())
    values = {"nats": divergence}
    text = f"bfloat16 is {divergence:.1e} nats from float32"
    return judged(divergence <= MAX_DIVERGENCE, text, values, ADVICE)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities, in float64."""
    logits = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def check_quantized(full: bool) -> Finding:
    """Logits with weights of 4 and 8 bits, in chunks, against those with the same weights as floats, on the CPU.

    One layer of `base`, because products with quantized weights are slow on a CPU. The CPU quantizes for both: Metal
    rounds ties in another direction.
    """
    chunks, worst = CHUNKS if full else (1, 9, 33), {}
    wide = partial(new_model, "base", n_layers=1, segment_length=128, horizons="uniform:64")
    for bits in (4, 8):
        quantization = {"group_size": 64, "bits": bits}
        model, reference = wide(), wide()
        ids = tokens(1, max(chunks) + 5, model.config.vocab_size)
        with on(mx.cpu):
            quantize_model(model, quantization)
            reference.update(tree_map_with_path(partial(dequantized, quantization), reference.parameters()))
            expected = logits_of(reference, ids, ids.shape[1])
        for chunk in chunks:
            worst[f"{bits} bits, {chunk}"] = float(np.abs(logits_of(model, ids, chunk) - expected).max())
    largest = max(worst.values())
    text = f"4 and 8 bits differ by at most {largest:.1e} from the same weights as floats"
    return judged(largest <= MAX_ERROR, text, {"differences": worst}, ADVICE)


def dequantized(quantization: dict[str, int], name: str, weight: mx.array) -> mx.array:
    """A weight as a quantized model sees it."""
    if not is_quantized(name):
        return weight
    return mx.dequantize(*mx.quantize(weight, **quantization), **quantization)


def check_positions() -> Finding:
    """Rotary positions near the start and far from it, against the formula in float64."""
    config, T = new_model().config, 5
    dims, D = config.rope_dims, config.head_dim
    x = np.random.default_rng(0).uniform(-1, 1, (1, 2, T, D))
    errors, wrong = {}, False
    for position in POSITIONS:
        offset = mx.array([position], mx.int32)
        ways = (None, Angles.of(config, offset, T))  # MLX's kernel; the angles that layers share on a CPU
        found = np.array([rotate(mx.array(x, mx.float32), config, offset, angles) for angles in ways])
        angles = (position + np.arange(T))[:, None] * config.rope_theta ** (-np.arange(0, dims, 2) / dims)
        a, b = np.split(x[..., :dims], 2, axis=-1)  # the halves are pairs: no preset interleaves them
        cos, sin = np.cos(angles), np.sin(angles)
        expected = np.concatenate([a * cos - b * sin, a * sin + b * cos, x[..., dims:]], axis=-1)
        errors[position] = float(np.abs(found - expected).max())
        # An angle in float32 is off by up to 2⁻²⁴ of itself, for each of a few operations.
        wrong |= not errors[position] <= 1e-5 + position * 2.0**-21
    text = ", ".join(f"{error:.1e} at {position:,}" for position, error in errors.items())
    return judged(not wrong, f"off by {text}", {"differences": errors}, ADVICE)


def check_gradients() -> Finding:
    """The gradients of all weights of a model over one segment, against MLX's own differentiation on the CPU.

    One layer has a memory so long that it is attended to in blocks. The reference sees the same tokens at once.
    """
    model = new_model("tiny", horizons="two-scale:long=1x4096,short=256")
    ids = tokens(2, 2 * model.config.segment_length + 1, model.config.vocab_size)
    found = gradients_of(model, ids)
    with on(mx.cpu), automatic_gradients():
        reference = DSMR(replace(model.config, horizons=[256] * model.config.n_layers)).eval()
        reference.update(model.parameters())
        expected = gradients_of(reference, ids)
    errors = {name: float(np.abs(found[name] - g).max() / np.abs(g).max()) for name, g in expected.items()}
    wrong = {name: error for name, error in errors.items() if not error <= MAX_GRADIENT_ERROR}
    worst = max(wrong or errors, key=errors.get)
    text = f"differ by at most {errors[worst]:.1e} of the largest of a weight ({worst})"
    return judged(not wrong, text, {"differences": wrong or {worst: errors[worst]}}, ADVICE)


def gradients_of(model: DSMR, ids: mx.array) -> dict[str, np.ndarray]:
    """The gradient of each weight for the second of two segments; ids: `(B, 2S + 1)`."""
    S = model.config.segment_length
    state = model(ids[:, :S])[1].opened()
    window = state.window(S)
    biases = {horizon: as_bias(mask, S, horizon + S, mx.float32) for horizon, mask in window.masks.items()}
    window = replace(window, biases=biases)

    def loss(model: DSMR) -> mx.array:
        hidden, _ = model.forward(ids[:, S : 2 * S], state.layers, window)
        return nn.losses.cross_entropy(model.logits(hidden), ids[:, S + 1 :], reduction="mean")

    gradients = nn.value_and_grad(model, loss)(model)[1]
    return {name: np.array(gradient) for name, gradient in tree_flatten(gradients)}


@contextmanager
def automatic_gradients() -> Iterator[None]:
    """Within the block, plain formulas replace the functions that have a gradient of their own."""
    with (
        mock.patch.object(dsmr, "segment_attention", plain_attention),
        mock.patch.object(embedding, "look_up", lambda weight, ids: weight[ids]),
        mock.patch.object(canon, "_convolution", plain_convolution),
    ):
        yield


def plain_attention(q, k, v, keys, values, bias):
    """The formula of attention; as `segment_attention`."""
    keys, values = (mx.repeat(each, q.shape[1] // each.shape[1], axis=1) for each in (keys, values))
    scores = q @ keys.swapaxes(-1, -2) * q.shape[-1] ** -0.5 + bias
    return mx.softmax(scores, axis=-1) @ values


def plain_convolution(x, weight, seen):
    """The formula of Canon layers; as `canon._convolution`, but with x itself in the taps, for its gradient."""
    before = canon.CANON_WIDTH - 1
    rows = mx.concatenate([seen[:, :before], x], axis=1)  # (B, W − 1 + T, d_model)
    return x + sum(weight[:, j] * rows[:, j : j + x.shape[1]] for j in range(before + 1))


def check_fused_attention() -> Finding:
    """Whether MLX has one kernel for attention at every shape that playing and reading use."""
    if not on_gpu():
        return Finding("", Status.NOTE, "not checked: a CPU has no fused attention")
    shapes, refused = attention_shapes(), {}
    for heads, shared, n, slots, D, dtype in shapes:
        q = mx.random.normal((1, heads, n, D)).astype(dtype)
        keys = mx.random.normal((1, shared, slots, D)).astype(dtype)
        mask = mx.ones((1, 1, n, slots), mx.bool_)
        try:
            mx.eval(mx.fast.scaled_dot_product_attention(q, keys, keys, scale=1.0, mask=mask, force_fused=True))
        except (ValueError, RuntimeError) as error:
            name = f"{heads} heads of {shared}, {n} × {slots} in {str(dtype).removeprefix('mlx.core.')}"
            refused[name] = " ".join(str(error).split())
    if not refused:
        return Finding("", Status.OK, f"reached at all {len(shapes)} shapes", {"refused": refused})
    text = f"not reached at {len(refused)} of {len(shapes)} shapes, such as {next(iter(refused))}"
    if not mx.metal.is_available():  # CUDA has none for float32 with a mask
        return Finding("", Status.NOTE, text, {"refused": refused})
    return judged(False, text, {"refused": refused}, ADVICE)


def attention_shapes() -> list[tuple[int, int, int, int, int, mx.Dtype]]:
    """The shapes that the presets and the bundled model use: heads, heads of keys, queries, slots, D, dtype.

    Also with half the heads of keys, a setting of training. For up to 8 queries, MLX takes at most 32 rows for each of
    these.
    """
    tokenizer = PerformanceTokenizer()
    configs = [build_config(preset).model_config(tokenizer) for preset in ("small", "base")]
    shapes = {
        (c.n_heads, shared, n, horizon + c.segment_length, c.head_dim, dtype)
        for c in [*configs, load_config_and_tokenizer(resolve(None))[0]]
        for horizon in c.horizons
        if not is_long(horizon)
        for shared in (c.n_kv_heads, c.n_heads // 2)
        for n in {*CHUNKS, c.segment_length}
        for dtype in (mx.float32, mx.bfloat16)
        if n <= c.segment_length and (n > 8 or n * c.n_heads // shared <= 32)
    }
    return sorted(shapes, key=str)
