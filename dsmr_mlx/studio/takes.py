"""Takes: pieces of music that grow out of each other, as a tree with undo and redo. Pure data.

A take holds its own notes only. The music of a take is, with its parent's music:

    notes that end by `begin` | the take's own notes | notes from `resume` on, moved by `after`

Notes of the parent that sound across `begin` are among the own notes, with the ends that they have in the take. Times
are seconds, to the millisecond, so that clients can name them exactly.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.gapped import joined
from dsmr_mlx.music.notes import MIN_SECONDS, Notes

ROOTS = ("empty", "file", "played")
KINDS = (*ROOTS, "continue", "replace", "insert", "lead", "duet")
CACHED = 16  # pieces of music
MAX_NAME = 200  # characters

Row = tuple[float, float, int, int]  # onset, offset, pitch, velocity


@dataclass
class Take:
    """A take; see the module and `docs/studio-protocol.md` for the fields.

    rows: the own notes, in the order in which they came; voice: 0 for a person and 1 for the model, for each of them;
    pedal: pairs (time, value); tokens: the fingerprint of a vocabulary, and the ids `(T,)` of the whole music of the
    take as a model has read and played it.
    """

    id: int
    parent: int | None
    kind: str
    name: str
    begin: float = 0.0
    end: float = 0.0
    after: float | None = None
    resume: float | None = None
    growing: bool = False
    kept: bool | None = None
    model: str | None = None
    seed: int | None = None
    settings: dict[str, Any] | None = None
    group: int | None = None
    rows: list[Row] = field(default_factory=list)
    voice: list[int] | None = None
    pedal: list[tuple[float, int]] = field(default_factory=list)
    tokens: tuple[str, np.ndarray] | None = None

    HELD_BACK = ("rows", "voice", "pedal", "tokens")  # fields that are stored and sent apart from the others

    def to_dict(self) -> dict[str, Any]:
        """All but notes, voices, pedal and tokens, as JSON values."""
        return {name: value for name, value in vars(self).items() if name not in self.HELD_BACK}

    @property
    def own(self) -> Notes:
        """The own notes, sorted."""
        return Notes.of(self.rows)


@dataclass(frozen=True)
class Action:
    """A change of the tree that can be undone: takes added, fields of takes changed, another selection.

    changes: (take, field, before, after) each; selected: before and after
    """

    added: tuple[int, ...] = ()
    changes: tuple[tuple[int, str, Any, Any], ...] = ()
    selected: tuple[int | None, int | None] = (None, None)

    def to_list(self) -> list:
        """The action as JSON values."""
        return [list(self.added), [list(change) for change in self.changes], list(self.selected)]

    @classmethod
    def from_list(cls, values: Sequence) -> Action:
        """The action of `to_list`. Raises `ValueError` or `TypeError` for anything else."""
        added, changes, selected = values
        before, after = selected
        return cls(
            tuple(map(int, added)), tuple((int(t), str(f), old, new) for t, f, old, new in changes), (before, after)
        )


class Tree:
    """Takes by their ids, the selected one, and the actions so far, of which the first `done` are in effect.

    Takes that are undone are hidden; nothing is ever forgotten.
    """

    EDITABLE = ("kept", "name")

    def __init__(self) -> None:
        self.takes: dict[int, Take] = {}
        self.actions: list[Action] = []
        self.done = 0
        self.selected: int | None = None
        self.hidden: set[int] = set()
        self._music: OrderedDict[int, Notes] = OrderedDict()  # of takes that do not grow

    @property
    def can_undo(self) -> bool:
        """Whether there is something to undo."""
        return self.done > 0

    @property
    def can_redo(self) -> bool:
        """Whether there is something to redo."""
        return self.done < len(self.actions)

    @property
    def next_id(self) -> int:
        """The id of the next take: ids are never used again."""
        return max(self.takes, default=0) + 1

    @property
    def next_group(self) -> int:
        """The number of the next group of alternatives."""
        return max((take.group or 0 for take in self.takes.values()), default=0) + 1

    def get(self, take: int) -> Take:
        """Return a take that is not undone. Raises `UserError` for other ids."""
        if take not in self.takes or take in self.hidden:
            raise UserError(f"`take` {take}: no such take")
        return self.takes[take]

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Take back the actions of the block if it raises."""
        takes, actions, hidden = dict(self.takes), list(self.actions), set(self.hidden)
        place, fields = (self.done, self.selected), [(take, take.kept, take.name) for take in takes.values()]
        try:
            yield
        except BaseException:
            self.takes, self.actions, self.hidden = takes, actions, hidden
            self.done, self.selected = place
            for take, kept, name in fields:
                take.kept, take.name = kept, name
            raise

    def add(self, takes: Sequence[Take], roots: Sequence[Take] = ()) -> Action:
        """Add takes, and select the first of them. roots: new ones, from which they grow."""
        added = [*roots, *takes]
        for take in added:
            self.takes[take.id] = take
            self.hidden.add(take.id)  # until the action is in effect
        return self._do(Action(tuple(t.id for t in added), selected=(self.selected, takes[0].id)))

    def edit(self, take: int, name: str, value: Any) -> Action:
        """Change a field of a take, one of `EDITABLE`."""
        before = getattr(self.get(take), name)
        return self._do(Action(changes=((take, name, before, value),), selected=(self.selected, self.selected)))

    def select(self, take: int | None) -> Action:
        """Select a take, or none."""
        if take is not None:
            self.get(take)
        return self._do(Action(selected=(self.selected, take)))

    def _do(self, action: Action) -> Action:
        del self.actions[self.done :]
        self.actions.append(action)
        self.redo()
        return action

    def undo(self) -> Action:
        """Undo the last action. Raises `UserError` without one."""
        if not self.can_undo:
            raise UserError("`undo`: nothing to undo")
        self.done -= 1
        action = self.actions[self.done]
        self.hidden |= set(action.added)
        for take, name, before, _ in reversed(action.changes):
            setattr(self.takes[take], name, before)
        self.selected = action.selected[0]
        return action

    def redo(self) -> Action:
        """Do again what was undone last. Raises `UserError` if there is nothing."""
        if not self.can_redo:
            raise UserError("`redo`: nothing to redo")
        action = self.actions[self.done]
        self.done += 1
        self.hidden -= set(action.added)
        for take, name, _, after in action.changes:
            setattr(self.takes[take], name, after)
        self.selected = action.selected[1]
        return action

    def music(self, take: int) -> Notes:
        """Return the music of a take, hidden or not."""
        chain = self.chain(take)
        notes = Notes.empty()
        known = next((i for i, each in enumerate(chain) if each.id in self._music), None)
        if known is not None:
            notes, chain = self._music[chain[known].id], chain[:known]
        for each in reversed(chain):
            notes = put_together(notes, each)
            if not each.growing:
                self._remember(each.id, notes)
        return notes

    def voices(self, take: int) -> list[int]:
        """Return who played each note of the music of a take, in its order: 0 a person, 1 the model."""
        known: dict[tuple[float, int], int] = {}  # by onset and pitch
        for each in reversed(self.chain(take)):
            maker = int(each.kind not in ROOTS)
            keys = [key_of(row) for row in each.rows]
            voices = each.voice or [known.get(key, maker) if key[0] < each.begin else maker for key in keys]
            moved = each.after or 0.0
            later = {
                (ms(t + moved), p): v for (t, p), v in known.items() if each.resume is not None and t >= each.resume
            }
            known = {key: voice for key, voice in known.items() if key[0] < each.begin}
            known |= dict(zip(keys, voices, strict=True)) | later
        return [known.get(key_of(row), 1) for row in self.music(take).rows]

    def pedal(self, take: int) -> list[tuple[float, int]]:
        """Return the sustain pedal of the music of a take, as pairs (time, value)."""
        pedal: list[tuple[float, int]] = []
        for each in reversed(self.chain(take)):
            after = [] if each.resume is None else [(ms(t + each.after), v) for t, v in pedal if t >= each.resume]
            pedal = [(t, v) for t, v in pedal if t < each.begin] + each.pedal + after
        return pedal

    def chain(self, take: int) -> list[Take]:
        """Return a take and its ancestors."""
        chain = [self.takes[take]]
        while chain[-1].parent is not None:
            chain.append(self.takes[chain[-1].parent])
        return chain

    def _remember(self, take: int, notes: Notes) -> None:
        self._music[take] = notes
        self._music.move_to_end(take)
        while len(self._music) > CACHED:
            self._music.popitem(last=False)

    def forget_music(self, take: int) -> None:
        """Note that the own notes of a take have changed."""
        self._music.pop(take, None)


def put_together(parent: Notes, take: Take) -> Notes:
    """Return the music of a take, given its parent's."""
    parts = [parent.take(parent.offset <= take.begin), take.own]
    if take.resume is not None:
        parts.append(on_milliseconds(parent.take(parent.onset >= take.resume).shifted(take.after)))
    return joined(*parts)


def ms(seconds: float) -> float:
    """Round a time to milliseconds."""
    return round(float(seconds), 3)


def key_of(row: Row) -> tuple[float, int]:
    """The onset, to the millisecond, and pitch of a note: what makes it one note of a piece."""
    return ms(row[0]), row[2]


def on_milliseconds(notes: Notes) -> Notes:
    """Return notes with times on whole milliseconds; each lasts at least one."""
    onset = np.rint(notes.onset * 1000)
    offset = np.maximum(np.rint(notes.offset * 1000), onset + 1000 * MIN_SECONDS)
    return replace(notes, onset=onset / 1000, offset=offset / 1000)


def rows_of(notes: Notes) -> list[Row]:
    """Return notes as rows, to the millisecond."""
    return on_milliseconds(notes).rows


def sounding_across(notes: Notes, time: float) -> Notes:
    """Return the notes that begin before a time and end after it."""
    return notes.take((notes.onset < time) & (notes.offset > time))


def pedal_between(
    pedal: Sequence[tuple[float, int]], begin: float, resume: float | None = None, end: float = 0.0
) -> list[tuple[float, int]]:
    """Return the own pedal of new music from `begin` to `end`: up, and then as the parent's is at `resume`, if given.

    pedal: the parent's, pairs (time, value).
    """
    before = [value for time, value in pedal if time < begin]
    lifted = [(begin, 0)] if before and before[-1] else []
    later = [] if resume is None else [value for time, value in pedal if time < resume]
    return lifted + ([(end, later[-1])] if later and later[-1] else [])
