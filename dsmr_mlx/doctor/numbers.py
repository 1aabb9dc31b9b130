"""Whether what the device computes is right: against the CPU, and against plain formulas."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from dsmr_mlx.doctor.finding import Finding, Status, judged
from dsmr_mlx.model.attention import as_bias, segment_attention
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.training.settings import build_config

MAX_ERROR = 1e-3  # of logits in float32
MAX_DIVERGENCE = 1e-3  # nats between float32 and bfloat16
MAX_GRADIENT_ERROR = 1e-4  # relative
CHUNKS = (1, 5, 8, 9, 33, 128)  # tokens read at once: MLX chooses other kernels from 1, 9 and 33 on
LENGTH = 300  # tokens, more than two segments
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
    from dsmr_mlx.tokenizers.performance import PerformanceTokenizer

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


def check_quantized() -> Finding:
    """Products with weights of 4 and 8 bits against products with the same weights as floats."""
    rng, errors = np.random.default_rng(0), {}
    weight, x = (mx.array(rng.normal(size=shape), mx.float32) for shape in ((256, 512), (7, 512)))
    for bits in (4, 8):
        packed, scales, biases = mx.quantize(weight, group_size=64, bits=bits)
        product = mx.quantized_matmul(x, packed, scales, biases, transpose=True, group_size=64, bits=bits)
        with on(mx.cpu):
            expected = x @ mx.dequantize(packed, scales, biases, group_size=64, bits=bits).T
            errors[bits] = float(mx.abs(product - expected).max() / mx.abs(expected).max())
    largest = max(errors.values())
    text = f"4 and 8 bits differ by at most {largest:.1e} of the largest product"
    return judged(largest <= MAX_ERROR, text, {"differences": errors}, ADVICE)


def check_gradients() -> Finding:
    """The gradient of attention over a memory against that of the plain formula, on the CPU."""
    rng, (B, H, H_kv, S, M, D) = np.random.default_rng(0), (2, 4, 2, 16, 24, 8)
    q, dy = (mx.array(rng.normal(size=(B, H, S, D)), mx.float32) for _ in range(2))
    k, v = (mx.array(rng.normal(size=(B, H_kv, S, D)), mx.float32) for _ in range(2))
    memory = [mx.array(rng.normal(size=(B, H_kv, M, D)), mx.float32) for _ in range(2)]
    bias = as_bias("causal", S, M + S, mx.float32)

    def loss(attend: Callable, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        keys, values = (mx.concatenate(pair, axis=2) for pair in zip(memory, (k, v), strict=True))
        return (attend(q, k, v, keys, values, bias) * dy).sum()

    found = mx.grad(partial(loss, segment_attention), argnums=(0, 1, 2))(q, k, v)
    mx.eval(found)
    with on(mx.cpu):
        expected = mx.grad(partial(loss, plain_attention), argnums=(0, 1, 2))(q, k, v)
        errors = [float(mx.abs(a - b).max() / mx.abs(b).max()) for a, b in zip(found, expected, strict=True)]
    text = f"attention differs by {max(errors):.1e} of its largest gradient"
    return judged(max(errors) <= MAX_GRADIENT_ERROR, text, {"differences": errors}, ADVICE)


def plain_attention(q, k, v, keys, values, bias):
    """The formula of attention; as `segment_attention`."""
    keys, values = (mx.repeat(each, q.shape[1] // each.shape[1], axis=1) for each in (keys, values))
    scores = q @ keys.swapaxes(-1, -2) * q.shape[-1] ** -0.5 + bias
    return mx.softmax(scores, axis=-1) @ values


def check_fused_attention() -> Finding:
    """Whether MLX has one kernel for attention at every shape that playing and reading use."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return Finding("", Status.NOTE, "not checked: a CPU has no fused attention")
    refused, D = [], 64
    for n in CHUNKS:
        q, keys = mx.random.normal((1, 4, n, D)), mx.random.normal((1, 4, 1152, D))
        mask = mx.ones((n, 1152), mx.bool_)
        try:
            mx.eval(mx.fast.scaled_dot_product_attention(q, keys, keys, scale=1.0, mask=mask, force_fused=True))
        except (ValueError, RuntimeError) as error:
            refused.append(f"{n}: {error}")
    text = "reached at every shape" if not refused else f"not reached with {', '.join(refused)} queries"
    return judged(not refused, text, {"refused": refused}, ADVICE)
