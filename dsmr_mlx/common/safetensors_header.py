"""The header of a safetensors file, checked before any library uses it.

The format (github.com/huggingface/safetensors): 8 bytes with the header's length, little-endian; the header, a JSON
object `{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}` padded with spaces; the data.
"""

import math
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import open_regular
from dsmr_mlx.common.parsing import parse_json

# type in the format → bytes of an element; the types that MLX has, and float64
ITEM_SIZES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8},
}
MAX_HEADER = 100_000_000  # bytes, as in the format's own library
MAX_AXES, MAX_AXIS = 16, 2**31 - 1
EXPECTED = "expected a complete safetensors file"


class TensorEntry(NamedTuple):
    """Type, shape and location of a tensor. `begin` and `size` are bytes; `begin` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return the tensors of a file by name, in the order of their data, and the metadata. No tensor is read.

    Raises `UserError` if the file cannot be read, is truncated or damaged, or has a tensor of a type that MLX lacks.
    """
    try:
        with open_regular(path) as file:
            return parse_header(file, os.fstat(file.fileno()).st_size, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), {EXPECTED}") from None


def parse_header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Like `read_header`, for an open file of `size` bytes; path: its name in messages."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise UserError(f"{path}: cannot be read (cut off, or a file of another kind), {EXPECTED}")
    if length > MAX_HEADER:
        raise UserError(f"{path}: its header has {length:,} bytes, expected at most {MAX_HEADER:,}")
    try:
        header = parse_json(file.read(length))
    except ValueError:
        raise UserError(f"{path}: cannot be read (its header is not JSON), {EXPECTED}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: cannot be read (its header is not a JSON object), {EXPECTED}")
    metadata = header.pop("__metadata__", None)
    entries = {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    return dict(sorted(entries.items(), key=lambda item: item[1].begin)), _texts(metadata)


def _texts(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        return {}
    return {key: text for key, text in metadata.items() if isinstance(text, str)}


def _entry(path: Path, name: str, entry: Any, begin: int, end: int) -> TensorEntry:
    """Check the header entry of a tensor. The file's data is from byte `begin` to `end`."""
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
        well_formed = whole and isinstance(dtype, str) and len(shape) <= MAX_AXES
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed or max(shape, default=0) > MAX_AXIS:
        raise UserError(f"{path}: damaged, the entry of {name} is {str(entry)[:80]}, {EXPECTED}")
    if dtype not in ITEM_SIZES:
        raise UserError(f"{path}: {name} is {dtype}, expected one of {', '.join(ITEM_SIZES)}")
    size = math.prod(shape) * ITEM_SIZES[dtype]
    if last - first != size:
        raise UserError(f"{path}: damaged, {name} has {last - first} bytes, its shape {shape} needs {size}")
    if begin + last > end:
        raise UserError(f"{path}: truncated, {name} ends at byte {begin + last}, the file at {end}")
    return TensorEntry(dtype, shape, begin + first, size)
