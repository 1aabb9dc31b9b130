"""Export a checkpoint to PyTorch: the same bits under the same names, see `reference`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import check_output, contains, read_regular
from dsmr_mlx.convert import tokenizer_files
from dsmr_mlx.convert.safetensors_file import SafetensorsFile, write_safetensors
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.checkpoint_folder import LICENCE, verify_checkpoint
from dsmr_mlx.model.config import ModelConfig

if TYPE_CHECKING:
    import torch


def export(source: str | Path, out: str | Path, *, force: bool = False) -> Path:
    """Write a checkpoint, or the best one of a run, as a .pt file for `reference.load` or as a .safetensors file.

    The .safetensors file stores configuration and tokenizer as JSON in its metadata, is written tensor by tensor, and
    does not need torch. Either file stores the licence of the checkpoint, if it has one, under `licence`; a conversion
    back writes it again.

    Raises `UserError` if the checkpoint is quantized or damaged, if its licence is not UTF-8, if torch is missing, or
    if `out` has another suffix, is a folder, lies in the checkpoint or run, or exists without `force`; `OSError` if
    writing fails.
    """
    folder = checkpoint.resolve(source)
    out = check_output("`out`", out, (".pt", ".safetensors"), force)
    if contains(source, out) or contains(folder, out):
        raise UserError(f"{out}: is inside {source}, expected a file elsewhere")
    verify_checkpoint(folder)
    config = ModelConfig.load(folder / "config.json")
    if config.lora is not None:
        raise UserError(f"{folder}: holds adapters only; export plain weights, which dsmr-mlx convert --fuse makes")
    if config.quantization is not None:
        raise UserError(f"{folder}: quantized; export the checkpoint it was made from")
    weights = SafetensorsFile(folder / "model.safetensors")
    tokenizer, licence = tokenizer_files.pack(folder / "tokenizer"), licence_entry(folder)
    if out.suffix.lower() == ".safetensors":
        layout = {name: (weights.dtypes[name], shape) for name, shape in weights.shapes.items()}
        metadata = {"config": config.to_json(), "tokenizer": json.dumps(tokenizer)} | licence
        write_safetensors(out, ((name, weights.read(name)) for name in layout), layout, metadata)
    else:
        try:
            from dsmr_mlx.convert import reference
        except ImportError:
            raise UserError(f"{out}: writing it needs PyTorch: pip install 'dsmr-mlx[convert]'") from None
        state_dict = {name: to_torch(weights.read(name)) for name in weights.shapes}
        reference.write(out, config, state_dict, tokenizer, **licence)
    return out


def licence_entry(folder: Path) -> dict[str, str]:
    """Return the text of the licence of a checkpoint as an entry of the file; {} without.

    Raises `UserError` if it is not UTF-8.
    """
    path = folder / LICENCE
    if not path.is_file():
        return {}
    try:
        return {"licence": read_regular(path).decode()}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected the text of a licence in UTF-8") from None


def to_torch(array: mx.array) -> "torch.Tensor":
    """Return an array as a torch tensor with the same bits."""
    import torch

    if array.dtype == mx.bfloat16:  # which NumPy lacks
        return torch.from_numpy(np.array(array.view(mx.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
