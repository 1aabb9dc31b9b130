"""Names of output files, claimed when a command starts and held until it has written them.

Without this, two commands that start together could choose the same free name, and a file that appears after the start
would be replaced. A claim is an empty file, made exclusively. `claiming` removes those that were never written.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

Identity = tuple[int, int]  # device and inode

_claims: ContextVar[dict[Path, Identity] | None] = ContextVar("claims", default=None)


@contextmanager
def claiming() -> Iterator[None]:
    """Hold the claims made within the block; at its end, remove those that were not written to."""
    claims: dict[Path, Identity] = {}
    token = _claims.set(claims)
    try:
        yield
    finally:
        _claims.reset(token)
        for path, identity in reversed(claims.items()):
            _give_up(path, identity)


def claim_file(path: Path) -> None:
    """Claim a name that is free. Raises `FileExistsError` if it is taken, even by a dangling link.

    Does nothing outside a `claiming` block, or if the block already holds the name.
    """
    claims = _claims.get()
    if claims is None or holds(path):
        return
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    os.close(descriptor)
    claims[path.absolute()] = _identity(path)


def claim_folder(path: Path) -> None:
    """Claim a name for a new folder, which is created; see `claim_file`."""
    claims = _claims.get()
    if claims is None or holds(path):
        return
    path.mkdir()
    claims[path.absolute()] = _identity(path)


def holds(path: Path) -> bool:
    """Return whether the block holds a name that no other program has replaced."""
    claims = _claims.get() or {}
    claimed = claims.get(path.absolute())
    return claimed is not None and claimed == _identity(path)


def check_claim(path: Path) -> None:
    """Raise `FileExistsError` if another program has replaced a claimed file."""
    claimed = (_claims.get() or {}).get(path.absolute())
    if claimed is not None and os.path.lexists(path) and _identity(path) != claimed:
        raise FileExistsError(errno.EEXIST, "another program wrote it in the meantime", str(path))


def renew_claim(path: Path) -> None:
    """Record that the block itself has replaced a claimed file."""
    claims = _claims.get()
    if claims is not None and path.absolute() in claims:
        claims[path.absolute()] = _identity(path)


def _identity(path: Path) -> Identity | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _give_up(path: Path, identity: Identity) -> None:
    """Remove an empty file or folder that is still the claimed one."""
    with contextlib.suppress(OSError):
        if _identity(path) != identity:
            return
        if path.is_dir():
            path.rmdir()  # fails if it holds anything
        elif path.stat().st_size == 0:
            path.unlink()
