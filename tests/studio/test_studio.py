"""The studio without a server: what messages do while something else is being done."""

import base64
import threading
from argparse import Namespace

import pytest
from mido import Message as MidiMessage
from support.music import on_grid, random_notes
from support.studio import Recorder

from dsmr_mlx.cli.studio import open_studio
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.growing_midi import END_OF_TRACK, chunk, file_header, variable_length
from dsmr_mlx.studio.messages import check
from dsmr_mlx.studio.studio import Studio
from dsmr_mlx.studio.takes import rows_of

TIMEOUT = 30.0


@pytest.fixture
def studio(tmp_path, models):
    """A studio with a file of 6 s, and a client."""
    published = Recorder()
    studio = Studio(tmp_path / "First.studio", tmp_path, models, published, pytest.fail)
    studio.client, studio.published = Recorder(), published
    rows = rows_of(on_grid(random_notes(1, 40, lengths=(20, 120))))
    studio.session.add("file", name="tune", rows=rows, end=max(row[1] for row in rows))
    yield studio
    studio.close()


def send(studio: Studio, type: str, **fields) -> None:
    """Handle a message of the client."""
    studio.handle(studio.client, check({"type": type} | fields))


def wait_for(studio: Studio, request: int) -> dict:
    """Wait for the answer to a request."""
    studio.client.wait(lambda messages: any(m["request"] == request for m in messages))
    (answer,) = (m for m in studio.client.messages if m["request"] == request)
    return answer


MAKING = {
    "continue": {"take": 1},
    "nothing": {"take": None},
    "replace": {"take": 1, "start": 2.0, "end": 4.0},
    "duet": {"on": True, "take": 1},
}


@pytest.mark.parametrize("name", MAKING)
def test_undo_of_what_is_prepared_undoes_nothing_else(studio, name, monkeypatch):
    """The job has loaded its model, and has not added its takes."""
    begun, undone = threading.Event(), threading.Event()
    load = studio.work.load

    def waiting(model):
        loaded = load(model)
        if studio.engine.job is not None:
            begun.set()
            assert undone.wait(TIMEOUT)
        return loaded

    monkeypatch.setattr(studio.work, "load", waiting)
    send(studio, "continue" if name == "nothing" else name, request=1, **MAKING[name])
    assert begun.wait(TIMEOUT)
    send(studio, "undo")
    undone.set()
    assert wait_for(studio, 1) == {"type": "done", "request": 1, "take": None}
    tree = studio.session.tree
    assert (set(tree.takes), tree.hidden, tree.selected, tree.can_redo) == ({1}, set(), 1, False)
    send(studio, "undo")
    assert tree.hidden == {1}


def test_undo_of_candidates_that_are_ranked_keeps_none(studio):
    studio.session.set({"best_of": 4})

    def then(message: dict) -> None:
        if message["type"] == "status" and message["activity"] == "ranking" and not studio.engine.job.stop.is_set():
            send(studio, "undo")

    studio.published.then = then
    send(studio, "replace", request=1, take=1, start=2.0, end=4.0)
    assert wait_for(studio, 1)["take"] is None
    assert set(studio.session.tree.takes) == {1}


@pytest.mark.parametrize("take", [1, None])
def test_undo_of_a_duet_before_its_first_note_ends_it(studio, take):
    send(studio, "duet", request=1, on=True, take=take)
    studio.published.wait(lambda messages: any(m.get("activity") == "duet" for m in messages))
    send(studio, "undo")
    assert wait_for(studio, 1)["take"] is None
    assert (set(studio.session.tree.takes), studio.session.tree.hidden) == ({1}, set())


def test_only_music_comes_from_the_device(studio, monkeypatch):
    send(studio, "listen", on=True)
    recorded = []
    monkeypatch.setattr(studio.recorder, "add", lambda voice, time, message: recorded.append(message))
    drum, key = (MidiMessage("note_on", channel=channel, note=36) for channel in (9, 0))
    for message in (MidiMessage("clock"), drum, key, MidiMessage("start")):
        studio._play(message)
    assert recorded == [key]


def test_the_status_shows_the_recording_whatever_the_engine_does(studio, monkeypatch):
    """`listen` is switched on and off while a file is read, on again, and the reading ends."""
    reading, read = threading.Event(), threading.Event()
    player_at = studio.work.states.player_at

    def waiting(*arguments, **options):
        studio.work.show("reading", "reading the music ahead", progress=0.1)
        reading.set()
        assert read.wait(TIMEOUT)
        return player_at(*arguments, **options)

    def told(activity: str, recording: bool) -> bool:
        last = studio.published.of("status")[-1]
        return (last["activity"], last["recording"]) == (activity, recording)

    studio.engine.drain()
    monkeypatch.setattr(studio.work.states, "player_at", waiting)
    send(studio, "select", take=1)
    assert reading.wait(TIMEOUT)
    try:
        assert told("reading", recording=False)
        for on in (True, False, True):
            send(studio, "listen", on=on)
            assert told("reading", recording=on)
        studio.work.show("loading")
        assert told("loading", recording=True)
        assert studio.welcome()["status"]["recording"]
    finally:
        read.set()
    studio.published.wait(lambda messages: told("listening", recording=True))
    send(studio, "listen", on=False)
    assert told("idle", recording=False)


def test_sessions_that_are_not_opened_are_named(studio, models, capsys):
    (studio.home / "Broken.studio").write_text("no")
    hub = Namespace(publish=Recorder())
    other = open_studio(Namespace(session=None), studio.home, models, hub)
    assert other.session.name == "Session"
    other.close()
    told = "".join(capsys.readouterr().err.split("\n"))
    assert "not opened: " in told
    assert "Broken.studio: not a session of the studio" in told
    assert "First.studio: open in another studio" in told
    assert f"a new session: {studio.home / 'Session.studio'}" in told


def test_a_recording_that_cannot_be_written_locks_no_other_session(studio, monkeypatch):
    send(studio, "listen", on=True)
    studio._play(MidiMessage("note_on", note=60, velocity=50))
    studio.published.wait(lambda messages: 2 in studio.session.tree.takes)

    def full(*arguments):
        raise UserError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(studio.session.store, "save_notes", full)
        with pytest.raises(UserError, match="No space left"):
            send(studio, "new", name="Other")
    assert studio.session.name == "First"
    send(studio, "new", name="Other")
    send(studio, "open", name="First")
    assert [row[2] for row in studio.session.get(2).rows] == [60]


def odd_midi(*events: tuple[int, bytes]) -> str:
    """A MIDI file in base64, of messages and the ticks before them, 1 tick = 0.5 s."""
    track = b"".join(variable_length(ticks) + message for ticks, message in (*events, (0, END_OF_TRACK)))
    return base64.b64encode(file_header(0, 1)[:12] + b"\0\1" + chunk(b"MTrk", track)).decode()


KEY, KEY_UP, PEDAL, PEDAL_UP = b"\x90\x3c\x50", b"\x80\x3c\0", b"\xb0\x40\x7f", b"\xb0\x40\0"
DRUM, DRUM_UP = b"\x99\x24\x50", b"\x89\x24\0"
NOTE = ((0, KEY), (4, KEY_UP), (0, DRUM))


@pytest.mark.parametrize(
    ("events", "pedal"),
    [
        ((*NOTE, (3_000_000, PEDAL), (1, PEDAL_UP), (1, DRUM_UP)), []),
        ((*NOTE, (3_000_000, DRUM_UP), (0, PEDAL)), []),
        (((0, KEY), (2, PEDAL), (1, PEDAL_UP), (1, KEY_UP), (0, DRUM), (9, DRUM_UP)), [(1.0, 127), (1.5, 0)]),
        (
            ((0, KEY), (2, b"\xb1\x40\x7f"), (2, KEY_UP), (0, DRUM), (9, b"\xb1\x40\0"), (0, DRUM_UP)),
            [(1.0, 127), (2.0, 0)],
        ),
        (((0, KEY), (2, b"\xb9\x40\x7f"), (1, b"\xb9\x40\0"), (1, KEY_UP), (0, DRUM), (9, DRUM_UP)), []),
    ],
    ids=["under a drum", "at its end", "within the notes", "across the end", "of the drums"],
)
def test_the_pedal_of_a_file_ends_with_its_notes(studio, events, pedal):
    send(studio, "import", name="odd.mid", data=odd_midi(*events))
    assert studio.session.get(2).rows == [(0.0, 2.0, 60, 80)]
    assert studio.session.get(2).pedal == pedal
    assert any(m.get("message", "").startswith("odd.mid: drums are left out") for m in studio.published.messages)
    send(studio, "new", name="Other")
    send(studio, "open", name="First")
    assert studio.session.get(2).pedal == pedal
