"""Weights in files of `torch.save`, read without running anything that they contain."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.convert.weights_file import to_mlx

if TYPE_CHECKING:
    import torch

# Names under which programs store a model's weights (Lightning, most others, DeepSpeed), the usual ones first.
STATE_DICTS = ("state_dict", "model_state_dict", "model_state", "model", "module", "weights", "network", "net")
# What names of other entries with tensors contain.
NOT_WEIGHTS = re.compile("optim|sched|scaler|rng")
# Under which a file may describe its model: nanoGPT's, and ours.
CONFIGS = ("model_args", "config")
# What tensors of PyTorch's types become.
SAME = (
    *("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "complex64"),
)
DTYPES = {"bool": mx.bool_, "float64": mx.float32} | {name: getattr(mx, name) for name in SAME}
EXPECTED = "expected a whole file written by torch.save"
ADVICE = "save its state dict alone, torch.save(model.state_dict(), FILE), or as safetensors"


class TorchFile:
    """The state dict in a file of `torch.save`, mapped into memory while this lives (loaded if of PyTorch before 1.6).

    `shapes` and `dtypes` (those that `read` gives) have its tensors in stored order. `entry` is the way to the state
    dict in the file, "" if the file is one. `configs` are tables beside it that may describe the model, `tokenizer`
    describes its tokens, None without.

    Raises `UserError` if torch is not installed, and for a file that cannot be read, asks to run code, has no state
    dict or more than one that could be meant, or has a tensor that is sparse, quantized or of a type that MLX lacks.
    """

    def __init__(self, path: Path):
        self.path = path
        content = _load(path)
        if not isinstance(content, Mapping):
            raise UserError(f"{path}: holds a {type(content).__name__}, expected a state dict: {ADVICE}")
        self.entry, state = _find_state_dict(path, content)
        self._tensors = _tensors_of(state)
        for name, tensor in self._tensors.items():
            _refuse_unreadable(f"{path}: {name}", tensor)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: DTYPES[_dtype(tensor)] for name, tensor in self._tensors.items()}
        configs = (content.get(key) for key in CONFIGS)
        self.configs: list[dict[str, Any]] = [dict(config) for config in configs if isinstance(config, Mapping)]
        tokenizer = content.get("tokenizer")
        self.tokenizer: dict | None = dict(tokenizer) if isinstance(tokenizer, Mapping) else None

    def read(self, name: str) -> mx.array:
        """A copy of one tensor, evaluated, in its stored type; float64 becomes float32.

        Raises `KeyError` for an unknown name, `UserError` for a value beyond float32.
        """
        import torch

        tensor = self._tensors[name].detach().contiguous()
        is_bfloat16 = tensor.dtype == torch.bfloat16
        values = tensor.view(torch.uint16) if is_bfloat16 else tensor
        return to_mlx(values.numpy(), f"{self.path}: {name}", as_bfloat16=is_bfloat16)


def _load(path: Path) -> Any:
    """What a file holds, of plain types and tensors only."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading it needs PyTorch, expected pip install 'dsmr-mlx[convert]'") from None
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # since PyTorch 1.6, and the only kind that can be mapped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own internals and deprecated storages
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), {EXPECTED}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Why `torch.load` refused a file. Its own text is long, and suggests to load without this protection."""
    text = str(error)
    if wanted := re.search(r"GLOBAL ([\w.]+)", text):
        return f"refused, it asks for {wanted[1]}, which is no tensor or plain value; nothing was executed: {ADVICE}"
    if "TorchScript" in text:
        return f"is a TorchScript program, expected weights: {ADVICE}"
    detail = re.search(r"WeightsUnpickler error: (.*)", text)
    lines = (detail[1] if detail else text).split(". ")[0].splitlines() or [type(error).__name__]
    return f"cannot be read ({lines[0].strip()}), {EXPECTED}"


def _find_state_dict(path: Path, content: Mapping) -> tuple[str, Mapping]:
    """The state dict in what a file holds, and the way to it.

    It is looked for by the names that programs use, then by content: the entry, or the whole, with the most tensor
    elements. What optimizers and the like keep does not count.
    """
    for key in STATE_DICTS:
        entry = content.get(key)
        if isinstance(entry, Mapping):
            if _tensors_of(entry):
                return key, entry
            if any(isinstance(entry.get(inner), Mapping) for inner in STATE_DICTS):
                way, state = _find_state_dict(path, entry)
                return f"{key}.{way}", state
    candidates = {"": content} | {key: entry for key, entry in content.items() if isinstance(entry, Mapping)}
    candidates = {key: entry for key, entry in candidates.items() if not NOT_WEIGHTS.search(str(key).lower())}
    elements = {key: sum(t.numel() for t in _tensors_of(entry).values()) for key, entry in candidates.items()}
    most = max(elements.values())
    best = [key for key in candidates if elements[key] == most and _tensors_of(candidates[key])]
    if not best:
        held = ", ".join(map(str, [*content][:8])) or "nothing"
        raise UserError(f"{path}: has no tensors by name, only {held}, expected a state dict: {ADVICE}")
    if len(best) > 1:
        named = " and ".join(repr(key) for key in best)
        raise UserError(f"{path}: {named} hold {most} numbers each, expected one state dict: {ADVICE}")
    return str(best[0]), candidates[best[0]]


def _tensors_of(entries: Mapping) -> "dict[str, torch.Tensor]":
    import torch

    return {name: t for name, t in entries.items() if isinstance(name, str) and isinstance(t, torch.Tensor)}


def _dtype(tensor: "torch.Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _refuse_unreadable(what: str, tensor: "torch.Tensor") -> None:
    import torch

    dtype = _dtype(tensor)
    if tensor.layout != torch.strided:
        raise UserError(f"{what} is sparse, expected a dense tensor: save it with .to_dense()")
    if tensor.is_quantized or dtype not in DTYPES:
        raise UserError(f"{what} is {dtype}, expected float weights: save it as float16, bfloat16 or float32")
    if tensor.device.type != "cpu":
        raise UserError(f"{what} has no values (device {tensor.device}), expected weights")
