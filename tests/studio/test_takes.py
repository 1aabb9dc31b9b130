"""The music of takes against a note-by-note reference; undo and redo; any sequence of operations."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.music import random_notes

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.gapped import inserted, replaced
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.studio.takes import Action, Take, Tree, ms, on_milliseconds, pedal_between, rows_of, sounding_across


def reference(tree: Tree, number: int) -> list[tuple]:
    """The music of a take as rows, note by note, as the protocol says."""
    take = tree.takes[number]
    parent = [] if take.parent is None else reference(tree, take.parent)
    before = [row for row in parent if row[1] <= take.begin]
    after = [row for row in parent if take.resume is not None and row[0] >= take.resume]
    moved = [(ms(on + (take.after or 0)), ms(off + (take.after or 0)), p, v) for on, off, p, v in after]
    return sorted([*before, *take.rows, *moved])


def root(tree: Tree, seed: int, n: int = 12) -> Take:
    """A file with random notes."""
    rows = rows_of(random_notes(seed, n))
    return Take(tree.next_id, None, "file", "file", end=max(row[1] for row in rows), rows=rows)


def child(tree: Tree, parent: int, kind: str, at: float, length: float, seed: int) -> Take:
    """A take that changes another one from `at` on, made as the jobs make it."""
    music = tree.music(parent)
    at, length = ms(at * max(music.duration, 0.01)), ms(length)
    new = rows_of(random_notes(seed, 3).shifted(at))
    held = rows_of(sounding_across(music, at))
    end = ms(at + length)
    fields = {"replace": (0.0, end), "insert": (length, at)}.get(kind, (None, None))
    rows = held + [row for row in new if row[1] <= end or fields[1] is None]
    return Take(tree.next_id, parent, kind, kind, begin=at, end=end, after=fields[0], resume=fields[1], rows=rows)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["root", "continue", "replace", "insert", "keep", "rename", "select", "undo", "redo"]),
        st.integers(0, 10_000),
        st.floats(0, 1),
        st.floats(0.1, 3),
    ),
    max_size=25,
)


def apply(tree: Tree, operation: tuple) -> None:
    """Do a random operation; one that is impossible changes nothing."""
    kind, number, at, length = operation
    visible = sorted(tree.takes.keys() - tree.hidden)
    chosen = visible[number % len(visible)] if visible else None
    before = snapshot(tree)
    try:
        if kind in ("undo", "redo"):
            getattr(tree, kind)()
        elif kind == "root":
            tree.add([root(tree, number)])
        elif chosen is None:
            with pytest.raises(UserError, match="no such take"):
                tree.edit(1, "kept", True)
        elif kind in ("keep", "rename"):
            tree.edit(chosen, *(("kept", number % 2 == 0) if kind == "keep" else ("name", str(number))))
        elif kind == "select":
            tree.select(chosen)
        else:
            tree.add([child(tree, chosen, kind, at, length, number)])
    except UserError:
        assert kind in ("undo", "redo")
        assert snapshot(tree) == before


def snapshot(tree: Tree) -> tuple:
    """All that clients see."""
    return (
        {number: copy.deepcopy(vars(take)) for number, take in tree.takes.items()},
        tree.selected,
        tree.done,
        frozenset(tree.hidden),
    )


@settings(max_examples=60, deadline=None)
@given(OPERATIONS)
def test_the_music_of_every_take_is_that_of_the_reference(operations):
    tree = Tree()
    for operation in operations:
        apply(tree, operation)
    for number in tree.takes:
        assert sorted(tree.music(number).rows) == reference(tree, number)
        fresh = Tree()
        fresh.takes = tree.takes
        assert fresh.music(number) == tree.music(number)  # the cache changes nothing


@settings(max_examples=60, deadline=None)
@given(OPERATIONS)
def test_undo_and_redo_are_inverse(operations):
    tree = Tree()
    states = [snapshot(tree)]
    for operation in operations:
        if operation[0] not in ("undo", "redo"):
            apply(tree, operation)
            if tree.done == len(states):
                states.append(snapshot(tree))
    visible = [set(s[0]) - s[3] for s in states]
    for i in reversed(range(len(states) - 1)):
        tree.undo()
        assert tree.selected == states[i][1]
        assert tree.takes.keys() - tree.hidden == visible[i]
        for number in visible[i]:
            assert vars(tree.takes[number]) == states[i][0][number]
    assert not tree.can_undo
    for i in range(1, len(states)):
        tree.redo()
        assert tree.selected == states[i][1]
        assert tree.takes.keys() - tree.hidden == visible[i]
    assert snapshot(tree) == states[-1]
    assert not tree.can_redo


@settings(max_examples=60, deadline=None)
@given(OPERATIONS)
def test_the_tree_stays_consistent(operations):
    tree = Tree()
    for operation in operations:
        apply(tree, operation)
        assert 0 <= tree.done <= len(tree.actions)
        shown = tree.takes.keys() - tree.hidden
        assert tree.selected is None or tree.selected in shown
        assert all(tree.takes[number].parent in {None, *shown} for number in shown)
        assert shown == {number for action in tree.actions[: tree.done] for number in action.added}
        restored = [Action.from_list(action.to_list()) for action in tree.actions]
        assert restored == tree.actions


def test_what_was_undone_is_kept_but_hidden():
    tree = Tree()
    tree.add([root(tree, 1)])
    tree.add([root(tree, 2)])
    tree.undo()
    tree.add([root(tree, 3)])
    assert (set(tree.takes), tree.hidden, tree.selected) == ({1, 2, 3}, {2}, 3)
    assert not tree.can_redo
    with pytest.raises(UserError, match=r"^`take` 2: no such take$"):
        tree.get(2)


@pytest.mark.parametrize("seed", range(5))
def test_gaps_are_those_of_the_library(seed):
    """Replacing and inserting equal `music.gapped`."""
    tree = Tree()
    tree.add([root(tree, seed, 40)])
    music = tree.music(1)
    at, end = ms(music.duration / 3), ms(music.duration / 2)
    passage = Notes.of([(at, ms(at + 0.1), 60, 60)])
    for kind, gapped, resume in (
        ("replace", replaced(music, [(at, end)]), end),
        ("insert", inserted(music, at, ms(end - at)), at),
    ):
        rows = rows_of(sounding_across(music, at)) + passage.rows
        after = 0.0 if kind == "replace" else ms(end - at)
        tree.add([Take(tree.next_id, 1, kind, "", begin=at, end=end, after=after, resume=resume, rows=rows)])
        expected = sorted(on_milliseconds(gapped.notes).rows + passage.rows)
        assert sorted(tree.music(tree.selected).rows) == expected


def test_the_pedal_is_put_together_like_the_notes():
    tree = Tree()
    pedal = [(0.5, 127), (1.5, 0), (2.0, 100), (4.0, 0)]
    tree.add([Take(1, None, "file", "", end=5.0, pedal=list(pedal))])
    own = pedal_between(pedal, 1.0, 3.0, 2.0)  # a second of music for what was between 1 and 3
    assert own == [(1.0, 0), (2.0, 100)]
    tree.add([Take(2, 1, "replace", "", begin=1.0, end=2.0, after=-1.0, resume=3.0, pedal=own)])
    assert tree.pedal(2) == [(0.5, 127), (1.0, 0), (2.0, 100), (3.0, 0)]
    assert pedal_between(pedal, 1.8) == []


def test_long_chains_are_quick_and_their_cache_is_bounded():
    tree = Tree()
    tree.add([root(tree, 0, 50)])
    for i in range(300):
        end = tree.music(tree.selected).duration
        rows = [(ms(end + 0.1), ms(end + 0.2), 40 + i % 40, 60)]
        tree.add([Take(tree.next_id, tree.selected, "continue", "", begin=ms(end), end=ms(end + 0.2), rows=rows)])
    assert len(tree.music(tree.selected)) == 350
    assert len(tree._music) <= 16


def test_a_growing_take_changes_its_music():
    tree = Tree()
    tree.add([Take(1, None, "played", "", growing=True)])
    assert len(tree.music(1)) == 0
    tree.takes[1].rows.append((0.0, 1.0, 60, 60))
    assert tree.music(1).rows == [(0.0, 1.0, 60, 60)]
    assert np.array_equal(tree.takes[1].own.onset, [0.0])
