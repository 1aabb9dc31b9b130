"""A session: the tree of takes and its file behind one lock. A change is written first, then published.

If that fails, an action is taken back. Notes stay, because their generation continues; the next write repairs the file.
"""

import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.studio.checks import check_notes, check_take, checked_field, checked_pedal
from dsmr_mlx.studio.messages import SETTINGS
from dsmr_mlx.studio.settings import NOTHING_SET, check_settings
from dsmr_mlx.studio.store import Store, write_session
from dsmr_mlx.studio.takes import ROOTS, Action, Row, Take, ms
from dsmr_mlx.tokenizers.base import Tokenizer

NAMES = {
    "empty": "From nothing",
    "played": "Played",
    "continue": "Take",
    "replace": "Passage",
    "insert": "Insertion",
    "lead": "Transition",
    "duet": "Duet",
}
Publish = Callable[[dict[str, Any]], None]


class Begins(Protocol):
    """What a session knows of a job that adds takes: see `work.Stop`."""

    def begin(self) -> None:
        """Note that the takes are added. Raises `Interrupted` if nobody wants them any more."""
        ...


class Session:
    """The takes, selection and settings of a file. Thread-safe.

    publish(message): called within the lock, so that clients get messages in the order of the changes; it must not
    block. Raises `UserError` as `Store` does.
    """

    def __init__(self, path: Path, publish: Publish):
        self.path, self.publish = path, publish
        self.lock = threading.RLock()
        self._incomplete = False  # the file lacks something
        self.store = Store(path)
        try:
            self.tree, meta = self.store.load()
        except BaseException:
            self.store.close()
            raise
        self.settings = NOTHING_SET | _known(meta.get("settings"))

    @property
    def name(self) -> str:
        """The name of the session."""
        return unicodedata.normalize("NFC", self.path.stem)

    def message(self) -> dict[str, Any]:
        """The fields of the message `session` that are the session's own."""
        with self.lock:
            takes = [take.to_dict() | whole_take(take) for take in self.tree.takes.values()]
            return {"name": self.name, "takes": takes, "settings": dict(self.settings)} | self._selection()

    def _selection(self) -> dict[str, Any]:
        tree = self.tree
        return {
            "selected": tree.selected,
            "can_undo": tree.can_undo,
            "can_redo": tree.can_redo,
            "hidden": sorted(tree.hidden),
        }

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction. After one that failed, the next one writes everything."""
        try:
            with self.store.changing():
                if self._incomplete:
                    self.store.save_all(self.tree, self.settings)
                yield
        except BaseException:
            self._incomplete = True
            raise
        self._incomplete = False

    def _act(self, action: Callable[[], Action], new: Sequence[Take] = ()) -> None:
        """Do, write and publish an action of the tree; new: the takes that it adds. If it fails, nothing changes."""
        with self.tree.attempt():
            done = action()
            changed = [*new, *(self.tree.takes[take] for take in sorted({change[0] for change in done.changes}))]
            with self._writing():
                for take in new:
                    self.store.save_notes(take.id, 0, take.rows, take.voice)
                    self.store.save_pedal(take.id, 0, take.pedal)
                self.store.save_takes(changed)
                self.store.save_tree(self.tree)
        for take in changed:
            self.publish({"type": "take", "take": take.to_dict()})
        self.publish({"type": "selection"} | self._selection())
        for take in new:
            self.publish(notes_message(take, 0, 0 if take.pedal else None))

    def add(self, kind: str, count: int = 1, **fields: Any) -> list[int]:
        """Add takes of one kind with the same fields, see `add_group`."""
        return self.add_group(kind, [{}] * count, **fields)

    def add_group(
        self, kind: str, own: Sequence[dict[str, Any]], stop: Begins | None = None, **fields: Any
    ) -> list[int]:
        """Add takes of one kind, and select the first. Return their ids.

        own: fields that differ between them; fields: those of all; see `Take`. Takes that are no roots and have no
        parent get the root without notes as parent; it is added if the session has none. stop: of the job that adds
        the takes. Raises `UserError` if the parent is undone, the takes are invalid or cannot be written;
        `Interrupted` as `Stop.begin` does.
        """
        with self.lock:
            if stop is not None:
                stop.begin()
            roots: list[Take] = []
            if kind not in ROOTS and fields.get("parent") is None:
                roots = [] if self._empty_root else [Take(self.tree.next_id, None, "empty", NAMES["empty"])]
                fields |= {"parent": (self._empty_root or roots[0]).id}
            first, group = self.tree.next_id + len(roots), self.tree.next_group if len(own) > 1 else None
            takes = []
            for number, each in enumerate(own, start=first):
                given = {"parent": None, "name": default_name(kind, number), "group": group} | fields | each
                lists = {key: list(given[key]) for key in ("rows", "voice", "pedal") if given.get(key) is not None}
                takes.append(Take(number, kind=kind, **(given | lists)))
            self._check(takes, roots)
            self._act(lambda: self.tree.add(takes, roots), [*roots, *takes])
            return [take.id for take in takes]

    @property
    def _empty_root(self) -> Take | None:
        """The root without notes, if there is one."""
        return next((t for t in self.tree.takes.values() if t.kind == "empty" and t.id not in self.tree.hidden), None)

    def _check(self, takes: Sequence[Take], roots: Sequence[Take]) -> None:
        """Raise `UserError` unless new takes of one parent are valid."""
        parent = takes[0].parent
        ancestors = roots if roots or parent is None else self.tree.chain(self.tree.get(parent).id)[::-1]
        for take in takes:
            with naming(take.id):
                check_take(take, ancestors)

    def extend(
        self,
        number: int,
        first: int,
        rows: Sequence[Row],
        end: float,
        *,
        voice: Sequence[int] | None = None,
        pedal: Sequence[tuple[float, int]] = (),
        growing: bool = True,
    ) -> None:
        """Replace the own notes of a take from index `first` on, append to its pedal, and move its end.

        Raises `UserError` if they are invalid, or cannot be written; then they are in memory all the same.
        """
        with self.lock:
            take = self.tree.takes[number]
            with naming(number):
                check_extension(take, first, rows, end, voice, pedal)
            take.rows[first:] = rows
            if voice is not None:
                take.voice = [*(take.voice or [])[:first], *voice]
            pedals = len(take.pedal)
            take.pedal += pedal
            changed = take.growing != growing
            take.end, take.growing = max(ms(end), take.begin), growing
            self.tree.forget_music(number)
            try:
                with self._writing():
                    self.store.save_notes(number, first, rows, voice)
                    if pedal:
                        self.store.save_pedal(number, pedals, pedal)
                    self.store.save_takes([take])
            finally:
                self.publish(notes_message(take, first, pedals if pedal else None))
                if changed:
                    self.publish({"type": "take", "take": take.to_dict()})

    def change(self, number: int, **fields: Any) -> None:
        """Set fields of a take that no action undoes: the settings with which it goes on."""
        with self.lock:
            take = self.tree.takes[number]
            for name, value in fields.items():
                setattr(take, name, value)
            try:
                with self._writing():
                    self.store.save_takes([take])
            finally:
                self.publish({"type": "take", "take": take.to_dict()})

    def keep_tokens(self, number: int, vocabulary: str, ids: np.ndarray) -> None:
        """Keep the ids of the music of a take, as a model has read and played it."""
        with self.lock:
            self.tree.takes[number].tokens = vocabulary, ids
            with self._writing():
                self.store.save_tokens(number, vocabulary, ids)

    def tokens(self, number: int | None, tokenizer: Tokenizer) -> np.ndarray | None:
        """Return the ids `(T,)` of the music of a take, if a model with this vocabulary has played it.

        number: None: no take, for which there are no ids. Ids outside the vocabulary, which only a foreign file can
        have, are ignored.
        """
        with self.lock:
            vocabulary, ids = (None if number is None else self.tree.get(number).tokens) or (None, None)
            if vocabulary != tokenizer.fingerprint or ids.min(initial=0) < 0:
                return None
            return ids if ids.max(initial=0) < tokenizer.vocab_size else None

    def edit(self, number: int, name: str, value: Any) -> None:
        """Keep, discard or rename a take."""
        with self.lock:
            self._act(lambda: self.tree.edit(number, name, value))

    def select(self, number: int | None) -> None:
        """Select a take."""
        with self.lock:
            if number != self.tree.selected:
                self._act(lambda: self.tree.select(number))

    def undo(self) -> None:
        """Undo the last action. Raises `UserError` without one."""
        with self.lock:
            self._act(self.tree.undo)

    def redo(self) -> None:
        """Redo an action. Raises `UserError` without one."""
        with self.lock:
            self._act(self.tree.redo)

    @property
    def next_undone(self) -> tuple[int, ...]:
        """The takes that `undo` would hide."""
        with self.lock:
            return self.tree.actions[self.tree.done - 1].added if self.tree.can_undo else ()

    def set(self, settings: dict[str, Any]) -> None:
        """Change some settings. Raises `UserError` that names one that has no meaning."""
        with self.lock:
            changed = self.settings | settings
            check_settings(changed)
            with self._writing():
                self.store.save_meta("settings", changed)
            self.settings = changed
            self.publish({"type": "settings", "settings": dict(changed)})

    def get(self, number: int) -> Take:
        """Return a take. Raises `UserError` for an unknown id."""
        with self.lock:
            return self.tree.get(number)

    def music(self, number: int | None) -> Notes:
        """Return the music of a take; None: no notes. Raises `UserError` if there is no such take."""
        with self.lock:
            if number is None:
                return Notes.empty()
            self.tree.get(number)
            return self.tree.music(number)

    def voices(self, number: int) -> list[int]:
        """Return who played each note of the music of a take; see `Tree.voices`."""
        with self.lock:
            return self.tree.voices(number)

    def music_made(self, number: int) -> Notes:
        """Return the music of a take that may have been undone while it was made."""
        with self.lock:
            return self.tree.music(number)

    def pedal(self, number: int | None) -> list[tuple[float, int]]:
        """Return the pedal of the music of a take; None: no pedal."""
        with self.lock:
            return [] if number is None else self.tree.pedal(number)

    def copy_to(self, path: Path, states: bool = True) -> None:
        """Write a complete copy into a new file, also if the session's own cannot be written; see `Store.copy_to`."""
        with self.lock:
            try:
                self._repair()
            except UserError:  # its disk is full
                write_session(path, self.tree, self.settings)
            else:
                self.store.copy_to(path, states)

    def flush(self) -> None:
        """Write what the file lacks, and make it complete without the files beside it. Raises `UserError`."""
        self._repair()
        self.store.flush()

    def _repair(self) -> None:
        with self.lock:
            if self._incomplete:
                with self._writing():
                    pass

    def close(self) -> None:
        """Close the file. Raises `UserError` if the last changes could not be written."""
        with self.lock:
            try:
                self._repair()
            finally:
                self.store.close()


def default_name(kind: str, number: int) -> str:
    """The name of a take that nobody has named."""
    return NAMES[kind] if kind in ("empty", "played") else f"{NAMES.get(kind, kind)} {number}"


@contextmanager
def naming(number: int) -> Iterator[None]:
    """Turn errors of the checks into `UserError` that name the take."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"take {number}: {error}") from None


def check_extension(
    take: Take,
    first: int,
    rows: Sequence[Row],
    end: float,
    voice: Sequence[int] | None,
    pedal: Sequence[tuple[float, int]],
) -> None:
    """Raise `ValueError` for arguments of `Session.extend` after which the take could not be loaded."""
    known = len(take.rows) if voice is None else min(len(take.rows), len(take.voice or []))
    if first > known:
        raise ValueError(f"notes from {first} on: expected at most {known}")
    check_notes(rows, voice, first)
    for move in pedal:
        checked_pedal(*move)
    checked_field("end", end)


def whole_take(take: Take) -> dict[str, Any]:
    """The notes, voices and pedal of a take, as JSON values."""
    return {"notes": list(take.rows), "voice": take.voice and list(take.voice), "pedal": list(take.pedal)}


def notes_message(take: Take, first: int, pedal_first: int | None = None) -> dict[str, Any]:
    """The message `notes`: the own notes of a take from index `first` on; pedal from `pedal_first` on, None: none."""
    return {
        "type": "notes",
        "take": take.id,
        "from": first,
        "notes": take.rows[first:],
        "voice": take.voice[first:] if take.voice is not None else None,
        "pedal": None if pedal_first is None else take.pedal[pedal_first:],
        "pedal_from": pedal_first,
        "end": take.end,
    }


def _known(stored: Any) -> dict[str, Any]:
    """Return the stored settings that are valid."""
    known = {}
    for name, value in stored.items() if isinstance(stored, dict) else ():
        if name in SETTINGS and value is not None:
            try:
                known[name] = SETTINGS[name](value)
                check_settings(known)
            except (ValueError, UserError):
                known.pop(name, None)
    return known
