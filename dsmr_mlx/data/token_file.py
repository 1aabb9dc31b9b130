"""The ids of a corpus on disk, read piece by piece. Needs only NumPy.

The file is not mapped into memory: if it were truncated during a read, the process would be killed (SIGBUS). It stays
open, so that replacing the corpus does not affect readers of the old one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import open_regular

MAX_HEADER = 4096  # bytes
HEADER_AT = 10  # offset of the header, after the magic string, the version and the header's length
# The header as NumPy writes it. NumPy itself parses it as Python and fails in many ways.
HEADER = re.compile(
    rb"\x93NUMPY\x01\x00.{2}\{'descr': '(?P<dtype>[<>|][biuf][1248])', 'fortran_order': (?:True|False), "
    rb"'shape': \((?P<shape>[\d, ]{0,60})\), \} *\n",
    re.DOTALL,
)


class TokenFile:
    """A `.npy` file of ids `(n_tokens,)` of type `dtype`.

    Raises `UserError`, which names the file, if it cannot be read or has another type or length.
    """

    def __init__(self, path: Path, dtype: np.dtype, n_tokens: int) -> None:
        self.path, self.dtype, self.n_tokens = path, dtype.newbyteorder("<"), n_tokens
        try:
            self._file = open_regular(path)
            self._begin = self._check_header(os.fstat(self._file.fileno()).st_size)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error

    def _check_header(self, size: int) -> int:
        """Return the byte at which the ids begin."""
        start = self._file.read(MAX_HEADER)
        header = HEADER.match(start)
        if header is None:
            raise UserError(f"{self.path}: not a complete NumPy file, expected ids")
        shape, dtype = [int(n) for n in header["shape"].split(b",") if n.strip()], np.dtype(header["dtype"].decode())
        if dtype != self.dtype or len(shape) != 1:
            raise UserError(f"{self.path}: {len(shape)}-d {dtype}, expected 1-d {self.dtype.newbyteorder('=')}")
        if shape[0] != self.n_tokens:
            raise UserError(f"{self.path}: {shape[0]} tokens, expected {self.n_tokens} as in the index")
        begin = HEADER_AT + int.from_bytes(start[HEADER_AT - 2 : HEADER_AT], "little")
        if size < begin + self.n_tokens * dtype.itemsize:
            raise UserError(f"{self.path}: not a complete NumPy file ({size} bytes)")
        return begin

    def read(self, offset: int, length: int) -> np.ndarray:
        """Return `length` ids from `offset` on, read-only. Raises `UserError` if the file was truncated."""
        size = length * self.dtype.itemsize
        try:
            data = os.pread(self._file.fileno(), size, self._begin + offset * self.dtype.itemsize)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        if len(data) != size:
            raise UserError(f"{self.path}: {len(data)} of {size} bytes at token {offset}: truncated while in use")
        return np.frombuffer(data, self.dtype).astype(self.dtype.newbyteorder("="), copy=False)
