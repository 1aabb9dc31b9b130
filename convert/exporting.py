"""A checkpoint → a DSMR PyTorch checkpoint, the same bits under the same names, see `reference`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import check_output, holds
from dsmr_mlx.convert import tokenizer_files
from dsmr_mlx.convert.weights_file import SafetensorsFile, write_safetensors
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.checkpoint_folder import verify
from dsmr_mlx.model.config import ModelConfig

if TYPE_CHECKING:
    import torch


def export(source: str | Path, out: str | Path, *, force: bool = False) -> Path:
    """Write a checkpoint, or a run's best, as `OUT.pt` (what `reference.load` reads) or `OUT.safetensors`.

    The safetensors file has configuration and tokenizer as JSON in its metadata, is written tensor by tensor, and needs
    no torch. Raises `UserError` for a quantized or damaged checkpoint, a missing torch, and an `out` with another
    suffix, that is a folder, lies in the checkpoint or run, or exists without `force`; `OSError` if it cannot be
    written whole.
    """
    folder = checkpoint.resolve(source)
    out = check_output("--to-pytorch", out, (".pt", ".safetensors"), force)
    if holds(source, out) or holds(folder, out):
        raise UserError(f"{out}: is inside of {source}, expected a file elsewhere")
    verify(folder)
    config = ModelConfig.load(folder / "config.json")
    if config.quantization is not None:
        raise UserError(f"{folder}: quantized, expected plain weights: export the checkpoint that it was made from")
    stored = SafetensorsFile(folder / "model.safetensors")
    tokenizer = tokenizer_files.pack(folder / "tokenizer")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() == ".safetensors":
        layout = {name: (stored.dtypes[name], shape) for name, shape in stored.shapes.items()}
        described = {"config": config.to_json(), "tokenizer": json.dumps(tokenizer)}
        write_safetensors(out, ((name, stored.read(name)) for name in layout), layout, described)
    else:
        try:
            from dsmr_mlx.convert import reference
        except ImportError:
            raise UserError(f"{out}: writing it needs PyTorch, expected pip install 'dsmr-mlx[convert]'") from None
        reference.write(out, config, {name: to_torch(stored.read(name)) for name in stored.shapes}, tokenizer)
    return out


def to_torch(array: mx.array) -> "torch.Tensor":
    """The same bits as a tensor; NumPy, which carries them over, has no bfloat16."""
    import torch

    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
