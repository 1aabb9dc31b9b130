"""Detect that a file of weights was changed while it is read, one tensor at a time."""

from pathlib import Path
from typing import NamedTuple

from dsmr_mlx.common.errors import UserError


class FileStamp(NamedTuple):
    """What changes with the content of a file: its inode, its size in bytes, and when it was written, in ns."""

    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path, expected: str) -> "FileStamp":
        """Return the stamp of a file. Raises `UserError`, which names it and what is `expected`, if it is missing."""
        try:
            found = path.stat()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}), {expected}") from None
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)

    def check(self, path: Path) -> None:
        """Raise `UserError` if the file was changed, replaced or removed since its stamp was taken."""
        expected = "expected the file as it was when it was opened"
        if FileStamp.of(path, expected) != self:
            raise UserError(f"{path}: changed while in use, {expected}")
