"""A session on disk: one SQLite file with takes, notes, actions, settings and recurrent states.

Every change is committed before it is acknowledged, so a process that is killed loses nothing. The file is locked while
it is open: a second program is refused.
"""

import errno
import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import hidden_name, open_regular
from dsmr_mlx.studio.loading import load_tree
from dsmr_mlx.studio.takes import Row, Take, Tree

SUFFIX = ".studio"
APPLICATION_ID, VERSION = 0x44534D52, 1
HEADER = b"SQLite format 3\0"
MAX_STATE_BYTES = 256 << 20  # of recurrent states in one file; the least recently used ones go
TABLES = {
    "meta": "(name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "takes": "(id INTEGER PRIMARY KEY, value TEXT NOT NULL)",
    "notes": "(take INTEGER, i INTEGER, onset REAL, offset REAL, pitch INTEGER, velocity INTEGER, voice INTEGER, "
    "PRIMARY KEY (take, i)) WITHOUT ROWID",
    "pedal": "(take INTEGER, i INTEGER, time REAL, value INTEGER, PRIMARY KEY (take, i)) WITHOUT ROWID",
    "tokens": "(take INTEGER PRIMARY KEY, vocabulary TEXT NOT NULL, ids BLOB NOT NULL)",
    "actions": "(i INTEGER PRIMARY KEY, value TEXT NOT NULL)",
    "states": "(model TEXT, digest BLOB, tokens INTEGER, used INTEGER, data BLOB, PRIMARY KEY (model, digest))",
}
CHECKED = tuple(name for name in TABLES if name != "states")  # what damage is searched in; lost states are read again


class Store:
    """An open session file, made if it does not exist. Thread-safe.

    Raises `UserError`, which names the file, if it is damaged, of another program or version, in use, or cannot be
    written.
    """

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.RLock()
        self._claim = claim(path)
        self._unflushed = beside(path.resolve())[0].exists()  # left by a program that was killed
        try:
            new = not path.exists() or path.stat().st_size == 0
            if not new:
                check_header(path)
            with self._naming():
                self._db = sqlite3.connect(path, timeout=0.2, isolation_level=None, check_same_thread=False)
        except BaseException:
            os.close(self._claim)
            raise
        try:
            with self._naming():
                self._prepare(new)
        except BaseException:
            self.close()
            raise

    def _prepare(self, new: bool) -> None:
        run = self._db.execute
        run("PRAGMA trusted_schema = OFF")
        run("PRAGMA locking_mode = EXCLUSIVE")  # before the first access: then WAL needs no shared memory
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = NORMAL")
        run("BEGIN EXCLUSIVE")  # takes the lock
        self._unflushed = self._unflushed or new
        if new:
            for name, columns in TABLES.items():
                run(f"CREATE TABLE {name} {columns}")
            run(f"PRAGMA application_id = {APPLICATION_ID}")
            run(f"PRAGMA user_version = {VERSION}")
        run("COMMIT")
        if not new:
            self._check()

    def _check(self) -> None:
        """Raise `UserError` unless the file has the tables of this version, undamaged."""
        (application,), (version,) = (self._db.execute(f"PRAGMA {n}").fetchone() for n in FILE_IDS)
        if application != APPLICATION_ID:
            raise UserError(f"{self.path}: a database of another program, expected a session of the studio")
        if version != VERSION:
            raise UserError(f"{self.path}: version {version} of the studio's sessions, expected {VERSION}")
        schema = self._db.execute("SELECT sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'").fetchall()
        if sorted(sql or "" for (sql,) in schema) != sorted(f"CREATE TABLE {n} {c}" for n, c in TABLES.items()):
            raise UserError(f"{self.path}: damaged, its tables are not those of a session")
        for name in CHECKED:
            (found,) = self._db.execute(f"PRAGMA quick_check('{name}')").fetchone()
            if found != "ok":
                raise UserError(f"{self.path}: damaged ({' '.join(found.split())[:100]})")

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Turn errors of the database into `UserError` that name the file."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise UserError(f"{self.path}: open in another studio, expected a session that is not in use") from None
            raise UserError(f"{self.path}: cannot be read or written ({error})") from None
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path}: damaged ({error})") from None
        except UnicodeDecodeError:  # of the name of something that is damaged
            raise UserError(f"{self.path}: damaged") from None

    @contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all that is written within the block, or nothing. Raises `UserError` that names the file."""
        with self._lock, self._naming():
            if self._db.in_transaction:  # a change within a change
                yield self._db
                return
            self._db.execute("BEGIN IMMEDIATE")
            self._unflushed = True
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite itself rolls back if the disk is full
                    self._db.execute("ROLLBACK")
                raise

    def save_takes(self, takes: Sequence[Take]) -> None:
        """Write all but notes and pedal of takes."""
        rows = [(take.id, json.dumps(take.to_dict())) for take in takes]
        with self.changing() as db:
            db.executemany("INSERT OR REPLACE INTO takes VALUES (?, ?)", rows)

    def save_notes(self, take: int, first: int, rows: Sequence[Row], voice: Sequence[int] | None = None) -> None:
        """Replace the own notes of a take from index `first` on."""
        voices = [None] * len(rows) if voice is None else voice
        numbered = [(take, first + i, *row, v) for i, (row, v) in enumerate(zip(rows, voices, strict=True))]
        with self.changing() as db:
            db.execute("DELETE FROM notes WHERE take = ? AND i >= ?", (take, first))
            db.executemany("INSERT INTO notes VALUES (?, ?, ?, ?, ?, ?, ?)", numbered)

    def save_pedal(self, take: int, first: int, pedal: Sequence[tuple[float, int]]) -> None:
        """Replace the own pedal of a take from index `first` on."""
        with self.changing() as db:
            db.execute("DELETE FROM pedal WHERE take = ? AND i >= ?", (take, first))
            db.executemany(
                "INSERT INTO pedal VALUES (?, ?, ?, ?)", [(take, first + i, *p) for i, p in enumerate(pedal)]
            )

    def save_tokens(self, take: int, vocabulary: str, ids: np.ndarray) -> None:
        """Write the ids of the music of a take."""
        with self.changing() as db:
            data = ids.astype("<i4").tobytes()
            db.execute("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?)", (take, vocabulary, data))

    def save_tree(self, tree: Tree) -> None:
        """Write where the tree stands, and its last action; actions that were dropped are deleted."""
        with self.changing() as db:
            db.execute("DELETE FROM actions WHERE i >= ?", (len(tree.actions),))
            if tree.actions:
                last = len(tree.actions) - 1
                value = json.dumps(tree.actions[last].to_list())
                db.execute("INSERT OR REPLACE INTO actions VALUES (?, ?)", (last, value))
            self.save_meta("done", tree.done)
            self.save_meta("selected", tree.selected)

    def save_all(self, tree: Tree, settings: dict[str, Any]) -> None:
        """Replace everything but the states."""
        with self.changing() as db:
            for name in ("takes", "notes", "pedal", "tokens", "actions"):
                db.execute(f"DELETE FROM {name}")
            for take in tree.takes.values():
                self.save_notes(take.id, 0, take.rows, take.voice)
                self.save_pedal(take.id, 0, take.pedal)
                if take.tokens is not None:
                    self.save_tokens(take.id, *take.tokens)
            self.save_takes(list(tree.takes.values()))
            values = [(i, json.dumps(action.to_list())) for i, action in enumerate(tree.actions)]
            db.executemany("INSERT INTO actions VALUES (?, ?)", values)
            self.save_tree(tree)
            self.save_meta("settings", settings)

    def save_meta(self, name: str, value: Any) -> None:
        """Write a value, such as the settings."""
        with self.changing() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))

    def load(self) -> tuple[Tree, dict[str, Any]]:
        """Return the tree and the values of `save_meta` by name. No take grows any more.

        Raises `UserError`, which names the file, if it is damaged.
        """
        try:
            with self._lock, self._naming():
                return load_tree(self._db)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            if isinstance(error, UserError) and str(self.path) in str(error):
                raise
            raise UserError(f"{self.path}: damaged ({' '.join(str(error).split())[:100]})") from None

    def save_state(self, model: str, digest: bytes, tokens: int, data: bytes, most: int = MAX_STATE_BYTES) -> None:
        """Keep the recurrent state of a model that has read `tokens` tokens. Those used least recently go if there are
        more than `most` bytes.
        """
        with self.changing() as db:
            (clock,) = db.execute("SELECT COALESCE(MAX(used), 0) + 1 FROM states").fetchone()
            db.execute("INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?, ?)", (model, digest, tokens, clock, data))
            sizes = db.execute("SELECT rowid, LENGTH(data) FROM states ORDER BY used").fetchall()
            excess = sum(size for _, size in sizes) - most
            for row, size in sizes:
                if excess <= 0:
                    break
                db.execute("DELETE FROM states WHERE rowid = ?", (row,))
                excess -= size

    def states(self, model: str) -> list[tuple[int, bytes]]:
        """Return the number of tokens and the digest of each state of a model."""
        with self._lock, self._naming():
            return self._db.execute("SELECT tokens, digest FROM states WHERE model = ?", (model,)).fetchall()

    def state(self, model: str, digest: bytes) -> bytes | None:
        """Return a recurrent state, or None."""
        with self.changing() as db:
            found = db.execute("SELECT data FROM states WHERE model = ? AND digest = ?", (model, digest)).fetchone()
            if found is None or not isinstance(found[0], bytes):
                return None
            db.execute(
                "UPDATE states SET used = (SELECT MAX(used) + 1 FROM states) WHERE model = ? AND digest = ?",
                (model, digest),
            )
            return found[0]

    def drop_state(self, model: str, digest: bytes) -> None:
        """Delete a recurrent state."""
        with self.changing() as db:
            db.execute("DELETE FROM states WHERE model = ? AND digest = ?", (model, digest))

    def copy_to(self, path: Path, states: bool = True) -> None:
        """Write a complete copy into a new file, atomically; states: with the recurrent states.

        Raises `UserError` if the file exists or cannot be written.
        """
        partial = hidden_name(path, "partial")
        try:
            partial.touch(exist_ok=False)
            with self._lock, self._naming():
                if states:
                    self._back_up(partial)
                else:
                    self._copy_tables(partial)
            put_in_place(partial, path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
        finally:
            for leftover in (partial, *beside(partial)):
                leftover.unlink(missing_ok=True)

    def _back_up(self, path: Path) -> None:
        copy = sqlite3.connect(path, isolation_level=None)
        try:
            self._db.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        finally:
            copy.close()

    def _copy_tables(self, path: Path) -> None:
        """Copy all but the states, which may be large."""
        self._db.execute("ATTACH ? AS copy", (str(path),))
        try:
            self._db.execute("BEGIN")
            for name, columns in TABLES.items():
                self._db.execute(f"CREATE TABLE copy.{name} {columns}")
                if name != "states":
                    self._db.execute(f"INSERT INTO copy.{name} SELECT * FROM main.{name}")
            self._db.execute(f"PRAGMA copy.application_id = {APPLICATION_ID}")
            self._db.execute(f"PRAGMA copy.user_version = {VERSION}")
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._db.execute("DETACH copy")

    def flush(self) -> None:
        """Move what was written into the file itself, so that it is complete without the log beside it, and on disk."""
        with self._lock, self._naming():
            if self._unflushed:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                self._unflushed = False

    def close(self) -> None:
        """Close the file; everything is in it already."""
        with self._lock:
            self._db.close()
            os.close(self._claim)


def write_session(path: Path, tree: Tree, settings: dict[str, Any]) -> None:
    """Write takes and settings into a new file, atomically. Raises `UserError` as `Store.copy_to` does."""
    try:
        with TemporaryDirectory(prefix=".dsmr-mlx-", dir=path.parent) as folder:
            store = Store(Path(folder) / path.name)
            try:
                store.save_all(tree, settings)
            finally:
                store.close()
            put_in_place(store.path, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def claim(path: Path) -> int:
    """Lock a session for this program, in a hidden file beside it. Return the descriptor, whose closing gives it back.

    The database's own locks are not enough: the system drops them when the program opens and closes the file once more.
    Raises `UserError` if it is in use, or the folder cannot be written to.
    """
    real = path.resolve()
    try:
        descriptor = os.open(real.with_name(f".{real.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{path}: cannot be read or written ({error.strerror or error})") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            raise UserError(f"{path}: open in another studio, expected a session that is not in use") from None
    return descriptor  # on a network drive without such locks, that of the database remains


def beside(path: Path) -> list[Path]:
    """Return the files that SQLite keeps beside a database while it is open; the first is the log of writes."""
    return [path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal")]


def check_free(path: Path) -> None:
    """Raise `UserError` if there is a session at a path."""
    if path.exists():
        raise UserError(f"`name` {path.stem}: there is a session of this name, expected another one")


def put_in_place(partial: Path, path: Path) -> None:
    """Move a complete session to its path. Raises `UserError` if there is one already.

    What was left beside a file that was deleted would change the new one: it goes.
    """
    descriptor = claim(path)  # nobody else makes it now
    try:
        check_free(path)
        for leftover in beside(path):
            leftover.unlink(missing_ok=True)
        partial.replace(path)
    finally:
        os.close(descriptor)


FILE_IDS = ("application_id", "user_version")


def check_header(path: Path) -> None:
    """Raise `UserError` unless a file looks like a database."""
    try:
        with open_regular(path) as file:
            head = file.read(len(HEADER))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), expected a session") from None
    if head != HEADER:
        raise UserError(f"{path}: not a session of the studio")
