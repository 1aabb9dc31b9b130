"""Load files of `torch.save` without executing code that they contain. Needs torch; imports no MLX."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import open_regular

if TYPE_CHECKING:
    from torch import Tensor

EXPECTED = "expected a complete file written by torch.save"
ADVICE = "save its state dict alone, torch.save(model.state_dict(), FILE), or as safetensors"


def load_plain(path: Path, device: str = "cpu", mapped: bool = False) -> Any:
    """Load a file that has only tensors and plain types.

    mapped: map the tensors instead of reading them; files from before PyTorch 1.6 cannot be mapped and are read

    Raises `UserError` if torch is not installed, or the file cannot be read or would run code.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading it needs PyTorch: pip install 'dsmr-mlx[convert]'") from None
    try:
        with open_regular(path) as file:
            zipped = file.read(4) == b"PK\x03\x04"  # since PyTorch 1.6
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch internals and deprecated storages
            return torch.load(path, map_location=device, weights_only=True, mmap=mapped and zipped)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), {EXPECTED}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return in one line why `torch.load` refused a file. Its own message suggests unsafe loading."""
    text = str(error)
    if wanted := re.search(r"GLOBAL ([\w.]+)", text):
        return f"refused: it contains {wanted[1]}, not a tensor or plain value; nothing was executed: {ADVICE}"
    if "TorchScript" in text:
        return f"is a TorchScript program, expected weights: {ADVICE}"
    detail = re.search(r"WeightsUnpickler error: (.*)", text)
    line = (detail[1] if detail else text).split(". ")[0].strip().partition("\n")[0]
    if not re.search("[a-z]", line):  # a number that the pickle of another file seems to refer to
        line = type(error).__name__
    return f"cannot be read ({line}), {EXPECTED}"


def check_state_dict(path: str | Path, found: Any, expected: Mapping[str, "Tensor"]) -> None:
    """Raise `UserError` unless `found` has a float tensor of each name and shape in `expected`, and no others."""
    if not isinstance(found, Mapping):
        raise UserError(f"{path}: state_dict is a {type(found).__name__}, expected tensors by name")
    for name, tensor in expected.items():
        if name not in found:
            raise UserError(f"{path}: state_dict lacks {name}, expected the weights of its config")
        if (shown := _described(found[name])) != f"dense floats {tuple(tensor.shape)}":
            raise UserError(f"{path}: {name} is {shown}, expected dense floats {tuple(tensor.shape)} as in its config")
    if unknown := [name for name in found if name not in expected]:
        raise UserError(f"{path}: state_dict has {unknown[0]!r}, expected only the weights of its config")


def _described(value: Any) -> str:
    """Return the kind and shape of a value in a state dict."""
    import torch

    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    dense = value.is_floating_point() and value.layout == torch.strided and not value.is_meta
    kind = "dense floats" if dense else f"{value.dtype} ({value.layout}, {value.device})"
    return f"{kind} {tuple(value.shape)}"
