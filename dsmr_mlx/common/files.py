"""Files and folders that are written completely or not at all, and read with errors that name them."""

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dsmr_mlx.common.claims import check_claim, claim_file, holds, renew_claim
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.parsing import parse_json, parse_toml

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TOKENIZER_FILE = "tokenizer.json"  # in the folder `tokenizer` of every corpus and checkpoint
MAX_TEXT = 1 << 30  # bytes of a JSON or TOML file
MAX_HIDDEN = 240  # bytes of a hidden name: file systems take 255, and SQLite appends to it
KINDS_OF_FILES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading. Raises `OSError`, at once, for anything but a regular file: a pipe would block for ever.

    Every file that a user names, or that is found in a folder, is opened here.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if kind != stat.S_IFREG:
            found = KINDS_OF_FILES.get(kind, "something else")
            raise OSError(errno.EINVAL, f"{found}, not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike, max_bytes: int | None = None) -> bytes:
    """Return the content of a file. Raises `OSError` as `open_regular` does, and for more than `max_bytes`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise OSError(errno.EFBIG, f"{size:,} bytes, expected at most {max_bytes:,}", str(path))
        return file.read()


def read_text(path: str | os.PathLike) -> str:
    """Return the content of a UTF-8 file, without a byte order mark. Line ends are kept.

    Raises `OSError`, and `ValueError` for invalid UTF-8.
    """
    return read_regular(path, MAX_TEXT).decode("utf-8-sig")


def write_atomically(path: str | os.PathLike, data: bytes | str) -> None:
    """Write a file with `atomic_file`; text as UTF-8, in which lone surrogates become question marks."""
    with atomic_file(path) as file:
        file.write(data.encode("utf-8", "replace") if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file under a temporary name in its own folder; on exit flush it to disk and rename it into place.

    After an error nothing is renamed and the temporary file is deleted.
    """
    path = Path(path)
    partial = hidden_name(path, "partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_claim(path)
        partial.replace(path)
        renew_claim(path)
    except OSError as error:
        if error.errno and error.filename in (None, str(partial)):
            # A full disk has no file name, and the temporary one would not help the user.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def hidden_name(path: Path, suffix: str) -> Path:
    """Return an unused hidden path beside `path`, so that a rename between the two is atomic."""
    return hidden_path(path, f"{secrets.token_hex(4)}.{suffix}")


def hidden_path(path: Path, ending: str) -> Path:
    """Return the path `.NAME.ending` beside `path`; NAME is cut so that the name has at most `MAX_HIDDEN` bytes."""
    name = path.name
    while len(os.fsencode(f".{name}.{ending}")) > MAX_HIDDEN:
        name = name[:-1]
    return path.with_name(f".{name}.{ending}")


def check_output(name: str, path: str | os.PathLike, suffixes: Sequence[str], force: bool) -> Path:
    """Return the path of a file to be written later, and claim it, see `claims`.

    Raises `UserError`, which names the option or argument `name`, if the suffix is not one of `suffixes`, the path is a
    folder, its folder is missing or read-only, or the file exists and `force` is false.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{name} {path}: expected a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{name} {path}: is a folder, expected a file")
    if os.path.lexists(path) and not force and not holds(path):
        raise UserError(f"{name} {path}: already exists, `force` overwrites it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{name} {path}: no such folder {path.parent}")
    check_writable(name, path)
    if not force:
        claim_output(name, path)
    return path


def claim_output(name: str, path: Path) -> None:
    """Claim the name of an output file, see `claim_file`. Raises `UserError`, which names the option or argument."""
    try:
        claim_file(path)
    except FileExistsError:
        raise UserError(f"{name} {path}: already exists, `force` overwrites it") from None
    except OSError as error:
        raise UserError(f"{name} {path}: cannot be written ({error.strerror or error})") from None


def check_writable(name: str, path: Path) -> None:
    """Raise `UserError`, which names the option or argument `name`, if a file or its folders cannot be created.

    Called before long work.
    """
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{name} {path}: the folder {folder} is read-only, expected one that can be written to")


def write_output(name: str, path: str | os.PathLike, data: bytes | str) -> None:
    """Write a file with `write_atomically`; if that fails, raise a `UserError` that names the option or argument."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise UserError(f"{name} {path}: cannot be written ({error.strerror or error})") from None


def read_json(path: str | os.PathLike, expected: str) -> Any:
    """Return the content of a JSON file, see `parse_json`. Raises `UserError`, which names the file and `expected`."""
    return _parsed(path, expected, parse_json, "JSON")


def read_toml(path: str | os.PathLike, expected: str) -> dict[str, Any]:
    """Return the content of a TOML file, see `parse_toml`. Raises `UserError`, which names the file and `expected`."""
    return _parsed(path, expected, parse_toml, "TOML")


def _parsed(path: str | os.PathLike, expected: str, parse: Callable[[str], Any], form: str) -> Any:
    try:
        return parse(read_text(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), expected {expected}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid {form} ({error}), expected {expected}") from error


def sync(path: Path, full: bool = False) -> None:
    """Flush a file's content, or a folder's entries, to disk; does nothing for folders on Windows.

    full: on macOS, where `fsync` stops at the drive's cache, also flush that cache, including earlier writes
    """
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if full and hasattr(fcntl, "F_FULLFSYNC"):
            with contextlib.suppress(OSError):  # a network drive
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Lock an open file or folder until it is closed. Return False on systems and network drives without locks.

    Raises `BlockingIOError` if another process has locked it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits. Raises `OSError` if it cannot be read."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contains(folder: str | Path, path: str | Path) -> bool:
    """Return whether a path is the folder or lies in it; links and case-insensitive file systems are respected."""
    folder, path = Path(folder), Path(path).resolve()
    return folder.exists() and any(p.exists() and p.samefile(folder) for p in (path, *path.parents))
