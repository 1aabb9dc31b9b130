"""Read weights in files of `torch.save` without executing code that they contain."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import open_regular
from dsmr_mlx.convert.safetensors_file import to_mlx

if TYPE_CHECKING:
    import torch

# Keys of the weights in checkpoints of Lightning, DeepSpeed and others, in the order in which they are tried.
STATE_DICTS = ("state_dict", "model_state_dict", "model_state", "model", "module", "weights", "network", "net")
MAX_DEPTH = 4  # nesting of the entries that are searched for a state dict
# Matches keys of other entries with tensors.
OTHER_ENTRIES = re.compile("optim|sched|scaler|rng")
# Keys of the configuration: of nanoGPT, and of this program.
CONFIGS = ("model_args", "config")
SAME_IN_MLX = (
    *("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "complex64"),
)
DTYPES = {"bool": mx.bool_, "float64": mx.float32} | {name: getattr(mx, name) for name in SAME_IN_MLX}
EXPECTED = "expected a complete file written by torch.save"
ADVICE = "save its state dict alone, torch.save(model.state_dict(), FILE), or as safetensors"


class TorchFile:
    """The state dict in a file of `torch.save`, memory-mapped (files from before PyTorch 1.6 are loaded).

    weights: its key in the file; None: see `_find_state_dict`

    shapes     tensor name → shape, in stored order
    dtypes     tensor name → dtype that `read` returns
    entry      key of the state dict in the file, such as "model.state_dict"; "" if the file is a state dict
    left_out   key → number of tensors of other entries with weights, such as averages
    configs    other entries that may be the configuration of the model
    tokenizer  the stored tokenizer, or None

    Raises `UserError` if torch is not installed, the file cannot be read, would run code, or has no state dict or
    several, or a tensor is sparse, quantized or of a type that MLX lacks.
    """

    def __init__(self, path: Path, weights: str | None = None):
        self.path = path
        content, self._size = _load(path), path.stat().st_size
        if not isinstance(content, Mapping):
            raise UserError(f"{path}: contains a {type(content).__name__}, expected a state dict: {ADVICE}")
        self.entry, state_dict = (
            _find_state_dict(path, content) if weights is None else _entry_named(path, content, weights)
        )
        self.left_out = _left_out(content, self.entry) if self.entry else {}
        self._tensors = _tensors_of(state_dict)
        for name, tensor in self._tensors.items():
            _check_readable(f"{path}: {name}", tensor)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: DTYPES[_dtype(tensor)] for name, tensor in self._tensors.items()}
        configs = (content.get(key) for key in CONFIGS)
        self.configs: list[dict[str, Any]] = [dict(config) for config in configs if isinstance(config, Mapping)]
        tokenizer = content.get("tokenizer")
        self.tokenizer: dict | None = dict(tokenizer) if isinstance(tokenizer, Mapping) else None

    def read(self, name: str) -> mx.array:
        """Return a copy of one tensor, evaluated, in its stored type; float64 becomes float32.

        Raises `KeyError` for an unknown name, `UserError` for a value beyond the range of float32.
        """
        import torch

        if self.path.stat().st_size != self._size:  # it is mapped: reading past its end would kill the process
            raise UserError(f"{self.path}: the file was changed while in use")
        tensor = self._tensors[name].detach().contiguous()
        is_bfloat16 = tensor.dtype == torch.bfloat16
        values = tensor.view(torch.uint16) if is_bfloat16 else tensor
        return to_mlx(values.numpy(), f"{self.path}: {name}", as_bfloat16=is_bfloat16)


def _load(path: Path) -> Any:
    """Load a file that has only tensors and plain types."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading it needs PyTorch: pip install 'dsmr-mlx[convert]'") from None
    try:
        with open_regular(path) as file:
            zipped = file.read(4) == b"PK\x03\x04"  # since PyTorch 1.6; only these can be mapped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch internals and deprecated storages
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
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
    lines = (detail[1] if detail else text).split(". ")[0].splitlines() or [type(error).__name__]
    return f"cannot be read ({lines[0].strip()}), {EXPECTED}"


def _find_state_dict(path: Path, content: Mapping, depth: int = 0) -> tuple[str, Mapping]:
    """Return the key of the state dict in a file, and the state dict.

    Known keys are tried first, then the entry, or the whole file, with most tensor elements. Entries of optimizers and
    the like are skipped.
    """
    for key in STATE_DICTS:
        entry = content.get(key)
        if isinstance(entry, Mapping):
            if _tensors_of(entry):
                return key, entry
            if depth < MAX_DEPTH and any(isinstance(entry.get(inner), Mapping) for inner in STATE_DICTS):
                inner_key, state_dict = _find_state_dict(path, entry, depth + 1)
                return f"{key}.{inner_key}", state_dict
    candidates = {"": content} | _candidates(content)
    elements = {key: sum(t.numel() for t in _tensors_of(entry).values()) for key, entry in candidates.items()}
    most = max(elements.values())
    best = [key for key in candidates if elements[key] == most and _tensors_of(candidates[key])]
    if not best:
        keys = ", ".join(map(str, [*content][:8])) or "nothing"
        raise UserError(f"{path}: contains no named tensors, only {keys}; expected a state dict: {ADVICE}")
    if len(best) > 1:
        named = " and ".join(repr(key) for key in best)
        raise UserError(
            f"{path}: {named} have {most} elements each, expected one state dict: `weights` {best[0]} takes one, or "
            f"{ADVICE}"
        )
    return best[0], candidates[best[0]]


def _entry_named(path: Path, content: Mapping, name: str) -> tuple[str, Mapping]:
    """Return the state dict under a key, such as "ema" or "ema.module", and its full key."""
    entry: Any = content
    for part in name.split("."):
        entry = entry.get(part) if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping):
        known = ", ".join(_weights_in(content)) or "none"
        raise UserError(f"{path}: has no weights {name}, expected one of its entries with tensors: {known}")
    if _tensors_of(entry):
        return name, entry
    inner, state_dict = _find_state_dict(path, entry)
    return f"{name}.{inner}" if inner else name, state_dict


def _left_out(content: Mapping, entry: str) -> dict[str, int]:
    """Return the entries with weights besides the chosen one, key → number of tensors."""
    return {key: n for key, n in _weights_in(content).items() if key != entry and not entry.startswith(f"{key}.")}


def _weights_in(content: Mapping) -> dict[str, int]:
    """Return the entries with tensors, at the top or one level below, key → number of tensors."""
    found = {}
    for key, entry in _candidates(content).items():
        inner = {f"{key}.{name}": value for name, value in _candidates(entry).items()}
        found |= {
            name: len(tensors) for name, value in {key: entry, **inner}.items() if (tensors := _tensors_of(value))
        }
    return found


def _candidates(content: Mapping) -> dict[str, Mapping]:
    """Return the entries that may hold weights."""
    mappings = {str(key): entry for key, entry in content.items() if isinstance(entry, Mapping)}
    return {key: entry for key, entry in mappings.items() if not OTHER_ENTRIES.search(key.lower())}


def _tensors_of(entries: Mapping) -> "dict[str, torch.Tensor]":
    import torch

    return {name: t for name, t in entries.items() if isinstance(name, str) and isinstance(t, torch.Tensor)}


def _dtype(tensor: "torch.Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_readable(what: str, tensor: "torch.Tensor") -> None:
    """Raise `UserError` for a tensor that MLX cannot represent."""
    import torch

    dtype = _dtype(tensor)
    if tensor.layout != torch.strided:
        raise UserError(f"{what} is sparse, expected a dense tensor: save it with .to_dense()")
    if tensor.is_quantized or dtype not in DTYPES:
        raise UserError(f"{what} is {dtype}, expected float weights: save it as float16, bfloat16 or float32")
    if tensor.device.type != "cpu":
        raise UserError(f"{what} has no values (device {tensor.device}), expected weights")
