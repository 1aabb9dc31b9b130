"""Weights stored in 4, 6 or 8 bits; the values of a group within a row share a scale and a bias (`mx.quantize`).

The embedding and all linear layers are quantized. Norms, biases and learned positions are small and stay floats.
"""

import mlx.core as mx
import mlx.nn as nn

QUANTIZED = ("embed", "qkv", "out", "gate_up", "up", "down", "head")


def is_quantized(name: str) -> bool:
    """Return whether a quantized model stores this parameter quantized; name: as `layers.0.attention.qkv.weight`."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and module.split(".")[-1] in QUANTIZED


def quantize_arrays(name: str, array: mx.array, quantization: dict[str, int]) -> dict[str, mx.array]:
    """Quantize a weight `(out, in)` called `X.weight`. Return `X.weight`, `X.scales` and `X.biases` by name.

    The weight becomes uint32 `(out, in · bits / 32)`; scales and biases are `(out, in / group_size)` in the array's
    dtype. `in` must be a multiple of the group size, which `ModelConfig` checks.
    """
    module = name.removesuffix(".weight")
    parts = mx.quantize(array, quantization["group_size"], quantization["bits"])
    return {f"{module}.{part}": values for part, values in zip(("weight", "scales", "biases"), parts, strict=True)}


def quantize_model(model: nn.Module, quantization: dict[str, int]) -> None:
    """Replace, in place, the layers whose weights `is_quantized` selects."""
    nn.quantize(
        model,
        quantization["group_size"],
        quantization["bits"],
        class_predicate=lambda path, module: is_quantized(f"{path}.weight"),
    )


def logical_size(name: str, array: mx.array, quantization: dict[str, int] | None) -> int:
    """Return how many weights of the model a parameter's array represents; 0 for scales and biases."""
    if quantization is None:
        return array.size
    if name.endswith((".scales", ".biases")):
        return 0
    return array.size * 32 // quantization["bits"] if is_quantized(name) else array.size
