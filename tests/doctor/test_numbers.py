"""Checks of numbers find nothing here, and each the fault that it is there for."""

from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
from support.findings import wrong

from dsmr_mlx.doctor import numbers
from dsmr_mlx.doctor.finding import Status
from dsmr_mlx.model import canon, dsmr, embedding
from dsmr_mlx.model.dsmr import DSMR

CHUNKS = numbers.CHUNKS


def test_logits(monkeypatch):
    assert not wrong(numbers.check_logits(full=False))
    rotate = dsmr.rotate
    monkeypatch.setattr(dsmr, "rotate", lambda x, config, offset, angles: rotate(x, config, offset * (x.shape[2] > 40)))
    assert wrong(numbers.check_logits(full=False))


def test_half_precision(monkeypatch):
    assert not wrong(numbers.check_half_precision())
    logits = DSMR.logits
    coarse = lambda self, x: mx.round(logits(self, x)) if x.dtype == mx.bfloat16 else logits(self, x)  # noqa: E731
    monkeypatch.setattr(DSMR, "logits", coarse)
    assert wrong(numbers.check_half_precision())


@pytest.mark.parametrize("many", [False, True])
def test_quantized_weights(monkeypatch, many):
    """A fault is found in products with vectors and in those with matrices."""
    assert not wrong(numbers.check_quantized(full=False))
    product = mx.quantized_matmul

    def faulty(x, *a, **b):
        y = product(x, *a, **b)
        return y * 1.01 if (x.shape[-2] > 8) is many else y

    monkeypatch.setattr(mx, "quantized_matmul", faulty)
    assert wrong(numbers.check_quantized(full=False))


def test_weights_are_quantized_on_the_cpu(monkeypatch):
    """A GPU that rounds ties in another direction is right."""
    quantize, on, devices = mx.quantize, numbers.on, []

    @contextmanager
    def noted(device):
        devices.append(device)
        with on(device):
            yield
        devices.pop()

    def rounding(w, *a, **b):
        parts = quantize(w, *a, **b)
        return parts if devices == [mx.cpu] else (parts[0] ^ 1, *parts[1:])

    monkeypatch.setattr(numbers, "on", noted)
    monkeypatch.setattr(mx, "quantize", rounding)
    assert not wrong(numbers.check_quantized(full=False))


@pytest.mark.parametrize("beyond", [-1, 4096, 50_000])
def test_rotary_positions(monkeypatch, beyond):
    assert not wrong(numbers.check_positions())
    rope = mx.fast.rope

    def faulty(x, dims, *, offset, **options):
        return rope(x, dims, offset=mx.where(offset > beyond, offset + 1, offset), **options)

    monkeypatch.setattr(mx.fast, "rope", faulty)
    assert wrong(numbers.check_positions())


def test_shared_angles(monkeypatch):
    cos = mx.cos
    monkeypatch.setattr(mx, "cos", lambda x: cos(mx.minimum(x, 5000)))
    assert wrong(numbers.check_positions())


@pytest.mark.parametrize(
    ("module", "name"),
    [(embedding, "look_up"), (canon, "_convolution"), (dsmr, "segment_attention"), (dsmr, "view_attention")],
)
def test_gradients(monkeypatch, module, name):
    """Each function that has a gradient of its own matters."""
    assert not wrong(numbers.check_gradients())
    function = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: mx.stop_gradient(function(*arguments)))
    assert wrong(numbers.check_gradients())


def fused(monkeypatch, refuses):
    """Check fused attention on a GPU that refuses some shapes. Return the finding and how often it was called."""
    calls = []

    def attention(q, k, v, *, scale, mask, force_fused):
        calls.append((q.shape, k.shape, q.dtype, mask.shape))
        if refuses(q, k):
            raise ValueError("no kernel")
        return q

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    return numbers.check_fused_attention(), calls


def of_metal(q, k):
    """What MLX's kernels on Metal do not take."""
    return q.shape[-1] not in (64, 80, 128) or (q.shape[2] <= 8 and q.shape[2] * q.shape[1] // k.shape[1] > 32)


def of_cuda(q, k):
    """What CUDA does not take, with a mask that is an array."""
    return q.dtype == mx.float32


def test_fused_attention(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(numbers, "CHUNKS", CHUNKS)
    found, calls = fused(monkeypatch, of_metal)
    assert not wrong(found)
    assert f"all {len(calls)} shapes" in found.text
    assert {(q[1], k[1]) for q, k, *_ in calls} == {(4, 4), (4, 2), (8, 8), (8, 4)}
    assert {dtype for _, _, dtype, _ in calls} == {mx.float32, mx.bfloat16}
    assert {q[2] for q, *_ in calls} >= set(CHUNKS)
    found, calls = fused(monkeypatch, lambda q, k: q.shape[2] == 1)
    assert wrong(found)
    assert "not reached at" in found.text


def test_attention_that_is_not_fused_on_cuda_is_a_fact(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    found, calls = fused(monkeypatch, of_cuda)
    assert found.status == Status.NOTE
    assert not found.advice
    assert f"not reached at {len(calls) // 2} of {len(calls)} shapes" in found.text


def test_log_softmax():
    logits = np.random.default_rng(0).normal(size=(3, 7))
    assert np.allclose(np.exp(numbers.log_softmax(logits)).sum(axis=-1), 1)
