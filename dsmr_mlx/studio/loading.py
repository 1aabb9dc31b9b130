"""What a session file holds, checked: it may be somebody else's."""

import sqlite3
from typing import Any

import numpy as np

from dsmr_mlx.common.parsing import parse_json
from dsmr_mlx.studio.checks import check_notes, check_times, checked_fields, checked_pedal, instance
from dsmr_mlx.studio.takes import Action, Take, Tree


def load_tree(db: sqlite3.Connection) -> tuple[Tree, dict[str, Any]]:
    """Return what `Store.load` does. Raises `ValueError` and others for values that no session has."""
    meta = {name: parse_json(value) for name, value in db.execute("SELECT name, value FROM meta")}
    tree = Tree()
    for take, value in db.execute("SELECT id, value FROM takes ORDER BY id"):
        tree.takes[take] = loaded_take(take, parse_json(value), tree.takes)
    for take, i, *row, voice in db.execute("SELECT * FROM notes ORDER BY take, i"):
        add_note(tree.takes[take], i, row, voice)
    for take, _, time, value in db.execute("SELECT * FROM pedal ORDER BY take, i"):
        tree.takes[take].pedal.append(checked_pedal(time, value))
    for take, vocabulary, ids in db.execute("SELECT * FROM tokens"):
        tree.takes[take].tokens = str(vocabulary), np.frombuffer(ids, "<i4").astype(np.int64)
    tree.actions = [Action.from_list(parse_json(v)) for (v,) in db.execute("SELECT value FROM actions ORDER BY i")]
    tree.done, tree.selected = int(meta.get("done", 0)), meta.get("selected")
    check_actions(tree)
    check_times(tree.takes.values())  # parents come first
    tree.hidden = set(tree.takes) - {take for action in tree.actions[: tree.done] for take in action.added}
    return tree, meta


def loaded_take(take_id: int, values: dict[str, Any], earlier: dict[int, Take]) -> Take:
    """Return a take without notes. Raises `ValueError` for values that no take has."""
    take = Take(**checked_fields(instance(dict)(values), earlier))
    if take.id != take_id:
        raise ValueError(f"take {take.id}: expected {take_id}")
    take.growing = False
    return take


def add_note(take: Take, i: int, row: list, voice: int | None) -> None:
    """Append a stored note. Raises `ValueError` if it is none."""
    check_notes([row], None if voice is None else [voice], i)
    if i != len(take.rows):
        raise ValueError(f"note {i} of take {take.id}: expected note {len(take.rows)}")
    take.rows.append(tuple(row))
    if voice is not None:
        if take.voice is None:
            take.voice = []
        take.voice.append(voice)
        if len(take.voice) != len(take.rows):
            raise ValueError(f"voices of take {take.id}: expected one for each note")


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
