"""Files: written so that a crash leaves the old content or the new, never a part; read so that errors name them."""

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsmr_mlx.common.errors import UserError

TOKENIZER_FILE = "tokenizer.json"  # in the folder `tokenizer` of every corpus and checkpoint


def write_atomically(path: str | os.PathLike, data: bytes | str) -> None:
    """Write a file under a temporary name in its own folder, flush it to disk, then rename it into place."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_output(option: str, path: str | os.PathLike, suffixes: Sequence[str], force: bool) -> Path:
    """The path of a file to be written later. Raises `UserError`, which names the option, for another suffix, for a
    folder, where there is no folder for it or it is read-only, and for a file that exists already unless `force`.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{option} {path}: expected a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder, expected a file")
    if path.exists() and not force:
        raise UserError(f"{option} {path}: already exists, --force overwrites it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: no such folder {path.parent}")
    check_writable(option, path)
    return path


def check_writable(option: str, path: Path) -> None:
    """Raise `UserError` where a file, or folders for it, cannot be made: better now than when there is much to lose."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: the folder {folder} is read-only, expected one that can be written to")


def write_output(option: str, path: str | os.PathLike, data: bytes | str) -> None:
    """`write_atomically`; where the file cannot be written, a `UserError` that names the option."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror or error})") from None


def read_json(path: str | os.PathLike, expected: str) -> Any:
    """The values in a JSON file. Raises `UserError` that names it, says why, and what was `expected`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), expected {expected}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk, where the system lets one do so."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, 64 hexadecimal digits. Raises `OSError` if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def holds(folder: str | Path, path: str | Path) -> bool:
    """Whether a path is the folder or lies in it, by whatever links, or spelling where case does not matter."""
    folder, path = Path(folder), Path(path).resolve()
    return folder.exists() and any(p.exists() and p.samefile(folder) for p in (path, *path.parents))
