"""What a session file holds, checked: it may be somebody else's."""

import sqlite3
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsmr_mlx.common.parsing import parse_json
from dsmr_mlx.studio.messages import MAX_SEED, MAX_TIME, PITCH, TAKE, TIME, Check, boolean, integer, number
from dsmr_mlx.studio.takes import KINDS, Action, Take, Tree, ms


def instance(kind: type) -> Check:
    """A check for values of a type."""

    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError(f"a value of type {kind.__name__}")
        return value

    return check


def one_of(values: Sequence[str]) -> Check:
    """A check for some texts."""

    def check(value: Any) -> str:
        if value not in values:
            raise ValueError(f"one of {', '.join(values)}")
        return value

    return check


def nullable(check: Check) -> Check:
    """A check for what may be null."""
    return lambda value: None if value is None else check(value)


FIELDS: dict[str, Check] = {  # of a take
    "id": TAKE,
    "parent": nullable(TAKE),
    "kind": one_of(KINDS),
    "name": instance(str),
    "begin": TIME,
    "end": TIME,
    "after": nullable(number(-MAX_TIME, MAX_TIME)),
    "resume": nullable(TIME),
    "growing": boolean,
    "kept": nullable(boolean),
    "model": nullable(instance(str)),
    "seed": nullable(integer(0, MAX_SEED)),
    "settings": nullable(instance(dict)),
    "group": nullable(TAKE),
}
PEDAL_TIME = number(-MAX_TIME, MAX_TIME)


def load_tree(db: sqlite3.Connection) -> tuple[Tree, dict[str, Any]]:
    """Return what `Store.load` does. Raises `ValueError` and others for values that no session has."""
    meta = {name: parse_json(value) for name, value in db.execute("SELECT name, value FROM meta")}
    tree = Tree()
    for take, value in db.execute("SELECT id, value FROM takes ORDER BY id"):
        tree.takes[take] = checked_take(take, parse_json(value), tree.takes)
    for take, i, *row, voice in db.execute("SELECT * FROM notes ORDER BY take, i"):
        add_note(tree.takes[take], i, row, voice)
    for take, _, time, value in db.execute("SELECT * FROM pedal ORDER BY take, i"):
        tree.takes[take].pedal.append((PEDAL_TIME(time), PITCH(value)))
    for take, vocabulary, ids in db.execute("SELECT * FROM tokens"):
        tree.takes[take].tokens = str(vocabulary), np.frombuffer(ids, "<i4").astype(np.int64)
    tree.actions = [Action.from_list(parse_json(v)) for (v,) in db.execute("SELECT value FROM actions ORDER BY i")]
    tree.done, tree.selected = int(meta.get("done", 0)), meta.get("selected")
    check_actions(tree)
    check_times(tree)
    tree.hidden = set(tree.takes) - {take for action in tree.actions[: tree.done] for take in action.added}
    return tree, meta


def checked_take(take_id: int, values: dict[str, Any], earlier: dict[int, Take]) -> Take:
    """Return a take without notes. Raises `ValueError` for values that no take has."""
    take = Take(**{name: FIELDS[name](value) for name, value in instance(dict)(values).items()})
    valid = take.id == take_id and (take.parent is None or take.parent in earlier) and take.begin <= take.end
    if not valid or (take.resume is None) != (take.after is None):
        raise ValueError(f"take {take_id}")
    # The music around its own does not overlap: else it could double from each take to the next.
    if take.resume is not None and not take.begin <= min(take.resume, ms(take.resume + take.after)):
        raise ValueError(f"take {take_id}")
    take.growing = False
    return take


def check_times(tree: Tree) -> None:
    """Raise `ValueError` if the music of a take ends after `MAX_TIME`."""
    last = {}
    for take in tree.takes.values():  # parents come first
        moved = 0.0 if take.parent is None or take.resume is None else last[take.parent] + take.after
        last[take.id] = max([take.begin, moved, *(row[1] for row in take.rows)])
        TIME(last[take.id])


def add_note(take: Take, i: int, row: list, voice: int | None) -> None:
    """Append a stored note. Raises `ValueError` if it is none."""
    onset, offset, pitch, velocity = row
    times = isinstance(onset, float) and isinstance(offset, float) and 0 <= onset < offset <= MAX_TIME
    whole = all(isinstance(value, int) for value in (i, pitch, velocity, 0 if voice is None else voice))
    if not (times and whole and i == len(take.rows) and 0 <= pitch < 128 and 1 <= velocity < 128):
        raise ValueError(f"note {i} of take {take.id}")
    take.rows.append((onset, offset, pitch, velocity))
    if voice is not None:
        if take.voice is None:
            take.voice = []
        take.voice.append(voice)
        if len(take.voice) != len(take.rows):
            raise ValueError(f"voices of take {take.id}")


def check_actions(tree: Tree) -> None:
    """Raise `ValueError` if actions refer to what is not there."""
    if not 0 <= tree.done <= len(tree.actions):
        raise ValueError(f"{tree.done} actions of {len(tree.actions)} in effect")
    for action in tree.actions:
        ids = {*action.added, *(change[0] for change in action.changes), *action.selected} - {None}
        if not ids <= set(tree.takes) or not {change[1] for change in action.changes} <= set(Tree.EDITABLE):
            raise ValueError("an action on a take that does not exist")
        for _, name, *values in action.changes:
            if not all(isinstance(v, str) if name == "name" else v in (None, True, False) for v in values):
                raise ValueError(f"a change of {name}")
    if tree.selected is not None and tree.selected not in tree.takes:
        raise ValueError(f"take {tree.selected} is selected, but does not exist")
