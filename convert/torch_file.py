"""Read weights in files of `torch.save` without executing code that they contain."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.convert.file_stamp import FileStamp
from dsmr_mlx.convert.safetensors_file import to_mlx
from dsmr_mlx.convert.torch_loading import ADVICE, EXPECTED, load_plain

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


class TorchFile:
    """The state dict in a file of `torch.save`, memory-mapped (files from before PyTorch 1.6 are loaded).

    weights: its key in the file; None: see `_find_state_dict`
    stamp: of the file when it was first opened; None: this is the first time

    shapes     tensor name → shape, in stored order
    dtypes     tensor name → dtype that `read` returns
    entry      key of the state dict in the file, such as "model.state_dict"; "" if the file is a state dict
    left_out   key → number of tensors of other entries with weights, such as averages
    configs    other entries that may be the configuration of the model
    tokenizer  the stored tokenizer, or None
    licence    the stored text of the licence of the weights, or None
    stamp      of the file when it was first opened

    Raises `UserError` if torch is not installed, the file cannot be read, was changed, would run code, or has no state
    dict or several, or a tensor is sparse, quantized or of a type that MLX lacks.
    """

    def __init__(self, path: Path, weights: str | None = None, stamp: FileStamp | None = None):
        self.path = path
        self.stamp = FileStamp.of(path, EXPECTED) if stamp is None else stamp
        self.stamp.check(path)
        content = load_plain(path, mapped=True)
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
        licence = content.get("licence")
        self.licence: str | None = licence if isinstance(licence, str) else None

    def read(self, name: str) -> mx.array:
        """Return a copy of one tensor, evaluated, in its stored type; float64 becomes float32.

        Raises `KeyError` for an unknown name, `UserError` if the file changed or a value is beyond float32.
        """
        import torch

        self.stamp.check(self.path)  # it is mapped: reading past its end would kill the process
        tensor = self._tensors[name].detach().contiguous()
        is_bfloat16 = tensor.dtype == torch.bfloat16
        values = tensor.view(torch.uint16) if is_bfloat16 else tensor
        array = to_mlx(values.numpy(), f"{self.path}: {name}", as_bfloat16=is_bfloat16)
        self.stamp.check(self.path)
        return array


def _find_state_dict(path: Path, content: Mapping, within: str = "", depth: int = 0) -> tuple[str, Mapping]:
    """Return the full key of the state dict in a file or in its entry `within`, and the state dict.

    Known keys are tried first, then the entry, or the whole file, with most tensor elements. Entries of optimizers and
    the like are skipped.
    """
    for key in STATE_DICTS:
        entry = content.get(key)
        if isinstance(entry, Mapping):
            if _tensors_of(entry):
                return _joined(within, key), entry
            if depth < MAX_DEPTH and any(isinstance(entry.get(inner), Mapping) for inner in STATE_DICTS):
                return _find_state_dict(path, entry, _joined(within, key), depth + 1)
    candidates = {"": content} | _candidates(content)
    elements = {key: sum(t.numel() for t in _tensors_of(entry).values()) for key, entry in candidates.items()}
    most = max(elements.values())
    best = [key for key in candidates if elements[key] == most and _tensors_of(candidates[key])]
    if not best:
        keys = ", ".join(map(str, [*content][:8])) or "nothing"
        raise UserError(f"{path}: contains no named tensors, only {keys}; expected a state dict: {ADVICE}")
    if len(best) > 1:
        names = [_joined(within, key) for key in best]
        raise UserError(
            f"{path}: {' and '.join(map(repr, names))} have {most} elements each, expected one state dict: "
            f"`weights` {names[0]} takes one, or {ADVICE}"
        )
    return _joined(within, best[0]), candidates[best[0]]


def _joined(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer and inner else outer or inner


def _entry_named(path: Path, content: Mapping, name: str) -> tuple[str, Mapping]:
    """Return the state dict under a key, such as "ema" or "ema.module", and its full key."""
    entries = [*_resolved(content, name)]
    if not entries:
        known = ", ".join(_weights_in(content)) or "none"
        raise UserError(f"{path}: has no weights {name}, expected one of its entries with tensors: {known}")
    entry = next(filter(_tensors_of, entries), None)
    return _find_state_dict(path, entries[0], name) if entry is None else (name, entry)


def _resolved(content: Mapping, name: str) -> Iterator[Mapping]:
    """Yield the entries under a key or a dotted path of keys, which may have dots themselves or be numbers."""
    mappings = {str(key): entry for key, entry in content.items() if isinstance(entry, Mapping)}
    if name in mappings:
        yield mappings[name]
    for key, entry in mappings.items():
        if name.startswith(f"{key}."):
            yield from _resolved(entry, name[len(key) + 1 :])


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
