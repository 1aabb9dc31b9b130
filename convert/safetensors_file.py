"""Read and write safetensors files one tensor at a time, so that no checkpoint needs to fit in memory.

The format is described in the module `common.safetensors_header`, which reads and checks the header.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import atomic_file, sync
from dsmr_mlx.common.safetensors_header import EXPECTED, read_header
from dsmr_mlx.convert.file_stamp import FileStamp

# type in the format → NumPy type of its bytes, MLX type
DTYPES = {
    "BOOL": ("?", mx.bool_),
    "U8": ("<u1", mx.uint8),
    "I8": ("<i1", mx.int8),
    "U16": ("<u2", mx.uint16),
    "I16": ("<i2", mx.int16),
    "U32": ("<u4", mx.uint32),
    "I32": ("<i4", mx.int32),
    "U64": ("<u8", mx.uint64),
    "I64": ("<i8", mx.int64),
    "F16": ("<f2", mx.float16),
    "BF16": ("<u2", mx.bfloat16),
    "F32": ("<f4", mx.float32),
    "F64": ("<f8", mx.float32),
    "C64": ("<c8", mx.complex64),
}
NAMES = {dtype: name for name, (_, dtype) in DTYPES.items() if name != "F64"}

Layout = Mapping[str, tuple[mx.Dtype, tuple[int, ...]]]  # name → dtype and shape


class SafetensorsFile:
    """A safetensors file. Its tensors stay on disk until they are read.

    shapes    tensor name → shape, in the order of the data
    dtypes    tensor name → dtype that `read` returns, in the same order
    metadata  the texts stored with the tensors
    stamp     of the file when it was opened

    Unlike `mx.load`, this reads files with float64 tensors, and frees the memory of one tensor before the next.

    Raises `UserError` if the file cannot be read, is truncated or damaged, or has a tensor of a type that MLX lacks.
    """

    def __init__(self, path: Path):
        self.path = path
        self.stamp = FileStamp.of(path, EXPECTED)
        self._entries, self.metadata = read_header(path)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.dtypes = {name: DTYPES[entry.dtype][1] for name, entry in self._entries.items()}

    def read(self, name: str) -> mx.array:
        """Return one tensor, evaluated, in its stored type; float64 becomes float32.

        Raises `KeyError` for an unknown name, `UserError` if the file changed or a value is beyond float32.
        """
        dtype, shape, begin, size = self._entries[name]
        kind, mlx_dtype = DTYPES[dtype]
        try:
            data = np.fromfile(self.path, kind, math.prod(shape), offset=begin)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error}), {EXPECTED}") from None
        if data.nbytes != size:
            raise UserError(
                f"{self.path}: {name} has {data.nbytes} of {size} bytes, the file was truncated while in use"
            )
        self.stamp.check(self.path)
        return to_mlx(data.reshape(shape), f"{self.path}: {name}", as_bfloat16=mlx_dtype == mx.bfloat16)


def write_safetensors(
    path: str | os.PathLike,
    tensors: Iterable[tuple[str, mx.array]],
    layout: Layout,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write each tensor once, in any order, to a file that is written completely or not at all.

    Larger types are stored first, so that all tensors are aligned.

    Raises `ValueError` if a tensor is missing, repeated, unknown or differs from `layout`, if the format lacks its
    type, and if metadata values are not strings; `OSError` if writing fails.
    """
    path = Path(path)
    header, begins = _encode_header(layout, metadata)
    try:
        with atomic_file(path) as file:
            file.write(header)
            _write_tensors(file, tensors, layout, begins)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; nothing was written", str(path)) from error
    sync(path.parent)


def to_mlx(values: np.ndarray, what: str, as_bfloat16: bool = False) -> mx.array:
    """Copy an array to MLX, evaluated, with the same shape and type; float64 becomes float32.

    With `as_bfloat16` the 16-bit integers in `values` are the bits of bfloat16 numbers, which NumPy lacks.
    Raises `UserError` if a finite number exceeds the range of float32. `what` begins its message.
    """
    if values.dtype == np.float64:
        try:
            with np.errstate(over="raise", under="ignore"):
                values = values.astype(np.float32)
        except FloatingPointError:
            raise UserError(f"{what} is float64 and has values out of the range of float32") from None
    array = mx.array(values)
    array = array.view(mx.bfloat16) if as_bfloat16 else array
    mx.eval(array)
    return array


def _encode_header(layout: Layout, metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """Return the bytes before the data, and the byte at which each tensor begins."""
    header: dict[str, Any] = {}
    if metadata is not None:
        if wrong := [key for key, text in metadata.items() if not (isinstance(key, str) and isinstance(text, str))]:
            raise ValueError(f"metadata {wrong[0]!r}: expected text → text")
        header["__metadata__"] = dict(metadata)
    for name, (dtype, _) in layout.items():
        if name == "__metadata__":
            raise ValueError("__metadata__: invalid name of a tensor, reserved by the format")
        if dtype not in NAMES:
            raise ValueError(f"{name}: is {dtype}, expected a type of safetensors and MLX")
    end = 0
    for name in sorted(layout, key=lambda name: -layout[name][0].size):
        dtype, shape = layout[name]
        begin, end = end, end + math.prod(shape) * dtype.size
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begins = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in layout}
    return len(text).to_bytes(8, "little") + text, begins


def _write_tensors(
    file: BinaryIO,
    tensors: Iterable[tuple[str, mx.array]],
    layout: Layout,
    begins: Mapping[str, int],
) -> None:
    missing = dict.fromkeys(layout)
    for name, array in tensors:
        if name not in missing:
            raise ValueError(f"{name}: given twice" if name in layout else f"{name}: not in the layout")
        dtype, shape = layout[name]
        if (array.dtype, array.shape) != (dtype, tuple(shape)):
            raise ValueError(f"{name}: is {array.dtype} {array.shape}, expected {dtype} {tuple(shape)}")
        file.seek(begins[name])
        file.write(memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8)))
        del missing[name]
        del array  # free it before the next one is made
    if missing:
        raise ValueError(f"{', '.join(missing)}: missing, expected {len(layout)} tensors")
