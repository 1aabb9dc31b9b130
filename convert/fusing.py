"""A checkpoint of adapters as a source of plain weights: those of its base with the adapters added, see `model.lora`.

The sums are float32, computed one tensor at a time from adapters in the type of the base's floats, as in inference. A
quantized base is dequantized.
"""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from dsmr_mlx.common.files import sha256
from dsmr_mlx.convert.safetensors_file import SafetensorsFile
from dsmr_mlx.convert.weights_source import WeightsSource
from dsmr_mlx.model.base import WEIGHTS, find_base
from dsmr_mlx.model.checkpoint import check_weights, lazy_arrays, load_checked
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.lora import PART, is_adapter, merged


class FusedSource(WeightsSource):
    """The fused weights of a checkpoint folder with adapters, float32 if they are computed, else as in its base.

    Raises `UserError` as `find_base` does, and if weights are missing, unknown or misshapen.
    """

    def __init__(self, folder: Path):
        self.model = ModelConfig.load(folder / "config.json")
        plain = replace(self.model, quantization=None, lora=None)
        expected = dict(tree_flatten(DSMR(self.model).parameters()))
        adapters = load_checked(folder, {name: p for name, p in expected.items() if is_adapter(name)})
        self.base = find_base(folder)
        path = self.base.folder / WEIGHTS
        check_weights(path, lazy_arrays(path), {name: p for name, p in expected.items() if not is_adapter(name)})
        self.file = SafetensorsFile(path)
        self.path, self.files = folder, [folder / WEIGHTS, path]
        self.shapes = {name: array.shape for name, array in tree_flatten(DSMR(plain).parameters())}
        self.floats = self.file.dtypes["norm.weight"]
        self.adapters = {name: array.astype(self.floats) for name, array in adapters.items()}
        computed = {f"{name.split(PART)[0]}.weight" for name in adapters}
        computed |= {name for name in self.shapes if f"{name.removesuffix('weight')}scales" in self.file.shapes}
        self.dtypes = {name: mx.float32 if name in computed else self.floats for name in self.shapes}
        self.config, self.config_name = plain.to_dict(), "config.json"
        self.tokenizer, self.entry, self.left_out = None, "", {}

    def read(self, name: str) -> mx.array:
        """Return one fused tensor, evaluated."""
        layer = name.removesuffix(".weight")
        weight = self.file.read(name)
        if f"{layer}.scales" in self.file.shapes:
            parts = [self.file.read(f"{layer}.{part}").astype(mx.float32) for part in ("scales", "biases")]
            weight = mx.dequantize(weight, *parts, **self.model.quantization)
        array = merged(weight, name, self.adapters, self.model).astype(self.dtypes[name])
        mx.eval(array)
        return array

    def sha256(self) -> dict[str, str]:
        """Return the SHA-256 of the adapters and of the base."""
        return {"adapters": sha256(self.path / WEIGHTS), "base": self.base.sha256}
