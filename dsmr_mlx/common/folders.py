"""Folders that are written completely or not at all, by one process at a time."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import hidden_name, hidden_path, lock, sync

INCOMPLETE = "dsmr-mlx.incomplete"  # suffix of the hidden folder that is being written


def folder_content(folder: Path) -> list[Path]:
    """Return the paths in a folder, without the files that macOS adds: `.DS_Store`, and `._*` on foreign drives."""
    return [path for path in folder.iterdir() if path.name != ".DS_Store" and not path.name.startswith("._")]


def write_folder(final: str | os.PathLike, write: Callable[[Path], None], replace: bool = True) -> None:
    """Let `write` fill a temporary folder, then commit it as `final`; see `commit_folder`."""
    with temporary_folder(final) as temporary:
        write(temporary)
        commit_folder(temporary, Path(final), replace)


@contextmanager
def temporary_folder(final: str | os.PathLike) -> Iterator[Path]:
    """Make the hidden folder `.NAME.dsmr-mlx.incomplete` beside `final`, to be filled and passed to `commit_folder`.

    It is locked while its process lives, and removed on exit. Files left by a killed process are removed.
    Raises `UserError` if another process is writing `final`.
    """
    final = Path(final).resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = hidden_path(final, INCOMPLETE)
    descriptor = _make_locked(temporary, final)
    try:
        yield temporary
    finally:
        if descriptor is None or _is_at(descriptor, temporary):  # after a commit, it may belong to another process
            shutil.rmtree(temporary, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _make_locked(temporary: Path, final: Path) -> int | None:
    """Create an empty folder and return the descriptor that locks it; None on systems without such locks."""
    while True:
        with contextlib.suppress(FileExistsError):
            temporary.mkdir()
        try:
            descriptor = _lock(temporary)
        except FileNotFoundError:  # the process that had it has just ended
            continue
        except BlockingIOError:
            raise UserError(f"{final}: another process is writing it, use another name") from None
        if descriptor is None or _is_at(descriptor, temporary):
            break
        os.close(descriptor)
    for path in temporary.iterdir():  # left by a process that was killed
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return descriptor


def _lock(folder: Path) -> int | None:
    """Return the descriptor of a folder, locked. Raises `BlockingIOError` if another process has locked it."""
    if os.name != "posix":
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if lock(descriptor):
            return descriptor
    except BlockingIOError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open folder is still at its path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def commit_folder(temporary: Path, final: Path, replace: bool = True) -> None:
    """Rename a folder whose files are on disk to `final`, replacing what is there.

    Without `replace`, raises `UserError` if something other than an empty folder is there.

    The old folder is renamed first, restored if the new one cannot be renamed, and deleted last. If `final` is a link
    to a folder, that folder is replaced and the link stays. Both folders must be on one file system.
    """
    final = final.resolve()
    for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        sync(folder)
    if replace:
        _replace_folder(temporary, final)
    else:
        if final.is_dir() and not folder_content(final):
            shutil.rmtree(final)
        try:
            temporary.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise UserError(f"{final}: appeared in the meantime, nothing was replaced; `force` replaces it") from None
    sync(final.parent, full=True)


def _replace_folder(temporary: Path, final: Path) -> None:
    replaced = hidden_name(final, "replaced")
    try:
        if final.exists():
            os.replace(final, replaced)
        os.replace(temporary, final)
    finally:
        if replaced.exists() and not final.exists():
            os.replace(replaced, final)
        shutil.rmtree(replaced, ignore_errors=True) if replaced.is_dir() else replaced.unlink(missing_ok=True)
