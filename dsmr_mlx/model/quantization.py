"""Weights stored in 4, 6 or 8 bits: groups of a row share a scale and a bias (`mx.quantize`).

The embedding and all linear layers are quantized. Norms, biases and learned positions, of which a step reads
little, stay floats.
"""

import mlx.core as mx
import mlx.nn as nn

QUANTIZED = ("embed", "qkv", "out", "gate_up", "up", "down", "head")


def is_quantized(name: str) -> bool:
    """Whether a quantized model holds the parameter of this name, as `layers.0.attention.qkv.weight`, quantized."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and module.split(".")[-1] in QUANTIZED


def quantize_arrays(name: str, array: mx.array, quantization: dict[str, int]) -> dict[str, mx.array]:
    """What a quantized model holds in place of one weight `[out, in]`: `X.weight`, `X.scales` and `X.biases`.

    The weight is uint32 `[out, in · bits / 32]`, the others `[out, in / group_size]` in the dtype of the array.
    `quantization` is that of `ModelConfig`, which sees to it that `in` is a multiple of the group size.
    """
    module = name.removesuffix(".weight")
    parts = mx.quantize(array, quantization["group_size"], quantization["bits"])
    return {f"{module}.{part}": values for part, values in zip(("weight", "scales", "biases"), parts, strict=True)}


def quantize_model(model: nn.Module, quantization: dict[str, int]) -> None:
    """Replace, in place, the layers whose weights `is_quantized` names."""
    nn.quantize(
        model,
        quantization["group_size"],
        quantization["bits"],
        class_predicate=lambda path, module: is_quantized(f"{path}.weight"),
    )


def logical_size(name: str, array: mx.array, quantization: dict[str, int] | None) -> int:
    """How many of the model's weights a parameter's array stands for."""
    if quantization is None:
        return array.size
    if name.endswith((".scales", ".biases")):
        return 0
    return array.size * 32 // quantization["bits"] if is_quantized(name) else array.size
