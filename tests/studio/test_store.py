"""A session on disk: everything comes back, damage is named, a file is open once."""

import contextlib
import json
import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.music import random_notes
from support.studio import Recorder

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.studio.session import Session
from dsmr_mlx.studio.store import SUFFIX, Store
from dsmr_mlx.studio.takes import rows_of


def silent(message, but=None):
    """Publish nothing."""


def filled(path: Path, publish=silent) -> Session:
    """A session with takes of several kinds, actions and settings."""
    session = Session(path, publish)
    rows = rows_of(random_notes(1, 30))
    session.add("file", name="Étude", rows=rows, end=rows[-1][1], pedal=[(0.5, 127), (1.0, 0)])
    session.add(
        "continue", 2, parent=1, begin=2.0, end=2.0, growing=True, model="m", seed=4, settings={"key": "C major"}
    )
    session.extend(2, 0, [(2.0, 2.5, 60, 60), (2.1, 2.6, 62, 61)], 2.6)
    session.extend(2, 1, [(2.1, 3.0, 62, 61), (2.7, 3.0, 64, 62)], 3.0)
    session.add("duet", parent=1, begin=4.0, end=5.0, rows=[(4.0, 5.0, 50, 50)], voice=[1], growing=True)
    session.extend(4, 1, [(5.0, 5.5, 51, 50)], 5.5, voice=[0], pedal=[(5.2, 90)], growing=False)
    session.keep_tokens(2, "vocabulary", np.array([1, 5, 70_000]))
    session.edit(2, "kept", True)
    session.edit(3, "name", "Other")
    session.select(1)
    session.undo()
    session.set({"temperature": 0.9, "pitch_range": [40, 80]})
    return session


VOCABULARY = SimpleNamespace(fingerprint="vocabulary", vocab_size=70_001)


def seen(session: Session) -> dict:
    """All that clients see, with takes complete."""
    message = session.message()
    return message | {"takes": [take | {"growing": False} for take in message["takes"]]}


def test_everything_comes_back(tmp_path):
    session = filled(tmp_path / "a.studio")
    before = seen(session)
    session.close()
    again = Session(tmp_path / "a.studio", silent)
    assert seen(again) == before
    assert again.tokens(2, VOCABULARY).tolist() == [1, 5, 70_000]
    assert again.tokens(None, VOCABULARY) is None
    assert again.tokens(2, SimpleNamespace(fingerprint="another", vocab_size=70_001)) is None
    too_small = SimpleNamespace(fingerprint="vocabulary", vocab_size=70_000)
    assert again.tokens(2, too_small) is None  # a foreign file with ids that the vocabulary lacks
    again.redo()
    assert again.tree.selected == 1
    again.undo()
    again.undo()
    assert again.get(3).name == "continue 3".replace("continue", "Take")
    again.close()


def test_nothing_is_lost_without_closing(tmp_path):
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from studio.test_store import filled, seen
import json
session = filled(Path(sys.argv[2]))
print(json.dumps(seen(session)), flush=True)
os.kill(os.getpid(), 9)
"""
    path, tests = tmp_path / "a.studio", Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, tests, path], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    again = Session(path, silent)
    assert json.loads(json.dumps(seen(again))) == json.loads(done.stdout)
    assert not any(take.growing for take in again.tree.takes.values())
    again.close()


def test_a_second_program_is_refused(tmp_path):
    path = tmp_path / "a.studio"
    session = filled(path)
    with pytest.raises(UserError, match=f"^{path}: open in another studio, expected a session that is not in use$"):
        Store(path)
    code = "import sys; from pathlib import Path; from dsmr_mlx.studio.store import Store; Store(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert "open in another studio" in done.stderr
    session.close()
    Store(path).close()


def test_copies_are_complete(tmp_path):
    session = filled(tmp_path / "a.studio")
    session.store.save_state("m", b"d", 3, b"state" * 1000)
    for name, states, found in (("b", True, [(3, b"d")]), ("c", False, [])):
        path = tmp_path / f"{name}.studio"
        session.store.copy_to(path, states)
        copy = Session(path, silent)
        assert seen(copy) | {"name": "a"} == seen(session)
        assert copy.store.states("m") == found
        copy.close()
    assert {p.name for p in tmp_path.iterdir() if p.name[0] != "."} - {"a.studio-wal"} == {
        "a.studio",
        "b.studio",
        "c.studio",
    }
    with pytest.raises(UserError, match=r"nowhere.*: cannot be"):
        session.store.copy_to(tmp_path / "nowhere" / "d.studio")
    session.close()


def test_foreign_files_are_refused(tmp_path):
    text = tmp_path / "text.studio"
    text.write_text("not a database at all")
    with pytest.raises(UserError, match=rf"^{text}: not a session of the studio$"):
        Store(text)
    other = tmp_path / "other.studio"
    db = sqlite3.connect(other)
    db.execute("CREATE TABLE takes (id INTEGER)")
    db.commit()
    db.close()
    with pytest.raises(UserError, match=rf"^{other}: a database of another program"):
        Store(other)
    with pytest.raises(UserError, match=r"Is a directory"):
        Store(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("PRAGMA user_version = 99", "version 99"),
        ("CREATE TRIGGER t AFTER INSERT ON notes BEGIN DELETE FROM takes; END", "damaged, its tables"),
        ("DROP TABLE actions", "damaged, its tables"),
        ("CREATE TABLE more (a)", "damaged, its tables"),
        ("UPDATE notes SET pitch = 200 WHERE i = 0", "damaged"),
        ("UPDATE notes SET onset = 'now' WHERE i = 0", "damaged"),
        ("UPDATE notes SET offset = onset - 1", "damaged"),
        ("UPDATE notes SET onset = 1e300, offset = 2e300", "damaged"),
        ("DELETE FROM notes WHERE i = 1", "damaged"),
        ("UPDATE notes SET voice = x'00' WHERE take = 4", "damaged"),
        ("INSERT INTO notes VALUES (77, 0, 0.0, 1.0, 60, 60, NULL)", "damaged"),
        ("UPDATE takes SET value = '[1]'", "damaged"),
        ("UPDATE takes SET value = '{' || value", "damaged"),
        ("UPDATE takes SET value = replace(value, '\"parent\": 1', '\"parent\": 9')", "damaged"),
        *(
            (f"UPDATE takes SET value = json_set(value, '$.{name}', json('{value}')) WHERE id = {take}", "damaged")
            for take, name, value in (
                *((2, "begin", value) for value in ("-5", "3.5", "1e7", "true", '"2"', "null")),
                *((2, "end", value) for value in ("1e7", "-1", "[1]")),
                *((take, name, value) for take in (2, 5) for name, value in (("after", "-1e9"), ("resume", "-1"))),
                (5, "after", "-4.1"),
                (5, "after", "9e5"),
                (5, "resume", "3.9"),
                (2, "group", '"x"'),
                (2, "settings", "[1]"),
                (2, "seed", '"<b>"'),
                (2, "seed", "-1"),
                (2, "parent", "1.5"),
                (2, "kept", "2"),
                (2, "kind", "[1]"),
                (2, "name", "1"),
                (2, "model", "{}"),
                (2, "growing", "0"),
                (2, "rows", "[[1, 2, 3, 4]]"),
                (2, "tokens", "[1]"),
            )
        ),
        ("UPDATE notes SET offset = 2e6 WHERE take = 1 AND i = 29", "damaged"),
        ("UPDATE pedal SET time = 'now'", "damaged"),
        ("UPDATE pedal SET value = 1.5", "damaged"),
        ("UPDATE takes SET value = replace(value, '\"kind\"', '\"sort\"')", "damaged"),
        ("DELETE FROM takes WHERE id = 2", "damaged"),
        ("UPDATE tokens SET ids = x'00'", "damaged"),
        ("UPDATE tokens SET ids = 'text'", "damaged"),
        ("UPDATE tokens SET take = 77", "damaged"),
        ("UPDATE actions SET value = '[]'", "damaged"),
        ("UPDATE actions SET value = '[[1], [[1, \"rows\", 1, 2]], [null, 1]]'", "damaged"),
        ("UPDATE meta SET value = '1000' WHERE name = 'done'", "damaged"),
        ("UPDATE meta SET value = '1000' WHERE name = 'selected'", "damaged"),
        ("UPDATE meta SET value = '[[[' WHERE name = 'settings'", "damaged"),
    ],
)
def test_damaged_values_are_named(tmp_path, change, message):
    path = tmp_path / "a.studio"
    session = filled(path)
    session.add("insert", parent=1, begin=4.0, end=8.0, resume=4.0, after=4.0)
    session.extend(1, 29, [(999_999.0, 999_999.5, 60, 60)], 999_999.5) if "9e5" in change else None
    session.close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode = DELETE")
    db.execute(change)
    db.commit()
    db.close()
    with pytest.raises(UserError, match=f"^{path}: .*{message}"):
        Session(path, silent)


LATE = [(999_999.0, 1_000_001.0, 60, 60)]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.add("file", rows=LATE),
        lambda s: s.add("file", rows=[(1.0, 1.0, 60, 60)]),
        lambda s: s.add("file", rows=[(0.0, 1.0, 128, 60)]),
        lambda s: s.add("file", rows=[(0.0, float("nan"), 60, 60)]),
        lambda s: s.add("file", pedal=[(1_342_177.0, 127)]),
        lambda s: s.add("file", pedal=[(1.0, 128)]),
        lambda s: s.add("file", end=1e7),
        lambda s: s.add("file", voice=[0]),
        lambda s: s.add("continue", parent=1, begin=-1.0),
        lambda s: s.add("continue", parent=1, begin=3.0, end=2.0),
        lambda s: s.add("replace", parent=1, begin=3.0, end=4.0, resume=2.0, after=0.0),
        lambda s: s.add("insert", parent=1, begin=0.0, end=4.0, resume=0.0, after=999_999.0),
        lambda s: s.extend(2, 2, LATE, 5.0),
        lambda s: s.extend(2, 9, [(3.0, 4.0, 60, 60)], 5.0),
        lambda s: s.extend(2, 2, [(3.0, 4.0, 60, 0)], 5.0),
        lambda s: s.extend(2, 2, [], 1e7),
        lambda s: s.extend(2, 2, [], 5.0, pedal=[(1e7, 0)]),
        lambda s: s.extend(4, 2, [(5.0, 6.0, 60, 60)], 6.0, voice=[]),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, change):
    session = filled(tmp_path / "a.studio")
    before = seen(session)
    with pytest.raises(UserError, match=r"^take \d: .*expected"):
        change(session)
    assert seen(session) == before
    session.select(3)
    checked_again(session)


def test_unknown_settings_are_left_out(tmp_path):
    path = tmp_path / "a.studio"
    session = filled(path)
    session.store.save_meta("settings", {"temperature": 1e9, "key": "C major", "colour": "red", "top_p": "x"})
    session.close()
    again = Session(path, silent)
    assert {name: value for name, value in again.settings.items() if value is not None} == {"key": "C major"}
    again.close()


def test_flipped_bytes_and_cut_files_are_refused_or_read(tmp_path):
    path = tmp_path / "a.studio"
    filled(path).close()
    whole = path.read_bytes()
    choose = random.Random(0)
    for i in range(60):
        data = bytearray(whole)
        if i % 3:
            for _ in range(choose.randrange(1, 200)):
                data[choose.randrange(len(data))] = choose.randrange(256)
        else:
            del data[choose.randrange(len(data)) :]
        damaged = tmp_path / f"{i}.studio"
        damaged.write_bytes(data)
        with contextlib.suppress(UserError):
            Session(damaged, silent).close()
            continue
        with pytest.raises(UserError, match=f"^{damaged}: [^\n]*$"):
            Session(damaged, silent)


def test_states_are_bounded_and_the_least_recently_used_go(tmp_path):
    store = Store(tmp_path / f"a{SUFFIX}")
    for i in range(4):
        store.save_state("m", bytes([i]), i, bytes(100), most=350)
        store.state("m", bytes([0]))
    assert {digest[0] for _, digest in store.states("m")} == {0, 2, 3}
    assert store.state("other", bytes([0])) is None
    store.drop_state("m", bytes([0]))
    assert store.state("m", bytes([0])) is None
    store.close()


def test_a_change_is_written_wholly_or_not_at_all(tmp_path):
    session = filled(tmp_path / "a.studio")

    def fail() -> None:
        with session.store.changing():
            session.store.save_notes(1, 0, [])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    before = seen(session)
    session.close()
    again = Session(tmp_path / "a.studio", silent)
    assert seen(again) == before
    again.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be read or written"):
        Store(tmp_path / "a.studio")
    tmp_path.chmod(0o700)


@contextlib.contextmanager
def full_disk(session: Session):
    """Let the file of a session not grow."""
    limit = lambda pages: session.store._db.execute(f"PRAGMA max_page_count = {pages}").fetchall()  # noqa: E731
    limit(session.store._db.execute("PRAGMA page_count").fetchone()[0])
    yield
    limit(1 << 30)


LONG = [(i * 0.1, i * 0.1 + 0.05, 60, 64) for i in range(3000)]


def checked_again(session: Session) -> None:
    """Assert that a session that is opened again is as it was."""
    before = seen(session)
    session.close()
    again = Session(session.path, silent)
    assert seen(again) == before
    assert again.tokens(2, VOCABULARY).tolist() == [1, 5, 70_000]
    again.close()


@pytest.mark.parametrize(
    "then", [lambda s: s.select(3), lambda s: s.extend(2, 2, [(6.0, 6.5, 60, 60)], 6.5), Session.flush]
)
def test_an_action_that_cannot_be_written_is_taken_back(tmp_path, then):
    session = filled(tmp_path / "a.studio")
    before = seen(session)
    with full_disk(session), pytest.raises(UserError, match=r"a\.studio: cannot be .* \(database or disk is full\)$"):
        session.add("file", name="more", rows=LONG, end=300.0)
    assert seen(session) == before
    session.redo()  # what was undone before has not been forgotten
    then(session)
    checked_again(session)


@pytest.mark.parametrize(
    "then", [lambda s: s.extend(4, 3002, [(400.0, 401.0, 60, 60)], 401.0, voice=[0]), Session.flush]
)
def test_notes_that_cannot_be_written_are_written_later(tmp_path, then):
    published = Recorder()
    session = filled(tmp_path / "a.studio", published)
    with full_disk(session), pytest.raises(UserError, match="disk is full"):
        session.extend(4, 2, LONG, 300.0, voice=[0] * len(LONG))
    assert len(published.of("notes")[-1]["notes"]) == len(LONG)
    with full_disk(session), pytest.raises(UserError, match="disk is full"):
        session.set({"temperature": 0.5})
    then(session)
    checked_again(session)


@pytest.mark.parametrize("states", [True, False])
def test_a_copy_has_what_could_not_be_written(tmp_path, states):
    """A full stick is rescued on another disk."""
    session = filled(tmp_path / "a.studio")
    with full_disk(session):
        with pytest.raises(UserError, match="disk is full"):
            session.extend(4, 2, LONG, 300.0, voice=[0] * len(LONG))
        session.copy_to(tmp_path / "b.studio", states)
    copy = Session(tmp_path / "b.studio", silent)
    assert seen(copy) == seen(session) | {"name": "b"}
    assert len(copy.get(4).rows) == len(LONG) + 2
    copy.close()
    session.close()
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == [
        "a.studio",
        "b.studio",
    ]


def test_closing_writes_what_the_file_lacks(tmp_path):
    session = filled(tmp_path / "a.studio")
    with full_disk(session), pytest.raises(UserError, match="disk is full"):
        session.extend(4, 2, LONG, 300.0, voice=[0] * len(LONG))
    checked_again(session)


def test_nothing_grows_out_of_a_take_that_is_undone(tmp_path):
    session = filled(tmp_path / "a.studio")
    for _ in range(4):
        session.undo()
    before = seen(session)
    assert before["hidden"] == [2, 3, 4]
    with pytest.raises(UserError, match=r"^`take` 2: no such take$"):
        session.add("continue", parent=2)
    assert seen(session) == before
    session.close()


def test_an_open_file_is_complete_after_a_flush(tmp_path):
    session = filled(tmp_path / "a.studio")
    session.flush()
    (tmp_path / "b.studio").write_bytes((tmp_path / "a.studio").read_bytes())
    copy = Session(tmp_path / "b.studio", silent)
    assert seen(copy) | {"name": "a"} == seen(session)
    copy.close()
    before = (tmp_path / "a.studio-wal").stat()
    session.flush()  # has nothing to do
    assert (tmp_path / "a.studio-wal").stat() == before
    session.close()


def test_what_a_deleted_session_has_left_changes_no_other(tmp_path):
    session = filled(tmp_path / "a.studio")
    log = (tmp_path / "a.studio-wal").read_bytes()
    session.close()
    other = Session(tmp_path / "other.studio", silent)
    other.add("file", name="precious", rows=LONG, end=300.0)
    for name in ("a.studio-wal", "b.studio-wal"):
        (tmp_path / name).write_bytes(log)
    with pytest.raises(UserError, match=r"^`name` a: there is a session of this name"):
        other.store.copy_to(tmp_path / "a.studio")
    other.store.copy_to(tmp_path / "b.studio")
    copy = Session(tmp_path / "b.studio", silent)
    assert seen(copy) | {"name": "other"} == seen(other)
    with pytest.raises(UserError, match="open in another studio"):
        other.store.copy_to(tmp_path / "b.studio")
    copy.close()
    other.close()
