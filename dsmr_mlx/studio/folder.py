"""The folder of the sessions, and their names."""

import os
import sqlite3
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.studio.messages import file_name
from dsmr_mlx.studio.store import SUFFIX, beside, check_free

FIRST_NAME = "Session"
MAX_LISTED = 500


def default_folder() -> Path:
    """Return where sessions are kept: Music on macOS, else the data folder of XDG."""
    if sys.platform == "darwin":
        return Path.home() / "Music" / "dsmr-mlx"
    data = os.environ.get("XDG_DATA_HOME", "")
    return (Path(data) if Path(data).is_absolute() else Path.home() / ".local" / "share") / "dsmr-mlx"


def session_path(folder: Path, name: str) -> Path:
    """Return the path of a session by its name, whether it exists or not. Raises `UserError` for an invalid name."""
    try:
        name = file_name(name)
    except ValueError as error:
        raise UserError(f"`name` {name!r}: expected {error}") from None
    return named_sessions(folder).get(name, folder / f"{name}{SUFFIX}")


def new_path(folder: Path, name: str) -> Path:
    """Return the path of a new session. Raises `UserError` for an invalid name, and if there is one of this name."""
    path = session_path(folder, name)
    check_free(path)
    return path


def named_sessions(folder: Path) -> dict[str, Path]:
    """Return the sessions in a folder that clients can open, by their names, those changed last first.

    A file may be called otherwise: other systems write accents as letters of their own.
    """
    found = {}
    for path in sessions_in(folder):
        with suppress(ValueError):
            found.setdefault(file_name(path.stem), path)
    return found


def chosen_path(session: str, folder: Path) -> Path:
    """Return the path of a session that a user names: a name, or a path that ends in `SUFFIX`."""
    path = Path(session).expanduser()
    if path.suffix == SUFFIX:
        if not path.absolute().parent.is_dir():
            raise UserError(f"{path}: no such folder {path.parent}")
        return path
    if path.name != session:
        raise UserError(f"{session}: expected the name of a session, or a path that ends in {SUFFIX}")
    return session_path(folder, session)


def sessions_in(folder: Path) -> list[Path]:
    """Return the sessions in a folder, those changed last first."""
    found = [path for path in folder.glob(f"*{SUFFIX}") if path.is_file() and not path.name.startswith(".")]
    return sorted(found, key=changed, reverse=True)[:MAX_LISTED]


def changed(path: Path) -> float:
    """Return when a session was changed last, in seconds since 1970."""
    times = [0.0]
    for each in (path, beside(path)[0]):
        try:
            times.append(each.stat().st_mtime)
        except OSError:
            continue
    return max(times)


def free_path(folder: Path) -> Path:
    """Return the path of a new session with a name that is free."""
    names = [FIRST_NAME, *(f"{FIRST_NAME} {number}" for number in range(2, MAX_LISTED + 2))]
    return next(path for name in names if not (path := folder / f"{name}{SUFFIX}").exists())


def describe_sessions(folder: Path, known: dict[Path, int]) -> list[dict[str, Any]]:
    """Return name, time of the last change and number of takes of each session; None if it cannot be known.

    known: numbers of takes of open sessions.
    """
    open_now = {path.resolve(): takes for path, takes in known.items()}  # which must not be opened twice

    def takes_of(path: Path) -> int | None:
        real = path.resolve()
        return open_now[real] if real in open_now else count_takes(path)

    found = named_sessions(folder).items()
    return [{"name": name, "changed": changed(path), "takes": takes_of(path)} for name, path in found]


def count_takes(path: Path) -> int | None:
    """Return the number of takes in a file, None if it is in use or damaged."""
    if beside(path)[0].exists():  # in use, or not closed: reading would change it
        return None
    try:
        db = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1", uri=True, timeout=0)
    except sqlite3.Error:
        return None
    try:
        return int(db.execute("SELECT COUNT(*) FROM takes").fetchone()[0])
    except (sqlite3.Error, TypeError, ValueError):
        return None
    finally:
        db.close()
